"""lm-evaluation-harness's view of a Fast-dLLM v2 model: the `LM` registered as `fast_dllm_v2`.

Three things happen here and nowhere else: text becomes token ids and back, a request's settings (`until`,
`max_gen_toks`, sampling) become arguments of an experiment's generate(), and what it cost is counted.
"""

from __future__ import annotations

import copy
import logging
import resource
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from fast_dllm.decode import experiments
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decode.batching import AUTO, rows_that_fit, streamed
from fast_dllm.decoding import DenoisingEvent, Generation
from fast_dllm.errors import UsageError
from fast_dllm.evaluate.prompts import cut_at_stop_strings, rewrite_prompt
from fast_dllm.evaluate.scoring import MaskedInput, ScoringLM
from fast_dllm.network.graphs import use_graphs
from fast_dllm.network.model import load_model, model_source
from fast_dllm.network.threads import fit_threads
from fast_dllm.network.tokenizer import decode, load_tokenizer, render, special_ids
from fast_dllm.record import results
from fast_dllm.record.answers import AnswerStore, Cost, Ledger, batch_record, combined, request_key
from fast_dllm.record.shards import Plan, Share, ShareAnswered, generation_cost
from fast_dllm.spec.hashes import decoding_sha256
from fast_dllm.spec.shares import share_folder
from fast_dllm.spec.tasks import task_of

logger = logging.getLogger(__name__)

GENERATION_SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


@dataclass(frozen=True)
class _Request:
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
        return self.max_new_tokens, self.temperature, self.top_p


