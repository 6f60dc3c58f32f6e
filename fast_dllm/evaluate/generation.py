"""Generated answers: lm_eval's requests become prompts for an experiment's policy, and its tokens become text."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decode.batching import streamed
from fast_dllm.decode.loaded import LoadedModel
from fast_dllm.decode.tracing import traced
from fast_dllm.decoding import DenoisingEvent, Generation
from fast_dllm.errors import UsageError, line_of
from fast_dllm.evaluate.prompts import cut_at_stop_strings, rewrite_prompt
from fast_dllm.evaluate.run_answers import RunAnswers
from fast_dllm.record.answers import request_key
from fast_dllm.record.cost import Cost
from fast_dllm.record.shards import generation_cost
from fast_dllm.record.throughput import speed_line
from fast_dllm.spec.tasks import task_of

logger = logging.getLogger(__name__)

GENERATION_SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


@dataclass(frozen=True)
class GenerationRequest:
    """One text to generate: its prompt and the settings that change its answer."""

    prompt_ids: tuple[int, ...]
    until: tuple[str, ...]
    max_tokens: int  # the answer is cut to this
    max_new_tokens: int  # what generate() is given: whole blocks that hold max_tokens
    temperature: float
    top_p: float
    seed: int
    truncated: bool = False

    @property
    def batch_key(self) -> tuple:
        """Requests with the same key can be decoded side by side."""
        return self.max_new_tokens, self.temperature, self.top_p


class TextGenerator:
    """Answers lm_eval's `generate_until` requests with one loaded model under one set of model arguments.

    rows_of: longest sequence (positions) -> how many are decoded side by side.
    """

    def __init__(
        self, loaded: LoadedModel, arguments: ModelArguments, answers: RunAnswers, rows_of: Callable[[int], int]
    ):
        self.loaded, self.arguments, self.answers, self.rows_of = loaded, arguments, answers, rows_of
        self._finished_traces: dict[GenerationRequest, dict[str, Any]] = {}

    def check(self) -> None:
        """Raise UsageError for arguments that do not fit the model, by the experiment's own code."""
        budget = max(self._budget, self.loaded.block_size)
        try:
            self.arguments.experiment.generate(self.loaded.network, [], **self.decoding(budget, 0.0, 1.0))
        except ValueError as error:
            raise UsageError(str(error)) from None

    def decoding(self, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        """The keyword arguments of an experiment's generate() and denoise()."""
        return {
            **self.arguments.knobs,
            "mask_id": self.loaded.ids.mask,
            "stop_token": self.loaded.ids.stop,
            "max_new_tokens": max_new_tokens,
            "block_size": self.loaded.block_size,
            "temperature": temperature,
            "top_p": top_p,
        }

    @property
    def _budget(self) -> int:
        """New tokens of an answer where its task sets no limit."""
        return self.arguments.knobs["max_new_tokens"]

    def texts(self, instances: list[Instance], quiet: bool) -> list[str]:
        """The answer to every request, in order; equal greedy requests are answered once. "" for what another shard
        answers."""
        requests = [self.request(instance, repeat) for instance, repeat in with_repeats(instances)]
        keys = {request: request_key(*astuple(request)) for request in requests}
        for instance, request in zip(instances, requests, strict=True):
            self.answers.question_keys[instance.task_name or "", instance.doc_id or 0] = keys[request]
        questions = _questions_by_key(instances, [keys[request] for request in requests])
        keys_here = keys if self.answers.plan is None else self._of_this_shard(keys, instances, requests)
        answers = self.answers.known(keys_here.values(), of_run=len(keys))
        pending = [request for request, key in keys_here.items() if key not in answers]
        with tqdm(total=len(keys_here), desc="generating", unit="req", disable=quiet) as progress:
            progress.update(len(keys_here) - len(pending))
            for group in of_equal_settings(pending):
                for request, generation, seconds, num_rows in streamed(self.denoise, group, self._num_rows(group)):
                    key = keys[request]
                    answers[key] = self._text(request, generation)
                    if self.answers.traces is not None:  # before the answer: an answer on disk has its trace
                        self.answers.traces.write(
                            {"key": key, "questions": questions[key], **self._finished_traces.pop(request)}
                        )
                    cost, costs = Cost(seconds_generating=seconds), {key: cost_of(request, generation)}
                    self.answers.keep({key: answers[key]}, cost, costs, num_rows)
                    progress.update()
                    total = self.answers.ledger.cost
                    progress.set_postfix_str(f"{total.new_tokens / total.seconds_generating:.1f} tok/s")
        if self.arguments.show_speed and self.answers.processes.rank == 0 and pending:
            print(speed_line(self.answers.ledger.cost), flush=True)
        return [answers.get(keys[request], "") for request in requests]

    def _of_this_shard(
        self, keys: dict[GenerationRequest, str], instances: list[Instance], requests: list[GenerationRequest]
    ) -> dict[GenerationRequest, str]:
        """Those of `keys` that this process answers, in order. An answered request costs nothing more."""
        costs = {}
        for instance, request in zip(instances, requests, strict=True):
            task = task_of(instance.task_name)
            answer_tokens = min(request.max_tokens, (task and task.answer_tokens) or request.max_tokens)
            key = keys[request]
            is_answered = self.answers.is_answered(key)
            costs[key] = 0.0 if is_answered else generation_cost(len(request.prompt_ids), answer_tokens)
        keys_of_shard = self.answers.of_this_shard(costs)
        return {request: key for request, key in keys.items() if key in keys_of_shard}

    def denoise(self, requests: list[GenerationRequest], num_rows: int) -> Iterator[DenoisingEvent]:
        """The events of requests with equal settings, `num_rows` of them side by side."""
        first = requests[0]
        settings = self.decoding(first.max_new_tokens, first.temperature, first.top_p)
        settings["generator"] = [torch.Generator().manual_seed(request.seed) for request in requests]
        settings["num_rows"] = num_rows
        prompts = [list(request.prompt_ids) for request in requests]
        experiment = self.arguments.experiment
        if self.answers.traces is not None:

            def keep(row: int, trace: dict[str, Any]) -> None:
                self._finished_traces[requests[row]] = trace

            experiment = replace(experiment, decode_one=traced(experiment.decode_one, keep))
        return experiment.denoise(self.loaded.network, prompts, **settings)

    def _num_rows(self, group: list[GenerationRequest]) -> int:
        """How many requests are answered side by side."""
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in group)
        return self.rows_of(min(longest + self.loaded.block_size, self.loaded.max_length))

    def _text(self, request: GenerationRequest, generation: Generation) -> str:
        return cut_at_stop_strings(self.loaded.decode(generation.tokens[: request.max_tokens]), request.until)

    def request(self, instance: Instance, repeat: int) -> GenerationRequest:
        """What lm_eval asks for, checked. repeat: which sample of the same question it is. Raises UsageError."""
        context, generation_arguments = instance.args
        settings = generation_settings(generation_arguments, self._budget, instance.task_name)
        max_tokens = settings["max_gen_toks"]
        size, max_length = self.loaded.block_size, self.loaded.max_length
        # If the task sets no limit, generate() gets max_new_tokens as it is, in whole blocks, like the reference. The
        # limit of a task is exact: enough blocks for it, wherever in its block the prompt ends, and the answer is cut.
        limited = any(name.startswith("max_") for name in generation_arguments)
        budget = max_tokens + 2 * (size - 1) if limited else max_tokens
        ids = self.loaded.encode(rewrite_prompt(context, instance.task_name))
        # The prompt may take what the budget leaves of the context, and never less than half of it.
        room = max_length - min(max_tokens, max_length // 2)
        if len(ids) > room:
            logger.warning("prompt of %d tokens cut to its last %d (%s)", len(ids), room, instance.task_name)
        truncated, ids = len(ids) > room, ids[-room:]
        blocks_left = max_length // size - len(ids) // size
        temperature = settings.get("temperature", 0.0)
        sampled = temperature > 0
        seed = sha256(f"{self.arguments.seed} {instance.task_name} {instance.doc_id} {repeat}".encode()).digest()
        return GenerationRequest(
            prompt_ids=tuple(ids or [self.loaded.start_id]),
            until=tuple(settings["until"]),
            max_tokens=max_tokens,
            max_new_tokens=min(max(budget // size, 1), blocks_left) * size,
            temperature=temperature,
            top_p=settings.get("top_p", 1.0) if sampled else 1.0,
            seed=int.from_bytes(seed[:7], "big") if sampled else 0,
            truncated=truncated,
        )


def generation_settings(
    generation_arguments: Mapping[str, Any], default_max_tokens: int, task_name: str | None
) -> dict[str, Any]:
    """A task's generation settings under lm_eval's names for them, checked.

    default_max_tokens: `max_gen_toks` where the task sets none. Raises UsageError for a setting that is unknown, of the
    wrong kind or out of range.
    """
    try:
        settings: dict[str, Any] = dict(
            normalize_gen_kwargs(dict(generation_arguments), default_max_gen_toks=default_max_tokens)
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"the generation settings of task {task_name} cannot be read: {line_of(error)}") from None
    unsupported = sorted(set(settings) - set(GENERATION_SETTINGS))
    if unsupported:
        raise UsageError(
            f"task {task_name} asks for {', '.join(unsupported)}; "
            f"supported generation settings: {', '.join(GENERATION_SETTINGS)}"
        )
    valid = {
        "max_gen_toks": ("at least 1", lambda value: value >= 1),
        "temperature": ("a number from 0", lambda value: _is_number(value) and value >= 0),
        "top_p": ("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1),
        "do_sample": ("True or False", lambda value: isinstance(value, bool)),
        "until": ("a text or a list of texts", lambda value: all(isinstance(each, str) for each in value)),
    }
    for name, (choices, is_valid) in valid.items():
        if name in settings and not is_valid(settings[name]):
            raise UsageError(f"task {task_name} asks for {name} {settings[name]}; it must be {choices}")
    return settings


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def with_repeats(instances: list[Instance]) -> Iterator[tuple[Instance, int]]:
    """Each request with how often it came before, so that a task's repeats draw different samples.

    lm_eval pads the processes' lists with more copies than `repeats`; those count as the first one again.
    """
    seen: Counter = Counter()
    for instance in instances:
        repeat = seen[id(instance)]
        seen[id(instance)] += 1
        yield instance, repeat if repeat < (instance.repeats or 1) else 0


def _questions_by_key(instances: list[Instance], keys: list[str]) -> dict[str, list[list[object]]]:
    """Request key -> [task, number of the question] of each question that its answer is for."""
    questions: dict[str, list[list[object]]] = {}
    for instance, key in zip(instances, keys, strict=True):
        place = [instance.task_name, instance.doc_id]
        if place not in questions.setdefault(key, []):
            questions[key].append(place)
    return questions


def of_equal_settings(requests: list[GenerationRequest]) -> list[list[GenerationRequest]]:
    """Requests that one call can answer, in order."""
    groups: dict[tuple, list[GenerationRequest]] = {}
    for request in requests:
        groups.setdefault(request.batch_key, []).append(request)
    return list(groups.values())


def cost_of(request: GenerationRequest, generation: Generation) -> Cost:
    """What one answer cost by itself."""
    return Cost(
        requests=1,
        new_tokens=len(generation.tokens),
        truncated_prompts=int(request.truncated),
        forwards=dict(generation.forwards),
        layer_forwards=dict(generation.layer_forwards),
        row_layer_forwards=dict(generation.row_layer_forwards),
        guesses_offered=dict(generation.guesses_offered),
        guesses_accepted=dict(generation.guesses_accepted),
    )
