"""The types that a policy and the engine exchange: options, forwards, predictions, events.

A policy is a coroutine for one sequence, `decode_one(answer, options)`, in an experiment's generation_functions.py. It
yields a `Forward` and is sent the `Prediction`; it yields the `DenoisingEvent` that `Answer.fill` returns and is sent
nothing. It learns nothing of the other sequences. fast_dllm.decode.engine runs policies. This module needs nothing but
the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, ClassVar, Generator


@dataclass(frozen=True)
class ForwardKind:
    """One kind of forward. step: it is a denoising step. runs_layers: it costs a pass through layers."""

    meaning: str
    step: bool = False
    runs_layers: bool = True


# The engine, the summary, the page, the chat and the benchmarks all read this table.
FORWARD_KINDS: Mapping[str, ForwardKind] = {
    "prefill": ForwardKind("the prompt's whole blocks, once"),
    "full": ForwardKind("every row of the block, every layer", step=True),
    "sub": ForwardKind("a window of the block's rows, every layer", step=True),
    "partial": ForwardKind("rows of the block, some layers replaced by what they gave earlier", step=True),
    "reused": ForwardKind("no forward: the last predictions are read again", step=True, runs_layers=False),
    "guessed": ForwardKind(
        "no forward: the last one ran this state of the block as a guess", step=True, runs_layers=False
    ),
    "commit": ForwardKind("the finished block once more; it becomes part of the prefix"),
    "guessed_commit": ForwardKind("no forward: the last one ran the finished block as a guess", runs_layers=False),
}
# A guessed forward answers one of the kind on the right.
GUESSED_KINDS: Mapping[str, str] = {"full": "guessed", "commit": "guessed_commit"}
# What a guess can be: another state of the block, the finished block, the next block's first state.
GUESSES = ("step", "commit", "opening")
MOST_STATES = 8  # states that one forward of a sequence may run: its own and its guesses
STEP_KINDS = tuple(name for name, kind in FORWARD_KINDS.items() if kind.step)


@dataclass(frozen=True)
class Options:
    """The options of every policy. An experiment's `class Options(decoding.Options)` adds its own knobs, with defaults.

    mask_id, stop_token: token ids. max_new_tokens, block_size, small_block_size: numbers of tokens. threshold: a
    probability; every row whose confidence is higher is unmasked (1.0: one token a step). use_block_cache: False
    makes every step run the whole block.
    """

    mask_id: int
    stop_token: int
    max_new_tokens: int = 2048
    block_size: int = 32
    small_block_size: int = 8
    threshold: float = 0.9
    use_block_cache: bool = True

    # For forms: the values to offer, by name of the option. `check` decides which are valid.
    CHOICES: ClassVar[Mapping[str, Sequence[object]]] = {}

    def check(self, num_layers: int | None = None) -> None:
        """Raise ValueError, one line, for values out of range. num_layers: the model's, where it is loaded."""
        if self.block_size < 1 or self.small_block_size < 1 or self.block_size % self.small_block_size:
            raise ValueError(
                f"small_block_size must divide the block of {self.block_size}, not {self.small_block_size}"
            )
        if self.max_new_tokens < self.block_size:
            raise ValueError(
                f"max_new_tokens must be at least one block ({self.block_size}), not {self.max_new_tokens}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a number from 0 to 1, not {self.threshold:g}")
        if self.mask_id == self.stop_token:
            raise ValueError(f"mask_id and stop_token are both {self.mask_id}")


@dataclass(frozen=True)
class Reuse:
    """What a forward of block rows does with a contiguous range of layers: run and store them, or read the store.

    layers: [start, stop). part: what is stored for each row of the block, by position (fast_dllm.layer_reuse.PARTS).
    read: stored values replace the layers, whose keys and values stay as last computed; else the layers run and are
    stored. decide: replaces `read` by a decision in mid-forward, once the layers before the range have run. It is given
    the drift, mean |h - stored| / mean |stored| over the rows to be read, where h enters the range now and stored
    entered it when it last ran; True reads. order: 0 reads the last store; 1 the straight line through the last two
    stores of this block, `ahead` times their distance beyond the last (TaylorSeer).
    """

    layers: range
    part: str
    read: bool = False
    decide: Callable[[float], bool] | None = None
    order: int = 0
    ahead: float = 0.0

    @property
    def store_key(self) -> tuple[range, str, int]:
        """Forwards with equal keys write and read the same store."""
        return self.layers, self.part, self.order


