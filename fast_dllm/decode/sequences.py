"""A prompt that is being answered: its policy, its row of the cache, and what its later steps may read again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fast_dllm.decoding import FORWARD_KINDS, Answer, Forward, Policy
from fast_dllm.sampling import MEASURES


@dataclass
class SequenceState:
    """One sequence of a run.

    waiting: the forward that its policy asked for; None once the answer is complete. num_prefilled: tokens of a prefill
    that have run block by block beside other sequences. kept: the positions of the block that can be read again;
    kept_predictions: what they predict (tokens, confidences), where tokens are not drawn; kept_logits (positions, V):
    where they are, since each reading draws anew. times_stored: by `Reuse.store_key`, how often each row of this block
    was stored.
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

    def pending(self) -> Forward:
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

    def forget_block(self) -> None:
        """The block is finished: nothing of it can be read again."""
        self.kept, self.times_stored = range(0), {}

    def count_stored(self, forward: Forward) -> None:
        """A forward has written its rows to its store."""
        assert forward.reuse is not None, "a forward that stores says where"
        self.times_stored.setdefault(forward.reuse.store_key, Counter()).update(_block_rows(forward))

    def check(self, item: object) -> Forward:
        """What the policy yielded, if it is a forward that can be run. Raises TypeError, ValueError, before the policy
        could read numbers of something else."""
        if not isinstance(item, Forward):
            raise TypeError(f"decode_one yielded {item!r}; it yields Forward and DenoisingEvent")
        if item.kind not in FORWARD_KINDS:
            raise ValueError(f"unknown kind of forward {item.kind!r}; there are: {', '.join(FORWARD_KINDS)}")
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
        return item

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
    """The places of `positions` in a list over the positions `held`."""
    return slice(positions.start - held.start, positions.stop - held.start)


def _block_rows(forward: Forward) -> range:
    return range(forward.offset, forward.offset + len(forward.token_ids))
