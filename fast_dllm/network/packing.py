"""One forward of block rows as tensors: packed on the host, copied to the device at once, unpacked there.

Tensor axes: see fast_dllm.network.model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.network.cache import Attend, KVCache

NUM_FIXED = 4  # numbers of a sequence before its token ids: cache row, first position, number of keys, first block row


@dataclass(frozen=True)
class BlockRows:
    """Rows of the current blocks of B sequences, run in one forward. They see the committed prefix and the whole block.

    cache_rows (B,): the sequences' rows in the cache. token_ids (B, T): the tokens at block rows
    [offsets[b], offsets[b] + T). read (B, R): which of the T rows' logits are computed.
    """

    cache_rows: Sequence[int]
    token_ids: Sequence[Sequence[int]]
    offsets: Sequence[int]
    read: Sequence[Sequence[int]]


@dataclass(frozen=True)
class BlockShape:
    """The part of a forward of block rows that is no tensor. Two forwards of one shape and batch size are the same work
    on other numbers, so that a CUDA graph can repeat it.

    width: T, the rows of each sequence. num_keys: how many positions of the cache are read. is_masked: whether some of
    them are beyond a sequence's own end. first_rows: the sequences are those of the cache's first rows, in order.
    """

    width: int
    num_keys: int
    is_masked: bool
    first_rows: bool


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
    """The tensors of one forward of block rows, from Python numbers in one host-to-device copy."""
    numbers, shape = pack_numbers(cache, block)
    return unpack(cache, numbers.to(cache.keys.device, non_blocking=True), shape)


def pack_numbers(cache: KVCache, block: BlockRows, num_keys: int | None = None) -> tuple[Tensor, BlockShape]:
    """All numbers that differ from forward to forward, (B, 4 + T + R) on the CPU, and the forward's shape.

    num_keys: how many positions of the cache are read (default: as many as the longest sequence has).
    """
    starts = [cache.lengths[cache_row] for cache_row in block.cache_rows]
    numbers = torch.tensor(
        [[cache_row, start + offset, start + cache.block_size, offset, *ids, *read]
         for cache_row, start, offset, ids, read
         in zip(block.cache_rows, starts, block.offsets, block.token_ids, block.read, strict=True)]
    )  # fmt: skip
    longest = max(starts) + cache.block_size
    is_masked = num_keys is not None or min(starts) != max(starts)
    first_rows = list(block.cache_rows) == list(range(len(block.cache_rows)))
    return numbers, BlockShape(len(block.token_ids[0]), num_keys or longest, is_masked, first_rows)


def unpack(cache: KVCache, numbers: Tensor, shape: BlockShape) -> BlockInputs:
    """The numbers of `pack_numbers`, on the device, as what the layers read. It reads no value on the host."""
    cache_rows, first_position, num_keys, first_row = numbers[:, :NUM_FIXED, None].unbind(1)  # (B, 1) each
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
    )
    ids, read = numbers[:, NUM_FIXED : NUM_FIXED + shape.width], numbers[:, NUM_FIXED + shape.width :]
    return BlockInputs(ids, attend, cache_rows, first_row + steps, read)