@dataclass(frozen=True)
class Forward:
    """A forward that one sequence asks for.

    kind: one of FORWARD_KINDS, as if every layer ran; a forward that reads a store is counted as "partial". token_ids:
    T tokens at block rows [offset, offset + T); a prefill's are the prompt's whole blocks. wanted: the positions,
    counted like rows from the block's start, whose predictions are sent back; each draws one random number when tokens
    are sampled. keep: the positions whose predictions later "reused" steps may want, `wanted` among them. The
    prediction for position p is read at row p - 1 (token shift), so a window's first position has none. measure: a
    further number for each wanted position, one of fast_dllm.sampling.MEASURES; empty asks for none.

    guesses: forwards of whole blocks ("full", "commit") that the policy may ask for next. They run as more rows of this
    forward, and no state sees another one. If the policy then asks for one of them, exactly as it was guessed, it is
    sent that prediction and nothing runs. continues: on a guess for the next block, which state of this block stands
    before it: 0 is the forward's own, n is guesses[n - 1].
    """

    kind: str
    token_ids: list[int] = field(default_factory=list)
    offset: int = 0
    wanted: range = range(0)
    keep: range = range(0)
    reuse: Reuse | None = None
    measure: str = ""
    guesses: tuple[Forward, ...] = ()
    continues: int | None = None

    @property
    def states(self) -> tuple[Forward, ...]:
        """All states of the sequence that this forward runs: its own and its guesses."""
        return self, *self.guesses

    @property
    def guess_kind(self) -> str:
        """What it is as a guess: one of GUESSES."""
        if self.kind == "commit":
            return "commit"
        return "step" if self.continues is None else "opening"

    @property
    def predicted_positions(self) -> range:
        """All positions whose predictions are computed."""
        return self.keep or self.wanted

    def rows_of(self, positions: range) -> list[int]:
        """Which of its T rows predict these positions. No row predicts a window's first position; row 0 is named."""
        return [max(position - 1 - self.offset, 0) for position in positions]


