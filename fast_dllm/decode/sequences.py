"""The sequences of a run: what they have in common, and the state of each prompt that is being answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fast_dllm.decoding import (
    FORWARD_KINDS,
    GUESSED_KINDS,
    MOST_STATES,
    Answer,
    DecodeOne,
    Forward,
    Options,
    Policy,
)
from fast_dllm.sampling import MEASURES


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
                and _contains(guess.prediction.positions, forward.predicted_positions)
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
        self.times_stored.setdefault(forward.reuse.store_key, Counter()).update(_block_rows(forward))

    def check(self, item: object) -> Forward:
        """Return what the policy yielded if it is a forward that can be run; else raise TypeError or ValueError.

        Without this check a policy could read predictions or stored values that are not of its forward.
        """
        if not isinstance(item, Forward):
            raise TypeError(f"decode_one yielded {item!r}; it yields Forward and DenoisingEvent")
        if item.kind not in FORWARD_KINDS:
            raise ValueError(f"unknown kind of forward {item.kind!r}; there are: {', '.join(FORWARD_KINDS)}")
        if item.kind in GUESSED_KINDS.values():
            raise ValueError(f"a policy asks for a {item.kind} forward by its plain kind, as for one that runs")
        self._check_guesses(item)
        for positions in (item.wanted, item.keep):
            if positions.step != 1:
                raise ValueError(f"a forward's positions must be consecutive, not {positions}")
        if item.measure and (item.measure not in MEASURES or item.kind == "reused"):
            raise ValueError(f"no {item.measure!r} of a {item.kind} forward; a forward measures {', '.join(MEASURES)}")
        positions = self.readable.positions if item.kind == "reused" else item.predicted_positions
        if item.wanted and not _contains(positions, item.wanted):
            raise ValueError(f"positions {item.wanted} are wanted, but only {positions} are kept")
        if item.kind != "reused" and item.reuse is not None:
            self._check_store(item)
        reads_cache = item.kind in ("sub", "partial") or (
            item.reuse is not None and (item.reuse.read or item.reuse.decide)
        )
        if reads_cache and not self.is_block_cached:
            raise ValueError(
                f"a {item.kind} forward reads the block cache, which a forward with guesses does not write"
            )
        return item

    def _check_guesses(self, forward: Forward) -> None:
        """Raises ValueError for guesses that cannot run beside this forward."""
        states = forward.states
        if len(states) == 1:
            return
        if len(states) > MOST_STATES:
            raise ValueError(f"a forward runs at most {MOST_STATES} states, not {len(states)}")
        size = self.answer.options.block_size
        for number, state in enumerate(states):
            is_whole_block = state.kind in GUESSED_KINDS and state.offset == 0 and len(state.token_ids) == size
            if not is_whole_block or state.reuse is not None or state.measure or (number and state.guesses):
                raise ValueError(
                    f"state {number} of a forward with guesses is no plain full or commit forward of a block"
                )
            if state.continues is not None:
                before = states[state.continues] if number and state.continues in range(len(states)) else state
                if before.continues is not None or before is state:
                    raise ValueError(f"guess {number} continues state {state.continues}, which is none of this block")

    def _check_store(self, forward: Forward) -> None:
        """Raises ValueError for a forward that may read rows of a store which were not stored often enough."""
        reuse = forward.reuse
        assert reuse is not None, "the forward was asked"
        times, rows = self.times_stored.get(reuse.store_key, Counter()), _block_rows(forward)
        needed = 2 if reuse.order and reuse.ahead else 1
        if (reuse.read or reuse.decide) and any(times[row] < needed for row in rows):
            how_often = "stored" if needed == 1 else "stored twice"
            raise ValueError(
                f"block rows {rows} are read from layers {reuse.layers} before all of them were {how_often}"
            )


def _contains(positions: range, part: range) -> bool:
    return positions.start <= part.start and part.stop <= positions.stop


def _block_rows(forward: Forward) -> range:
    return range(forward.offset, forward.offset + len(forward.token_ids))