@register_model("fast_dllm_v2")
class FastDLLM(ScoringLM):
    """Fast-dLLM v2 with an experiment's generation code. Model arguments: fast_dllm.decode.arguments.ModelArguments."""

    def __init__(self, max_batch_size: int | None = None, **model_args: object):
        super().__init__()
        del max_batch_size  # lm_eval always passes it; fast_dllm.decode.batching has bounds of its own
        self.arguments = ModelArguments.parse(**model_args)
        self.experiment = experiments.load(self.arguments.experiment_name)
        # Taken as the code is loaded: whoever edits a file during a long run does not change what ran.
        self.decoding_sha256, self.scoring_sha256 = (decoding_sha256(results.ROOT, scored) for scored in (False, True))
        device = self._join_processes(self.arguments.device)
        self.tokenizer = load_tokenizer(self.arguments.model_path)
        self.ids = special_ids(self.tokenizer)
        model = load_model(self.arguments.model_path, device, self.arguments.dtype)
        self.num_threads = fit_threads(model)
        self.model = use_graphs(model, self.arguments.graphs, several=self.arguments.batch_size != 1)
        self.model_revision = results.model_revision(model_source(self.arguments.model_path))
        self._device = self.model.device
        self.block_size = self.arguments.bd_size or self.model.config.bd_size
        self.max_length = self.model.config.max_position_embeddings // self.block_size * self.block_size
        self._begin_anew()
        self._check_against_model()

    def configured(self, arguments: ModelArguments) -> FastDLLM:
        """This loaded model with other model arguments that concern decoding alone; answers and cost begin anew.

        Raises UsageError where they do not fit the model.
        """
        other = copy.copy(self)
        other.arguments = arguments
        other._begin_anew()
        other._check_against_model()
        return other

    def _begin_anew(self) -> None:
        self.ledger = Ledger()  # of this process; its cost is without loading the model, see results.throughput
        self.store: AnswerStore | None = None
        self.plan: Plan | None = None
        self._kinds_left: set[str] = set()

    @property
    def cost(self) -> Cost:
        """Of this process."""
        return self.ledger.cost

    def _check_against_model(self) -> None:
        """Faults that show only once the model's sizes are known, before any request is answered."""
        vocab_size = self.model.config.vocab_size
        if max(self.ids.mask, self.ids.stop) >= vocab_size:
            raise UsageError(f"the tokenizer's special ids {self.ids} are outside the model's {vocab_size} tokens")
        try:
            # No prompts: only the arguments are checked, by the experiment's own code.
            self.experiment.generate(self.model, [], **self._decoding(max(self._budget, self.block_size), 0.0, 1.0))
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _decoding(self, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        return {
            **self.arguments.knobs,
            "mask_id": self.ids.mask,
            "stop_token": self.ids.stop,
            "max_new_tokens": max_new_tokens,
            "block_size": self.block_size,
            "temperature": temperature,
            "top_p": top_p,
        }

    @property
    def _budget(self) -> int:
        """New tokens of an answer where its task sets no limit."""
        return self.arguments.knobs["max_new_tokens"]

    # ---- text and tokens -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.ids.stop

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.ids.stop if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(self.tokenizer, chat_history, add_generation_prompt)

    # ---- generation ------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer every request, in order; equal greedy requests are answered once."""
        asked = [self._request(instance, repeat) for instance, repeat in _with_repeats(requests)]
        keys = {request: request_key(*astuple(request)) for request in asked}
        own = keys if self.plan is None else self._own_share(keys, requests, asked)
        answers = self._known_answers(own.values(), of_run=len(keys))
        pending = [request for request, key in own.items() if key not in answers]
        with tqdm(total=len(own), desc="generating", unit="req", disable=disable_tqdm or self.rank != 0) as progress:
            progress.update(len(own) - len(pending))
            for group in _of_equal_settings(pending):
                for request, generation, seconds, num_rows in streamed(self._denoise, group, self._num_rows(group)):
                    key = keys[request]
                    new, costs = {key: self._text(request, generation)}, {key: _cost(request, generation)}
                    self._keep(answers, new, Cost(seconds_generating=seconds), costs, num_rows)
                    progress.update()
                    progress.set_postfix_str(f"{self.cost['new_tokens'] / self.cost['seconds_generating']:.1f} tok/s")
        if self.arguments.show_speed and self.rank == 0 and pending:
            print(results.speed_line(self.cost), flush=True)
        self._share_is_answered("generate_until")
        texts = [answers[key] if (key := keys[request]) in answers else "" for request in asked]
        for instance, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def _own_share(
        self, keys: dict[_Request, str], requests: list[Instance], asked: list[_Request]
    ) -> dict[_Request, str]:
        """Those of `keys` that this process answers, in order. What is answered already weighs nothing."""
        assert self.plan is not None
        assert self.store is not None
        costs = {}
        for instance, request in zip(requests, asked, strict=True):
            described = task_of(instance.task_name)
            answer_tokens = min(request.max_tokens, (described and described.answer_tokens) or request.max_tokens)
            key = keys[request]
            costs[key] = 0.0 if key in self.store else generation_cost(len(request.prompt_ids), answer_tokens)
        own = self.plan.own(costs)
        return {request: key for request, key in keys.items() if key in own}

    def _denoise(self, requests: list[_Request], num_rows: int) -> Iterator[DenoisingEvent]:
        first = requests[0]
        settings = self._decoding(first.max_new_tokens, first.temperature, first.top_p)
        settings["generator"] = [torch.Generator().manual_seed(request.seed) for request in requests]
        settings["num_rows"] = num_rows
        return self.experiment.denoise(self.model, [list(request.prompt_ids) for request in requests], **settings)

    def _num_rows(self, group: list[_Request]) -> int:
        """How many requests are answered side by side."""
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in group)
        return self.rows_of(min(longest + self.block_size, self.max_length))

    def rows_of(self, longest: int) -> int:
        """The batch size; with `auto`, sequences of `longest` positions that fit the device's memory."""
        if self.arguments.batch_size != AUTO:
            return int(self.arguments.batch_size)
        rows = rows_that_fit(self.model, longest, self.block_size)
        logger.warning("batch_size auto: %d sequences of up to %d positions at a time", rows, longest)
        return rows

    def _text(self, request: _Request, generation: Generation) -> str:
        text = decode(self.tokenizer, generation.tokens[: request.max_tokens], skip_special_tokens=True)
        return cut_at_stop_strings(text, request.until)

    def _request(self, instance: Instance, repeat: int) -> _Request:
        context, given = instance.args
        settings = normalize_gen_kwargs(given, default_max_gen_toks=self._budget)
        unsupported = sorted(set(settings) - set(GENERATION_SETTINGS))
        if unsupported:
            raise UsageError(
                f"task {instance.task_name} asks for {', '.join(unsupported)}; "
                f"supported generation settings: {', '.join(GENERATION_SETTINGS)}"
            )
        max_tokens = settings["max_gen_toks"]
        # Without a limit of the task's own, generate() gets max_new_tokens as it is: whole blocks, like the reference.
        # A task's limit is held to the token: blocks enough for it from any place in the first block, then a cut.
        limited = any(name.startswith("max_") for name in given)
        budget = max_tokens + 2 * (self.block_size - 1) if limited else max_tokens
        if max_tokens < 1:
            raise UsageError(f"task {instance.task_name} asks for max_gen_toks {max_tokens}; it must be at least 1")
        ids = self.tok_encode(rewrite_prompt(context, instance.task_name))
        # The prompt may take what the budget leaves of the context, and never less than half of it.
        room = self.max_length - min(max_tokens, self.max_length // 2)
        if len(ids) > room:
            logger.warning("prompt of %d tokens cut to its last %d (%s)", len(ids), room, instance.task_name)
        truncated, ids = len(ids) > room, ids[-room:]
        blocks_left = self.max_length // self.block_size - len(ids) // self.block_size
        temperature = settings.get("temperature", 0.0)
        sampled = temperature > 0
        seed = sha256(f"{self.arguments.seed} {instance.task_name} {instance.doc_id} {repeat}".encode()).digest()
        return _Request(
            prompt_ids=tuple(ids or [self.prefix_token_id]),
            until=tuple(settings["until"]),
            max_tokens=max_tokens,
            max_new_tokens=min(max(budget // self.block_size, 1), blocks_left) * self.block_size,
            temperature=temperature,
            top_p=settings.get("top_p", 1.0) if sampled else 1.0,
            seed=int.from_bytes(seed[:7], "big") if sampled else 0,
            truncated=truncated,
        )

    # ---- answers that outlive the process --------------------------------------------------------------------

    def keep_answers(self, folder: Path, claim: Path | None = None, share: Share | None = None) -> None:
        """Answer durably from here on: what an earlier, interrupted run under the same identity answered counts.

        claim: see AnswerStore; once it is gone, generate_until and the others raise TakenOverError. share: answer that
        part of each call's requests; of the others the calls return what is known, or nothing ("" or 0).
        """
        name = None if share is None else share.name
        records = share_folder(folder, name)
        self.store = AnswerStore(folder, self.identity(), rank=self.rank, claim=claim, share=name, records=records)
        if share is not None:
            self.plan = Plan.of(self.store.folder, folder, share)
        if self.store.num_recovered:
            logger.warning("continuing: %d answers of an interrupted run found", self.store.num_recovered)

    def end_after(self, kinds: Iterable[str]) -> None:
        """Of a share: raise ShareAnswered once lm_eval has asked for these kinds of requests. What follows in it is the
        scoring, which needs everybody's answers."""
        self._kinds_left = set(kinds)

    def _share_is_answered(self, kind: str) -> None:
        if self._kinds_left:
            self._kinds_left.discard(kind)
            if not self._kinds_left:
                raise ShareAnswered

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scores = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._share_is_answered("loglikelihood")
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        self._share_is_answered("loglikelihood_rolling")
        return totals

    def _score(self, parts: list[list[tuple[MaskedInput, int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Of a share its own parts. Those that begin with the same input, like the letters of one question, stay
        together: they have forwards in common."""
        if self.plan is not None:
            keys = [request_key("share", *part[0][0]) if part else "" for part in parts]
            costs: Counter[str] = Counter()
            for key, part in zip(keys, parts, strict=True):
                costs[key] += sum(len(masked.ids) for masked, _ in part)
            own = self.plan.own(costs)
            parts = [part if key in own else [] for key, part in zip(keys, parts, strict=True)]
        return super()._score(parts, disable_tqdm)

    def identity(self) -> dict[str, object]:
        """Everything that changes an answer."""
        arguments = self.arguments.as_dict()
        del arguments["show_speed"]
        return {
            **arguments,
            "model_revision": self.model_revision,
            "dtype": str(self.model.dtype),
            "device": self.device.type,
            "generation_code_sha256": self.experiment.policy_sha256,
            "decoding_sha256": self.decoding_sha256,
        }

    def code_hashes(self, scored: bool) -> dict[str, str]:
        """Of the texts that a token, or with `scored` a log-likelihood, depends on, as they were loaded."""
        return {
            "generation_code_sha256": self.experiment.policy_sha256,
            "decoding_sha256": self.scoring_sha256 if scored else self.decoding_sha256,
        }

    def _known_answers(self, keys: Iterable[str], of_run: int | None = None) -> dict[str, Any]:
        """of_run: how many requests the whole run has in this call, where a share is answered."""
        if self.store is None:
            return {}
        keys = list(keys)
        self.store.expect(keys, None if self.plan is None else of_run)
        return {key: self.store[key] for key in keys if key in self.store}

    def _keep(
        self,
        answers: dict[str, Any],
        new: dict[str, Any],
        cost: Cost,
        costs: dict[str, Cost] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Add a batch's answers, what it cost as a whole and what each of them did; with a store they outlive the
        process when this returns."""
        if batch_size is None and cost["forwards.score"]:
            batch_size = int(cost["forwards.score"])
        if self.store is not None:
            self.store.append(new, cost, costs, batch_size)
        answers.update(new)
        self.ledger.add(batch_record(new, cost, costs, batch_size))

    def device_report(self) -> dict[str, object]:
        """The device, graphs, the host's threads, and this process's peak memory: of the GPU or resident."""
        if self.device.type == "cuda":
            gpu, peak = torch.cuda.get_device_name(self.device), torch.cuda.max_memory_allocated(self.device)
        else:
            gpu, peak = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        graphs = self.arguments.graphs if self.model.graphs or self.model.model.compiled else "off"
        about = {"gpu": gpu, "graphs": graphs, "num_threads": self.num_threads, "peak_memory_bytes": peak}
        return {"device": str(self.device), **about}

    def total(self) -> Ledger | None:
        """What all processes and all segments of the run answered and what it cost, an answer that was given twice
        counted once; None but on the first process."""
        gathered = self.gather_object(self.ledger)
        if gathered is None:
            return None
        return combined(gathered) if self.store is None else self.store.total(gathered)


def _with_repeats(requests: list[Instance]) -> Iterator[tuple[Instance, int]]:
    """Each request with how often it came before, so that a task's repeats draw different samples.

    lm_eval pads the processes' lists with more copies than `repeats`; those count as the first one again.
    """
    seen: Counter = Counter()
    for instance in requests:
        repeat = seen[id(instance)]
        seen[id(instance)] += 1
        yield instance, repeat if repeat < (instance.repeats or 1) else 0


def _of_equal_settings(requests: list[_Request]) -> list[list[_Request]]:
    """Requests that one call can answer, in order."""
    groups: dict[tuple, list[_Request]] = {}
    for request in requests:
        groups.setdefault(request.batch_key, []).append(request)
    return list(groups.values())


def _cost(request: _Request, generation: Generation) -> Cost:
    """What one answer cost by itself."""
    cost = Cost(requests=1, new_tokens=len(generation.tokens), truncated_prompts=int(request.truncated))
    for name in ("forwards", "layer_forwards", "row_layer_forwards"):
        cost.add({f"{name}.{kind}": count for kind, count in getattr(generation, name).items()})
    return cost
