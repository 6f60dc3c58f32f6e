"""What goes into a group's forward: its batch of states, their rows of tokens, and the choice between layers and store.

A forward runs one state of each sequence or, if a policy guesses, several states of a sequence side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.decode.sequences import SequenceState
from fast_dllm.decoding import Forward
from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.packing import BlockRows, Candidate


@dataclass(frozen=True)
class BatchEntry:
    """One state of a sequence that a forward runs.

    forward: what the policy asked for or guessed. number: 0 for what it asked for, n for its n-th guess.
    """

    sequence: SequenceState
    forward: Forward
    number: int

    @property
    def is_guess(self) -> bool:
        return self.number > 0


Batch = Sequence[BatchEntry]  # B entries; the guesses of a forward follow it


def batch_of(sequences: Sequence[SequenceState], forwards: Sequence[Forward]) -> Batch:
    """All states of these forwards, one forward for each sequence."""
    return [
        BatchEntry(sequence, state, number)
        for sequence, forward in zip(sequences, forwards, strict=True)
        for number, state in enumerate(forward.states)
    ]


def block_rows(batch: Batch) -> BlockRows:
    """The batch as rows of blocks. All entries are candidates if one of them is a guess."""
    forwards = [entry.forward for entry in batch]
    candidates = None
    if any(entry.is_guess for entry in batch):
        candidates = [
            Candidate(entry.sequence.slot(entry.number), _continued_entry(index, entry))
            for index, entry in enumerate(batch)
        ]
    return BlockRows(
        [entry.sequence.cache_row for entry in batch],
        [forward.token_ids for forward in forwards],
        [forward.offset for forward in forwards],
        _pad_to_longest([forward.rows_of(forward.predicted_positions) for forward in forwards]),
        candidates,
    )


def _continued_entry(index: int, entry: BatchEntry) -> int | None:
    """The index in the batch of the state that stands before a guess for the next block; None for other states."""
    continues = entry.forward.continues
    return None if continues is None else index - entry.number + continues


def _pad_to_longest(rows: list[list[int]]) -> list[list[int]]:
    """Lists of one length: the last number of each (0 of an empty one) is repeated."""
    longest = max(map(len, rows))
    return [each + [each[-1] if each else 0] * (longest - len(each)) for each in rows]


# -- layers or store ---------------------------------------------------------------------------------------------------
def set_extrapolation(store: LayerStore, batch: Batch) -> None:
    """Write to the store how far each sequence extrapolates beyond its last stored values."""
    cache_rows = [entry.sequence.cache_row for entry in batch]
    values = [entry.forward.reuse.ahead if entry.forward.reuse else 0.0 for entry in batch]
    ahead = torch.tensor(values, dtype=store.ahead.dtype).to(store.ahead.device, non_blocking=True)
    store.ahead[index_of(cache_rows, store.ahead)] = ahead


def choose_store(
    store: LayerStore, batch: Batch, entering: Tensor, cache_rows: Tensor, block_rows: Tensor
) -> list[bool]:
    """For each sequence that asks for reuse: whether the store replaces its layers. Tensors: see executor.Choice."""
    reuses = [entry.forward.reuse for entry in batch if entry.forward.reuse is not None]
    if not any(reuse.decide for reuse in reuses):
        return [reuse.read for reuse in reuses]
    drifts = store.drift(entering, cache_rows, block_rows, _drift_rows(batch, entering.device))
    return [
        reuse.decide(drift) if reuse.decide else reuse.read
        for reuse, drift in zip(reuses, drifts.tolist(), strict=True)  # the decision's own transfer
    ]


def _drift_rows(batch: Batch, device: torch.device) -> Tensor:
    """(B, R) rows of the window that the wanted predictions are read at: the drift is measured over these."""
    forwards = [entry.forward for entry in batch]
    counts = {len(forward.wanted) for forward in forwards}
    if len(counts) > 1:
        raise ValueError(f"forwards that decide together want equally many positions, not {sorted(counts)}")
    rows = [forward.rows_of(forward.wanted) for forward in forwards]
    return torch.tensor(rows).to(device, non_blocking=True)


def index_of(rows: list[int], like: Tensor) -> Tensor | slice:
    """An index of rows of `like`: a slice, which copies nothing, where it is all of them."""
    if rows == list(range(len(like))):
        return slice(None)
    return torch.tensor(rows).to(like.device, non_blocking=True)
