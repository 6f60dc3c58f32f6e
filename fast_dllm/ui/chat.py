"""A conversation with the model and the denoising of its answers, for any interface: page, terminal, script.

Everything an interface shows is in an `AnswerFrame`; everything it may change is in `ChatSettings`. Neither knows
about widgets.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fast_dllm.decode import experiments
from fast_dllm.decode.arguments import NO_VALUE, ModelArguments
from fast_dllm.decoding import FORWARD_KINDS, STEP_KINDS, DenoisingEvent
from fast_dllm.errors import UsageError
from fast_dllm.evaluate.hub import prepare_hub_client
from fast_dllm.network.chat_template import require_chat_template
from fast_dllm.network.loading import load_model, model_source
from fast_dllm.network.modes import use_graphs
from fast_dllm.network.threads import fit_threads
from fast_dllm.network.tokenizer import decode, load_tokenizer, render, special_ids
from fast_dllm.spec.values import check_value, parse_arguments
from fast_dllm.ui.guesses import Guess, GuessWatcher

MAX_NEW_TOKENS = 512  # of an answer in a conversation, unless asked for otherwise


@dataclass(frozen=True)
class ChatSettings:
    """How an answer is decoded. `parse` checks; the model arguments' rules hold, and two more for sampling.

    knobs: the decoding options of the experiment, by name, as in ModelArguments.
    """

    experiment_name: str | None = None
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, **settings: object) -> ChatSettings:
        """Settings from values or their texts (`"0.8"`, `"none"`). Raises UsageError naming fault and choices."""
        values = dict(settings)
        sampling: dict[str, Any] = {
            name: check_value(name, values.pop(name, getattr(cls, name)), 0.0) for name in ("temperature", "top_p")
        }
        if sampling["temperature"] < 0:
            raise UsageError(f"temperature must not be negative, not {sampling['temperature']}")
        if not 0 < sampling["top_p"] <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {sampling['top_p']}")
        experiment = load_experiment(values.get("experiment_name"))
        valid_names = ["experiment_name", "seed", *experiment.model_arguments]
        for name in values:  # before anything looks at them: a model's path says whether a folder exists
            if name not in valid_names:
                raise UsageError(f"unknown setting {name!r}; valid ones: {', '.join([*valid_names, *sampling])}")
        arguments = ModelArguments.parse(experiment, **{"max_new_tokens": MAX_NEW_TOKENS} | values)
        return cls(arguments.experiment_name, seed=arguments.seed, knobs=arguments.knobs, **sampling)

    def as_dict(self) -> dict[str, object]:
        """Every setting by name, the knobs among them."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "knobs"} | dict(self.knobs)

    def changed(self, **changes: object) -> ChatSettings:
        """These settings with some changed, checked together. Another experiment brings its own knobs, at their
        defaults; those that both have stay as they are."""
        current = self.as_dict()
        if "experiment_name" in changes and changes["experiment_name"] != self.experiment_name:
            new_knobs = load_experiment(changes["experiment_name"]).knobs
            current = {key: value for key, value in current.items() if key in new_knobs or key not in self.knobs}
        return ChatSettings.parse(**current | changes)


def load_experiment(name: object) -> experiments.Experiment:
    """The policy of a name; None and `none` are the active file. Raises UsageError for a name that is not offered,
    whatever folder may have it."""
    if name in NO_VALUE:
        return experiments.load(None)
    choices = experiments.available()
    if name not in choices:
        raise UsageError(f"unknown experiment {name!r}; there are: {', '.join(choices)}")
    return experiments.load(str(name))


@dataclass(frozen=True)
class Cell:
    """One position of the answer: still masked (`text` None), or a token with the confidence and step it came with."""

    position: int
    text: str | None = None
    confidence: float = 0.0
    step: int = 0
    token: int | None = None


