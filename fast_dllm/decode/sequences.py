"""The state of a prompt that is being answered: its policy, its cache row, and predictions for later steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fast_dllm.decoding import FORWARD_KINDS, GUESSED_KINDS, MOST_STATES, Answer, Forward, Policy
from fast_dllm.sampling import MEASURES


@dataclass(frozen=True)
class RunGuess:
    """A guess that the sequence's last forward ran, and what it predicts.

    forward: the guess. start: absolute position of its block. before: the tokens of the block that it continues, if
    that was not committed when it ran. slot: of the scratch room, where its keys and values are. predictions: (tokens,
    confidences) of the positions it holds; logits (positions, V) where tokens are drawn.
    """

    forward: Forward
    start: int
    before: list[int] | None
    slot: int
    predictions: tuple[list[int], list[float]]
    logits: Tensor | None


@dataclass
class SequenceState:
    """One sequence of a run.

    waiting: the forward that its policy asked for; None once the answer is complete. num_prefilled: tokens of a prefill
    that have run block by block beside other sequences. kept: the positions of the block that can be read again;
    kept_predictions: what they predict (tokens, confidences), where tokens are not drawn; kept_logits (positions, V):
    where they are, since each reading draws anew. times_stored: by `Reuse.store_key`, how often each row of this block
    was stored. guesses: what the last forward ran beside the sequence's own state.
    is_block_cached: whether the block cache has the block as it last ran; a forward with guesses does not write it.
    """

    answer: Answer
    policy: Policy
    generator: torch.Generator | None
    cache_row: int
    waiting: Forward | None = None
    num_prefilled: int = 0
    kept: range = range(0)
    kept_predictions: tuple[list[int], list[float]] = ([], [])
    kept_logits: Tensor | None = None
    times_stored: dict[tuple[range, str, int], Counter[int]] = field(default_factory=dict)
    guesses: list[RunGuess] = field(default_factory=list)
    is_block_cached: bool = True

    def pending(self) -> Forward:
        """The forward that the policy waits for, which must exist."""
        assert self.waiting is not None, "a sequence whose answer is complete is in no group"
        return self.waiting

    def reread(self, positions: range) -> tuple[list[int], list[float]]:
        """Tokens and confidences that an earlier step kept for these positions."""
        tokens, confidences = self.kept_predictions
        picked = slice_of(positions, self.kept)
        return tokens[picked], confidences[picked]

    def reread_logits(self, positions: range) -> Tensor:
        """(positions, V) of the logits that an earlier step kept."""
        assert self.kept_logits is not None, "`check` compared the step with what is kept"
        return self.kept_logits[slice_of(positions, self.kept)]

    def run_guess(self, forward: Forward, length: int) -> RunGuess | None:
        """The guess that ran exactly this forward: the same tokens behind the same prefix, of `length` positions."""
        if forward.offset or forward.reuse is not None or forward.measure:
            return None
        for guess in self.guesses:
            held, wanted = guess.forward.held, forward.held
            if (
                (guess.forward.kind, guess.start, guess.forward.token_ids) == (forward.kind, length, forward.token_ids)
                and (held.start <= wanted.start and wanted.stop <= held.stop)
                and guess.before in (None, self.answer.tokens[length - len(forward.token_ids) : length])
            ):
                return guess
        return None

    def keep(self, guess: RunGuess) -> None:
        """Let later steps read the guess's predictions, as after a forward."""
        self.kept, self.kept_predictions, self.kept_logits = guess.forward.held, guess.predictions, guess.logits

    def forget_block(self) -> None:
        """Forget what was stored for the current block, which is finished."""
        self.kept, self.times_stored, self.is_block_cached = range(0), {}, True

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
        held = self.kept if item.kind == "reused" else item.held
        if item.wanted and not (held.start <= item.wanted.start and item.wanted.stop <= held.stop):
            raise ValueError(f"positions {item.wanted} are wanted, but only {held} are kept")
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
            whole = state.kind in GUESSED_KINDS and state.offset == 0 and len(state.token_ids) == size
            if not whole or state.reuse is not None or state.measure or (number and state.guesses):
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


def slice_of(positions: range, held: range) -> slice:
    """The slice that selects `positions` from a list over the positions `held`."""
    return slice(positions.start - held.start, positions.stop - held.start)


def _block_rows(forward: Forward) -> range:
    return range(forward.offset, forward.offset + len(forward.token_ids))