@dataclass(frozen=True)
class Prediction:
    """A forward's candidate tokens for the wanted positions, in order, and their confidences (probabilities).

    kind: the kind of forward that was run. layers_at_rest: the layers that did not run. measures: what the forward's
    `measure` asked for, one number for each wanted position. states: what each of the forward's states (its own, then
    its guesses) predicts for all its predicted positions. Only wanted tokens are drawn, the others are the most likely
    ones.
    """

    kind: str
    tokens: list[int]
    confidences: list[float]
    layers_at_rest: range = range(0)
    measures: list[float] = field(default_factory=list)
    states: tuple[Prediction, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One finished answer: its new tokens, up to and with the first stop token, and its cost.

    forwards: number by kind. layer_forwards: layers run, by kind (a forward at full depth counts the model's layers).
    row_layer_forwards: the same times the rows that each layer ran, those of guesses included. guesses_offered,
    guesses_accepted: numbers by what was guessed (GUESSES); without guesses they are empty.
    """

    tokens: list[int]
    forwards: dict[str, int]
    layer_forwards: dict[str, float] = field(default_factory=dict)
    row_layer_forwards: dict[str, float] = field(default_factory=dict)
    guesses_offered: dict[str, int] = field(default_factory=dict)
    guesses_accepted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DenoisingEvent:
    """What one forward (or one step that reads again) decided for one sequence.

    row: index into the prompts. kind: one of FORWARD_KINDS. start, end: absolute positions (0 = the first prompt
    token): the sub-block of a denoising step, else what was prefilled or committed. positions, tokens, confidences:
    what was just filled in; a confidence is a probability (fast_dllm.sampling). layers_at_rest: the layers that did not
    run. generation: set on a sequence's last event.
    """

    row: int
    kind: str
    start: int
    end: int
    positions: list[int]
    tokens: list[int]
    confidences: list[float]
    layers_at_rest: range = range(0)
    generation: Generation | None = None


# What decode_one returns when it is called. In quotes, because the runner reads this file with Python 3.8.
Policy = Generator["Forward | DenoisingEvent", Prediction, None]
DecodeOne = Callable[["Answer", Options], Policy]


class Answer:
    """A prompt and the answer that grows behind it. Positions are absolute; `limit` is the end of the last block.

    num_layers: of the model that answers.
    """

    def __init__(self, row: int, prompt: list[int], options: Options, num_layers: int):
        self.row, self.options, self.num_layers = row, options, num_layers
        self.tokens = list(prompt)
        self.num_prompt = self.num_settled = len(prompt)  # every position before num_settled is known
        self.limit = (len(prompt) // options.block_size + options.max_new_tokens // options.block_size) * (
            options.block_size
        )
        self.forwards = dict.fromkeys(FORWARD_KINDS, 0)
        self.layer_forwards: dict[str, float] = {}
        self.row_layer_forwards: dict[str, float] = {}
        self.guesses_offered: dict[str, int] = {}
        self.guesses_accepted: dict[str, int] = {}
        self.generation: Generation | None = None

    def is_masked(self, position: int) -> bool:
        """Whether the answer has no token yet at `position`. A prompt's token is never masked, whatever its id."""
        return position >= self.num_prompt and self.tokens[position] == self.options.mask_id

    def open_block(self, end: int) -> None:
        """Fill up to position `end` with masks."""
        self.tokens += [self.options.mask_id] * (end - len(self.tokens))

    def count(self, kind: str, layers: float, row_layers: float) -> None:
        """Add one forward that runs layers to the answer's cost. The engine calls this for each forward."""
        self.forwards[kind] += 1
        self.layer_forwards[kind] = self.layer_forwards.get(kind, 0) + layers
        self.row_layer_forwards[kind] = self.row_layer_forwards.get(kind, 0) + row_layers

    def count_guesses(self, offered: Sequence[Forward] = (), accepted: Sequence[Forward] = ()) -> None:
        """Add guesses that a forward ran, or that were accepted. The engine calls this."""
        for counts, guesses in ((self.guesses_offered, offered), (self.guesses_accepted, accepted)):
            for guess in guesses:
                counts[guess.guess_kind] = counts.get(guess.guess_kind, 0) + 1

    def fill(self, prediction: Prediction, start: int, end: int, filled: Mapping[int, int]) -> DenoisingEvent:
        """Write tokens of the prediction, {absolute position: index into the prediction}, and end the answer if it is
        complete. Returns the event for the policy to yield. start, end: the event's.

        A step that reads again is counted here, not by the engine: it costs nothing, so one that a policy only looks at
        is no step.
        """
        if not FORWARD_KINDS[prediction.kind].runs_layers:
            self.forwards[prediction.kind] += 1
        tokens = [prediction.tokens[index] for index in filled.values()]
        if self.options.mask_id in tokens:  # never a candidate; it marks a position without a prediction
            raise ValueError(f"nothing predicts the first position of a window, and {list(filled)} would fill it")
        confidences = [prediction.confidences[index] for index in filled.values()]
        for position, token in zip(filled, tokens):
            self.tokens[position : position + 1] = [token]  # the first position of a next block is appended
        while self.generation is None and self.num_settled < len(self.tokens) and not self.is_masked(self.num_settled):
            self.num_settled += 1
            if self.tokens[self.num_settled - 1] == self.options.stop_token or self.num_settled == self.limit:
                self.generation = Generation(
                    self.tokens[self.num_prompt : self.num_settled],
                    dict(self.forwards),
                    dict(self.layer_forwards),
                    dict(self.row_layer_forwards),
                    dict(self.guesses_offered),
                    dict(self.guesses_accepted),
                )
        return DenoisingEvent(
            self.row,
            prediction.kind,
            start,
            end,
            list(filled),
            tokens,
            confidences,
            prediction.layers_at_rest,
            self.generation,
        )