@dataclass(frozen=True)
class AnswerFrame:
    """An answer after one forward.

    cells: from the answer's first position to the end of its open block. sub_block: the (start, end) positions just
    worked on. kind: the forward that led here. text: the answer up to its first mask, without its stop token.
    steps, forwards, num_tokens, seconds: counted from the start of the answer; layer_forwards, model_seconds too.

    layers_at_rest: the layers that did not run in this forward, of num_layers. subset: those that the policy's own
    layer_subset names, empty where it has none. guesses: those that ran in the last forward, of this frame or of an
    earlier one. used_guess: which of them, counted from 0, is this frame's forward; None where none is. model_seconds:
    what the model and the policy took; `seconds` has what the reader of the frames took in between as well.
    """

    cells: tuple[Cell, ...]
    block_size: int
    small_block_size: int
    sub_block: tuple[int, int]
    kind: str
    text: str
    steps: int
    forwards: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0
    done: bool = False
    model_seconds: float = 0.0
    layer_forwards: float = 0.0
    num_layers: int = 0
    layers_at_rest: range = range(0)
    subset: range = range(0)
    guesses: tuple[Guess, ...] = ()
    used_guess: int | None = None

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """In the model's own time."""
        return self.num_tokens / self.model_seconds if self.model_seconds else 0.0

    def is_new(self, cell: Cell) -> bool:
        """Whether the cell was unmasked by this very forward."""
        return cell.text is not None and cell.step == self.number

    @cached_property
    def number(self) -> int:
        """This frame's number, from 1: forwards, and steps that read the last predictions again."""
        return sum(self.forwards.values())

    @property
    def num_forwards(self) -> int:
        """The forwards that ran. A step that reads the last predictions again is none."""
        return sum(count for kind, count in self.forwards.items() if FORWARD_KINDS[kind].runs_layers)

    def counts(self) -> str:
        """Tokens and steps in words."""
        return f"{self.num_tokens} tokens, {self.steps} denoising steps ({self.tokens_per_step:.2f} tokens/step)"

    def kinds(self) -> str:
        """Forwards by kind, and the steps that ran none, in words."""
        ran, not_run = (
            ", ".join(
                f"{kind} {count}"
                for kind, count in self.forwards.items()
                if count and FORWARD_KINDS[kind].runs_layers == runs_layers
            )
            for runs_layers in (True, False)
        )
        return f"forwards: {ran or 'none'}" + (f"; steps without a forward: {not_run}" if not_run else "")

    def statistics(self) -> str:
        """One line: steps, tokens per step, tokens/s in the model's time, forwards by kind."""
        return f"{self.counts()}, {self.tokens_per_second:.1f} tokens/s; {self.kinds()}"


