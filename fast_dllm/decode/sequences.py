"""The sequences of a run: what they have in common, and the state of each prompt that is being answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fast_dllm.decoding import FORWARD_KINDS, MOST_STATES, Answer, DecodeOne, Forward, Options, Policy


@dataclass(frozen=True)
class RunSettings:
    """What all sequences of a run have in common.

    temperature: 0 is greedy; else tokens are drawn from the `top_p` nucleus. mlp_share: the share of a layer's weights
    that its MLP has; so much of a layer is saved where only its MLP does not run.
    """

    decode_one: DecodeOne
    options: Options
    temperature: float
    top_p: float
    num_layers: int
    mlp_share: float

    def is_drawn(self, forward: Forward) -> bool:
        """Whether tokens of this forward are sampled. The first token of a block is greedy at any temperature."""
        return self.temperature > 0 and FORWARD_KINDS[forward.kind].step


@dataclass(frozen=True)
class StatePrediction:
    """What one state of a sequence predicts.

    positions: counted from the start of the block. tokens, confidences: one for each position. measures: one for each
    position if the forward asked for a measure. logits (positions, V): only where tokens are drawn, because each step
    that reads them draws anew.
    """

    positions: range = range(0)
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    measures: list[float] = field(default_factory=list)
    logits: Tensor | None = None

    def at(self, positions: range) -> StatePrediction:
        """The part for some of the positions."""
        part = slice(positions.start - self.positions.start, positions.stop - self.positions.start)
        logits = None if self.logits is None else self.logits[part]
        return StatePrediction(positions, self.tokens[part], self.confidences[part], self.measures[part], logits)


@dataclass(frozen=True)
class RunGuess:
    """A guess that the sequence's last forward ran, and what it predicts.

    start: absolute position of its block. previous_block: the tokens of the block that it continues, if that block was
    not committed when the guess ran. slot: of the cache's scratch room, where its keys and values are.
    """

    forward: Forward
    start: int
    previous_block: list[int] | None
    slot: int
    prediction: StatePrediction


@dataclass
class SequenceState:
    """One sequence of a run.

    waiting: the forward that its policy asked for; None once the answer is complete. num_prefilled: tokens of a prefill
    that have run block by block beside other sequences. readable: what steps that run no layers read again.
    times_stored: by `Reuse.store_key`, how often each row of this block was stored. guesses: what the last forward ran
    beside the state that the policy asked for. is_block_cached: whether the block cache has the block as it last ran; a
    forward with guesses does not write it.
    """

    answer: Answer
    policy: Policy
    generator: torch.Generator | None
    cache_row: int
    waiting: Forward | None = None
    num_prefilled: int = 0
    readable: StatePrediction = field(default_factory=StatePrediction)
    times_stored: dict[tuple[range, str, int], Counter[int]] = field(default_factory=dict)
    guesses: list[RunGuess] = field(default_factory=list)
    is_block_cached: bool = True

    def pending(self) -> Forward:
        """The forward that the policy waits for, which must exist."""
        assert self.waiting is not None, "a sequence whose answer is complete is in no group"
        return self.waiting

    def slot(self, number: int) -> int:
        """The place in the cache's scratch room of a state of this sequence: 0 is the forward, n its n-th guess."""
        return self.cache_row * MOST_STATES + number

    def matching_guess(self, forward: Forward, length: int) -> RunGuess | None:
        """The guess that ran exactly this forward: the same tokens behind the same prefix, of `length` positions."""
        if forward.offset or forward.reuse is not None or forward.measure:
            return None
        for guess in self.guesses:
            if (
                (guess.forward.kind, guess.start, guess.forward.token_ids) == (forward.kind, length, forward.token_ids)
                and contains(guess.prediction.positions, forward.predicted_positions)
                and guess.previous_block in (None, self.answer.tokens[length - len(forward.token_ids) : length])
            ):
                return guess
        return None

    def forget_block(self) -> None:
        """Forget what was stored for the current block, which is finished."""
        self.readable, self.times_stored, self.is_block_cached = StatePrediction(), {}, True

    def count_stored(self, forward: Forward) -> None:
        """Record that a forward has written its rows to its store."""
        assert forward.reuse is not None, "a forward that stores says where"
        self.times_stored.setdefault(forward.reuse.store_key, Counter()).update(rows_run(forward))


def contains(positions: range, part: range) -> bool:
    """Whether all of `part` is within `positions`; both have a step of 1."""
    return positions.start <= part.start and part.stop <= positions.stop


def rows_run(forward: Forward) -> range:
    """The rows of the block that a forward runs."""
    return range(forward.offset, forward.offset + len(forward.token_ids))
