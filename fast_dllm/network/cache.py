"""The cache of keys and values, and the part of it that one forward may read.

Tensor axes: see fast_dllm.network.model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.decoding import MOST_STATES
from fast_dllm.network.config import FastDLLMConfig


class KVCache:
    """Keys and values of every layer in one preallocated buffer, written in place.

    keys, values: (num_layers, B, max_length, K, D). Row b holds `lengths[b]` committed positions (its prefix cache);
    the block being denoised follows them (its block cache), at its absolute positions. Later positions are not read.

    scratch_keys, scratch_values: (num_layers, B * MOST_STATES, block_size, K, D), None until `open_scratch`: the blocks
    of candidates, which are not yet part of a sequence. Sequence b has the slots from b * MOST_STATES.
    """

    def __init__(self, config: FastDLLMConfig, batch_size: int, max_length: int, block_size: int, like: Tensor):
        shape = (config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size
        self.block_size = block_size
        positions = torch.arange(max_length, device=like.device)
        self.cos, self.sin = rope_tables(positions, config, like.dtype)  # (max_length, D)
        self.scratch_keys: Tensor | None = None
        self.scratch_values: Tensor | None = None

    def open_scratch(self) -> None:
        """Allocate the scratch room, if that has not been done."""
        if self.scratch_keys is None:
            num_layers, batch_size, _, *sizes = self.keys.shape
            self.scratch_keys = self.keys.new_zeros(num_layers, batch_size * MOST_STATES, self.block_size, *sizes)
            self.scratch_values = torch.zeros_like(self.scratch_keys)

    def copy_slot_to_block(self, cache_row: int, slot: int) -> None:
        """Copy the block in a slot to the sequence's current block. Does not change `lengths`."""
        assert self.scratch_keys is not None, "a forward has written this slot"
        assert self.scratch_values is not None, "both were made together"
        block = slice(self.lengths[cache_row], self.lengths[cache_row] + self.block_size)
        self.keys[:, cache_row, block] = self.scratch_keys[:, slot]
        self.values[:, cache_row, block] = self.scratch_values[:, slot]

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class CandidatePlaces:
    """Indices of the places that candidates' new keys and values are written to.

    They go to scratch room, and to each candidate's copy of its prefix.

    slots (B,): of the scratch room. destinations (N,): index of a position in the copies (B * S). sources (N,): which
    of the new rows (B * T) goes there; None: all of them, in order.
    """

    slots: Tensor
    destinations: Tensor
    sources: Tensor | None


@dataclass(frozen=True)
class Attend:
    """What all layers of one forward share: the positions of its rows, and the keys that they may attend.

    cos, sin: (B, T, 1, D). mask: None (every key) or bool, True = may attend, broadcast to (B, K, G * T, S).
    Without a cache the keys are the rows themselves. With one, new keys are written to `flat_positions` (B * T,), which
    index the cache as (cache rows * max_length); `cache_rows` (B,) (None: the first B) are read up to `num_keys`.
    With `candidates`, several of the B may have one cache row: each reads its own copy, and the cache is not written.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    cache: KVCache | None = None
    flat_positions: Tensor | None = None
    cache_rows: Tensor | None = None
    num_keys: int = 0
    candidates: CandidatePlaces | None = None

    def select(self, picked: Tensor, cache_rows: Tensor) -> Attend:
        """A copy for the sequences `picked` (P,) of the batch only. cache_rows (P,): their cache rows."""
        assert self.candidates is None, "candidates run through all layers together"
        batch_size = self.cos.shape[0]
        return Attend(
            self.cos[picked],
            self.sin[picked],
            self.mask if self.mask is None else self.mask[picked],
            self.cache,
            None if self.flat_positions is None else self.flat_positions.view(batch_size, -1)[picked].flatten(),
            cache_rows,
            self.num_keys,
        )

    def keys_and_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's new keys and values (B, T, K, D); return all that may be read, each (B, S, K, D)."""
        if self.cache is None:
            return keys, values
        if self.candidates is not None:
            return self._of_candidates(self.candidates, self.cache, layer, keys, values)
        assert self.flat_positions is not None, "a forward over a cache says where its rows are written"
        readable = []
        for buffer, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self.flat_positions, new.flatten(0, 1))
            visible = buffer.narrow(1, 0, self.num_keys)
            if self.cache_rows is None:
                readable.append(visible.narrow(0, 0, new.shape[0]))
            else:
                readable.append(visible.index_select(0, self.cache_rows))
        return readable[0], readable[1]

    def _of_candidates(
        self, places: CandidatePlaces, cache: KVCache, layer: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`keys_and_values` of candidates: each reads a separate copy of the prefix, followed by its block."""
        assert self.cache_rows is not None, "several candidates have one cache row"
        assert cache.scratch_keys is not None, "a forward with candidates opens the scratch room"
        assert cache.scratch_values is not None, "both were made together"
        readable = []
        for buffer, scratch, new in (
            (cache.keys[layer], cache.scratch_keys[layer], keys),
            (cache.values[layer], cache.scratch_values[layer], values),
        ):
            scratch.index_copy_(0, places.slots, new)
            copies = buffer.narrow(1, 0, self.num_keys).index_select(0, self.cache_rows)  # (B, S, K, D)
            rows = new.flatten(0, 1)  # (B * T, K, D)
            if places.sources is not None:
                rows = rows.index_select(0, places.sources)
            copies.view(-1, *copies.shape[2:]).index_copy_(0, places.destinations, rows)
            readable.append(copies)
        return readable[0], readable[1]


def rope_tables(positions: Tensor, config: FastDLLMConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the rotary embedding, (*positions, D), computed in float32.

    Rotate-half RoPE is x * cos + roll(x, D / 2) * sin with the sine's first half negated.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / config.rope_theta**half)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def block_causal_mask(num_queries: int, num_keys: int, block_size: int, device: torch.device) -> Tensor:
    """(T, S) bool, True = may attend, for the last `num_queries` of `num_keys` consecutive positions from 0."""
    blocks = torch.arange(num_keys, device=device) // block_size
    return blocks[num_keys - num_queries :, None] >= blocks[None, :]


def mask_for_heads(mask: Tensor, config: FastDLLMConfig) -> Tensor:
    """(T, S) or (B, T, S) -> (B or 1, 1, G * T, S): one copy of the mask for each query head of a key head."""
    groups = config.num_attention_heads // config.num_key_value_heads
    mask = mask if mask.dim() == 3 else mask[None]
    return mask.repeat(1, groups, 1)[:, None]