class Chatbot:
    """A loaded model that answers conversations. One answer at a time; interfaces queue."""

    def __init__(self, arguments: ModelArguments):
        self.arguments = arguments
        if not Path(model_source(arguments.model_path)).is_dir():
            prepare_hub_client()
        self.tokenizer = load_tokenizer(arguments.model_path)
        require_chat_template(self.tokenizer)
        self.ids = special_ids(self.tokenizer)
        model = load_model(arguments.model_path, arguments.device, arguments.dtype)
        fit_threads(model)
        self.model = use_graphs(model, arguments.graphs)
        self.block_size = arguments.bd_size or self.model.config.bd_size
        positions = self.model.config.max_position_embeddings
        self.max_length = positions // self.block_size * self.block_size
        if self.max_length < 2 * self.block_size:  # one for a prompt, one for an answer
            raise UsageError(
                f"bd_size must be at most half of the model's {positions} positions, not {self.block_size}"
            )

    def describe(self) -> str:
        """One sentence about what the model is and can be asked."""
        number = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
        if self.model.config.single_turn:
            return (
                f"{size} parameters, trained on toy arithmetic: it answers word problems like the examples, "
                "one question at a time; the 7B answers anything."
            )
        return f"{size} parameters; it remembers the conversation."

    def default_settings(self) -> ChatSettings:
        """The settings that the model arguments name."""
        arguments = self.arguments
        knobs = dict(arguments.knobs)
        knobs["max_new_tokens"] = min(arguments.knobs["max_new_tokens"], self.max_length // 2)
        return ChatSettings(arguments.experiment_name, seed=arguments.seed, knobs=MappingProxyType(knobs))

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = render(self.tokenizer, messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def fit(self, messages: list[dict[str, str]], settings: ChatSettings) -> tuple[list[dict[str, str]], int]:
        """The latest messages that leave room for the answer, and how many of the oldest were left out.

        A conversation is cut at a user's turn; a system message at its head stays. A model whose config says
        `single_turn` knows one question at a time: it is sent the last message alone, which counts as none left out.
        Raises UsageError when not even the last message fits, when it is empty, and when it is no text.
        """
        if not messages or not messages[-1]["content"].strip():
            raise UsageError("the message is empty")
        check_text(messages[-1]["content"])
        if self.model.config.single_turn:
            messages = messages[-1:]
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        room = self.max_length - max(settings.knobs["max_new_tokens"], self.block_size)
        if room < self.block_size:
            budget = settings.knobs["max_new_tokens"]
            raise UsageError(f"max_new_tokens {budget} leaves no room for a prompt in {self.max_length} positions")
        for start in range(len(turns)):
            if turns[start]["role"] == "user":
                messages_sent = system + turns[start:]
                length = len(self.prompt_ids(messages_sent))
                if length <= room:
                    return messages_sent, start
        reserved = self.max_length - room
        raise UsageError(f"the prompt has {length:,} tokens, {room:,} fit with {reserved:,} kept for the answer")

    def stream(self, messages: list[dict[str, str]], settings: ChatSettings) -> Generator[AnswerFrame, None, None]:
        """Frames of the answer to a conversation that fits (see `fit`). Closing the iterator stops within one step."""
        experiment = experiments.load(settings.experiment_name)
        watcher = GuessWatcher(lambda tokens: decode(self.tokenizer, list(tokens)))
        experiment = replace(experiment, decode_one=watcher.watch(experiment.decode_one))
        prompt = self.prompt_ids(messages)
        num_blocks = max(settings.knobs["max_new_tokens"] // self.block_size, 1)
        decoding: dict[str, Any] = {
            **settings.knobs,
            "max_new_tokens": num_blocks * self.block_size,
            "block_size": self.block_size,
        }
        try:
            events = experiment.denoise(
                self.model,
                [prompt],
                mask_id=self.ids.mask,
                stop_token=self.ids.stop,
                temperature=float(settings.temperature),
                top_p=float(settings.top_p),
                generator=torch.Generator().manual_seed(settings.seed),
                **decoding,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        num_layers = self.model.config.num_hidden_layers
        subset = experiment.subset(settings.knobs, num_layers)
        return self._frames(events, watcher, len(prompt), settings, num_layers, subset)

    def _frames(
        self,
        events: Iterator[DenoisingEvent],
        watcher: GuessWatcher,
        num_prompt: int,
        settings: ChatSettings,
        num_layers: int,
        subset: range,
    ) -> Generator[AnswerFrame, None, None]:
        filled: dict[int, Cell] = {}
        token_at: dict[int, int] = {}
        forwards = dict.fromkeys(FORWARD_KINDS, 0)
        end = num_prompt
        began = time.perf_counter()
        model_seconds = layer_forwards = 0.0
        for event, seconds in _timed(events):
            model_seconds += seconds
            if FORWARD_KINDS[event.kind].runs_layers:
                layer_forwards += num_layers - len(event.layers_at_rest)
            if event.generation is not None:  # which also knows layers that rest in part
                layer_forwards = sum(event.generation.layer_forwards.values())
            forwards[event.kind] += 1
            number = sum(forwards.values())
            for position, token, confidence in zip(event.positions, event.tokens, event.confidences, strict=True):
                filled[position] = Cell(position, decode(self.tokenizer, [token]), confidence, number, token)
                token_at[position] = token
            block_end = (event.start // self.block_size + 1) * self.block_size
            end = max([end, *(position + 1 for position in filled)] + [block_end] * (event.kind in STEP_KINDS))
            if event.generation is not None:
                end = num_prompt + len(event.generation.tokens)
            cells = tuple(filled.get(position, Cell(position)) for position in range(num_prompt, end))
            known = []
            for position in range(num_prompt, end):
                if position not in token_at or token_at[position] == self.ids.stop:
                    break
                known.append(token_at[position])
            yield AnswerFrame(
                cells=cells,
                block_size=self.block_size,
                small_block_size=settings.knobs["small_block_size"],
                sub_block=(event.start, event.end),
                kind=event.kind,
                text=decode(self.tokenizer, known, skip_special_tokens=True),
                steps=sum(forwards[kind] for kind in STEP_KINDS),
                forwards=dict(forwards),
                num_tokens=sum(cell.text is not None for cell in cells),
                seconds=time.perf_counter() - began,
                done=event.generation is not None,
                model_seconds=model_seconds,
                layer_forwards=layer_forwards,
                num_layers=num_layers,
                layers_at_rest=event.layers_at_rest,
                subset=subset,
                guesses=watcher.guesses,
                used_guess=watcher.used,
            )


def _timed(events: Iterator[DenoisingEvent]) -> Iterator[tuple[DenoisingEvent, float]]:
    """Each event with the seconds that it took, without the time of its reader."""
    began = time.perf_counter()
    for event in events:
        yield event, time.perf_counter() - began
        began = time.perf_counter()


@dataclass
class Conversation:
    """What was said so far, and the settings in force."""

    chatbot: Chatbot
    settings: ChatSettings
    messages: list[dict[str, str]] = field(default_factory=list)

    def clear(self) -> None:
        self.messages.clear()

    def set(self, name: str, value: object) -> None:
        """Change one setting; raises UsageError and keeps the old one where the value is wrong."""
        self.settings = self.settings.changed(**{name: value})

    def ask(self, text: str) -> tuple[Generator[AnswerFrame], int]:
        """Frames of the answer to `text`, and how many old messages no longer fit. The answer becomes part of the
        conversation as far as it was read: also when the iterator is closed early. A message that is refused, or
        whose answer fails before its first frame, leaves no trace."""
        messages, dropped = self.chatbot.fit([*self.messages, {"role": "user", "content": text}], self.settings)
        frames = self.chatbot.stream(messages, self.settings)
        return self._remember(messages, frames), dropped

    def _remember(self, messages: list[dict[str, str]], frames: Generator[AnswerFrame]) -> Generator[AnswerFrame]:
        last = None
        try:
            for frame in frames:
                last = frame
                yield frame
        finally:
            if last is not None:
                self.messages = [*messages, {"role": "assistant", "content": last.text}]


def check_text(text: str) -> None:
    """Raises UsageError for text that cannot be written as UTF-8: Python keeps a wrong byte of a command line or of
    stdin as half a character (surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start + 1} of the message"
        raise UsageError(f"{place} is not valid UTF-8; is the terminal's or the file's encoding another one?") from None


def with_defaults(model_args: dict[str, object]) -> ModelArguments:
    """Model arguments for an interface: the embedded model is the default where there is no GPU."""
    model = {} if torch.cuda.is_available() else {"model_path": "tiny"}
    return ModelArguments.parse(**model | model_args)


def parse_model_args(text: str) -> dict[str, object]:
    """`name=value,name=value` as eval.py's --model_args takes it."""
    return parse_arguments(text) if text.strip() else {}
