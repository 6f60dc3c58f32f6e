"""One forward of block rows as tensors: packed on the host, copied to the device at once, unpacked there.

Tensor axes: see fast_dllm.network.model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.network.cache import Attend, CandidatePlaces, KVCache

# Numbers before the token ids: cache row, first position, number of keys, scratch slot, continued row, first block row.
NUM_FIXED = 6


@dataclass(frozen=True)
class Candidate:
    """One of several states of a sequence's block that run in one forward and do not see each other.

    slot: of the cache's scratch room, where its keys and values are written. continues: None for a state of the current
    block; for one of the next block, the index, in this forward, of the candidate that stands before it.
    """

    slot: int
    continues: int | None = None


@dataclass(frozen=True)
class BlockRows:
    """Rows of the current blocks of B sequences, run in one forward. They see the committed prefix and the whole block.

    cache_rows (B,): the sequences' rows in the cache. token_ids (B, T): the tokens at block rows
    [offsets[b], offsets[b] + T). read (B, R): which of the T rows' logits are computed. candidates (B,): where they
    are given, cache rows may be repeated, T is a whole block, and nothing is written but scratch room: what becomes
    prefix is copied by `Executor.commit`.
    """

    cache_rows: Sequence[int]
    token_ids: Sequence[Sequence[int]]
    offsets: Sequence[int]
    read: Sequence[Sequence[int]]
    candidates: Sequence[Candidate] | None = None

    def blocks_before(self, index: int) -> int:
        """How many uncommitted blocks are between this row's prefix and its block: 0 or 1."""
        return int(self.candidates is not None and self.candidates[index].continues is not None)

    def num_keys(self, cache: KVCache) -> list[int]:
        """(B,) The positions that each sequence sees: its prefix and its block."""
        return [
            cache.lengths[cache_row] + (1 + self.blocks_before(index)) * cache.block_size
            for index, cache_row in enumerate(self.cache_rows)
        ]


@dataclass(frozen=True)
class BlockShape:
    """What is fixed in a forward of block rows.

    Two forwards of one shape and batch size are the same operations on other numbers, so that a CUDA graph can repeat
    them.

    width: T, the rows of each sequence. num_keys: how many positions of the cache are read. is_masked: whether some of
    them are beyond a sequence's own end. first_rows: the sequences are those of the cache's first rows, in order.
    has_candidates: the rows are candidates; has_next_blocks: some of them continue another one.
    """

    width: int
    num_keys: int
    is_masked: bool
    first_rows: bool
    has_candidates: bool = False
    has_next_blocks: bool = False


@dataclass(frozen=True)
class BlockInputs:
    """The tensors of one forward of block rows.

    ids (B, T) token ids; cache_rows (B, 1); block_rows (B, T), the rows' places within their block; read (B, R): which
    of the T rows are put through the head.
    """

    ids: Tensor
    attend: Attend
    cache_rows: Tensor
    block_rows: Tensor
    read: Tensor


def pack_block(cache: KVCache, block: BlockRows) -> BlockInputs:
    """Make the tensors of one forward of block rows, with one host-to-device copy."""
    numbers, shape = pack_numbers(cache, block)
    return unpack(cache, numbers.to(cache.keys.device, non_blocking=True), shape)


def pack_numbers(cache: KVCache, block: BlockRows, num_keys: int | None = None) -> tuple[Tensor, BlockShape]:
    """All numbers that differ from forward to forward, (B, NUM_FIXED + T + R) on the CPU, and the forward's shape.

    num_keys: how many positions of the cache are read (default: as many as the longest sequence has).
    """
    ends, candidates = block.num_keys(cache), block.candidates
    slots, continued = [0] * len(ends), list(range(len(ends)))
    if candidates is not None:
        cache.open_scratch()
        slots = [each.slot for each in candidates]
        continued = [index if each.continues is None else each.continues for index, each in enumerate(candidates)]
    numbers = torch.tensor(
        [[cache_row, end - cache.block_size + offset, end, slot, continues, offset, *ids, *read]
         for cache_row, end, slot, continues, offset, ids, read
         in zip(block.cache_rows, ends, slots, continued, block.offsets, block.token_ids, block.read, strict=True)]
    )  # fmt: skip
    is_masked = num_keys is not None or min(ends) != max(ends)
    first_rows = candidates is None and list(block.cache_rows) == list(range(len(block.cache_rows)))
    shape = BlockShape(
        len(block.token_ids[0]),
        num_keys or max(ends),
        is_masked,
        first_rows,
        candidates is not None,
        continued != list(range(len(ends))),
    )
    return numbers, shape


def unpack(cache: KVCache, numbers: Tensor, shape: BlockShape) -> BlockInputs:
    """Make the tensors that the layers read from the numbers of `pack_numbers`. Reads no value on the host."""
    fixed = numbers[:, :NUM_FIXED, None].unbind(1)  # (B, 1) each
    cache_rows, first_position, num_keys, slots, continued, first_row = fixed
    steps = torch.arange(shape.width, device=numbers.device)
    positions = first_position + steps  # (B, T)
    mask = None
    if shape.is_masked:
        mask = (torch.arange(shape.num_keys, device=numbers.device) < num_keys)[:, None, None]  # (B, 1, 1, S)
        if mask.is_cuda:  # CUDA's attention would convert a bool mask to this form in every layer
            dtype = cache.keys.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    attend = Attend(
        cache.cos[positions].unsqueeze(2),
        cache.sin[positions].unsqueeze(2),
        mask,
        cache,
        (cache_rows * cache.max_length + positions).flatten(),
        None if shape.first_rows else cache_rows[:, 0],
        shape.num_keys,
        _candidate_places(cache, positions, slots, continued, shape) if shape.has_candidates else None,
    )
    ids, read = numbers[:, NUM_FIXED : NUM_FIXED + shape.width], numbers[:, NUM_FIXED + shape.width :]
    return BlockInputs(ids, attend, cache_rows, first_row + steps, read)


def _candidate_places(
    cache: KVCache, positions: Tensor, slots: Tensor, continued: Tensor, shape: BlockShape
) -> CandidatePlaces:
    """Where the new keys and values of candidates go. positions (B, T) absolute; slots, continued (B, 1)."""
    size = cache.block_size
    starts = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
    places = starts * shape.num_keys + positions
    if not shape.has_next_blocks:
        return CandidatePlaces(slots[:, 0], places.flatten(), None)
    # A row that continues no other one writes its own block a second time, to the same places.
    previous_places = places - size * (continued != starts)
    rows = torch.arange(size, device=positions.device)
    sources = torch.cat((starts * size + rows, continued * size + rows))
    return CandidatePlaces(slots[:, 0], torch.cat((places, previous_places)).flatten(), sources.flatten())
