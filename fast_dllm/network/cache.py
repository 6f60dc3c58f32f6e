"""Where keys and values of a sequence stay between forwards, and what one forward may see of them.

Tensor axes: see fast_dllm.network.model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.network.config import FastDLLMConfig


class KVCache:
    """Keys and values of every layer in one preallocated buffer, written in place.

    keys, values: (num_layers, B, max_length, K, D). Row b holds `lengths[b]` committed positions (its prefix cache);
    the block being denoised sits right behind them (its block cache), at its absolute positions. What lies further
    back is unread.
    """

    def __init__(self, config: FastDLLMConfig, batch_size: int, max_length: int, block_size: int, like: Tensor):
        shape = (config.num_hidden_layers, batch_size, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size
        self.block_size = block_size
        positions = torch.arange(max_length, device=like.device)
        self.cos, self.sin = rope_tables(positions, config, like.dtype)  # (max_length, D)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class Attend:
    """What every layer of one forward shares: where its rows stand and what they may see.

    cos, sin: (B, T, 1, D). mask: None (every key) or bool, True = may attend, broadcast to (B, K, G * T, S).
    Without a cache the keys are the rows themselves; with one, rows are written to `slots` (B * T,), flat indices
    into (cache rows * max_length), and cache rows `rows` (None = the first B) are read up to `num_keys`.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    cache: KVCache | None = None
    slots: Tensor | None = None
    rows: Tensor | None = None
    num_keys: int = 0

    def of(self, picked: Tensor, cache_rows: Tensor) -> Attend:
        """The same for the sequences `picked` (P,) of the batch, whose cache rows are `cache_rows` (P,)."""
        batch_size = self.cos.shape[0]
        return Attend(
            self.cos[picked],
            self.sin[picked],
            self.mask if self.mask is None else self.mask[picked],
            self.cache,
            None if self.slots is None else self.slots.view(batch_size, -1)[picked].flatten(),
            cache_rows,
            self.num_keys,
        )

    def keys_and_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's new keys and values (B, T, K, D); return all that may be read, each (B, S, K, D)."""
        if self.cache is None:
            return keys, values
        assert self.slots is not None, "a forward over a cache says where its rows go"
        seen = []
        for buffer, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, self.slots, new.flatten(0, 1))
            held = buffer.narrow(1, 0, self.num_keys)
            seen.append(held.narrow(0, 0, new.shape[0]) if self.rows is None else held.index_select(0, self.rows))
        return seen[0], seen[1]


@dataclass(frozen=True)
class BlockShape:
    """What of one forward of block rows is no tensor. Two forwards of one shape and batch size are the same work on
    other numbers, which is what a CUDA graph can repeat.

    width: T, the rows of each sequence. num_keys: how many positions of the cache are read. is_masked: whether some of
    them are beyond a sequence's own end. first_rows: the sequences are those of the cache's first rows, in order.
    """

    width: int
    num_keys: int
    is_masked: bool
    first_rows: bool


@dataclass(frozen=True)
class BlockInputs:
    """The tensors of one forward of block rows: everything that `run_packed` reads, and no Python number of the step.

    ids (B, T) token ids; cache_rows (B, 1) and block_rows (B, T): where the rows stand; read (B, R): which rows of T
    are put through the head.
    """

    ids: Tensor
    attend: Attend
    cache_rows: Tensor
    block_rows: Tensor
    read: Tensor


# Who reads what is stored, decided in mid-forward: the hidden rows that enter the range (B, T, C), their cache rows
# (B, 1) and their rows of the block (B, T) -> a truth value for each sequence
Choice = Callable[[Tensor, Tensor, Tensor], Sequence[bool]]


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
