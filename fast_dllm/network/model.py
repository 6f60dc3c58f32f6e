"""The Fast-dLLM v2 network (arXiv 2509.26328): a Qwen2.5 decoder with block-causal attention and a static cache.

Tensor axes
    B batch, T query rows, S keys, H query heads, K key/value heads, G = H // K, D head size, C hidden, V vocabulary.

Two conventions set this network apart from a causal one:
    block-causal attention  a query in block i attends every key whose block is <= i: both ways inside a block of
                            `bd_size` absolute positions, causally between blocks.
    token shift             the logits at position p predict the token at p + 1, so the prediction for a masked
                            position p is read at p - 1.

layers.py has the layers. Decoding runs the network over a cache, through an executor (executor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from torch import Tensor, nn

from fast_dllm.errors import UsageError
from fast_dllm.network.cache import Attend, KVCache, block_causal_mask, mask_for_heads, rope_tables
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.executor import Execution
from fast_dllm.network.layers import MLP, Attention, DecoderLayer, Embedding, Linear, RMSNorm


class FastDLLMModel(nn.Module):
    """The network without its language-model head."""

    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, attend: Attend) -> Tensor:
        """Token ids (B, T) -> final hidden states (B, T, C)."""
        return self.norm(self.run_layers(self.embed(input_ids), attend, range(len(self.layers))))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> hidden rows (B, T, C) that enter the first layer, in `hidden_dtype`."""
        return self.embed_tokens(input_ids).to(self.hidden_dtype)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """dtype of the hidden rows between layers: the weights' dtype, but float32 for float16 weights.

        A hidden row is the sum of what all layers before have added. A few channels of Qwen2-like models reach 2e4 and
        more, and float16 ends at 65504. Projections, keys and values stay in float16.
        """
        dtype = self.embed_tokens.weight.dtype
        return torch.float32 if dtype == torch.float16 else dtype

    def hidden_like(self) -> Tensor:
        """An empty tensor (0, C) with the dtype and device of hidden rows."""
        weight = self.embed_tokens.weight
        return weight.new_empty((0, weight.shape[1]), dtype=self.hidden_dtype)

    def run_layers(self, x: Tensor, attend: Attend, layers: range) -> Tensor:
        """Hidden rows (B, T, C) through some of the layers."""
        for index in layers:
            x = self.layers[index](x, attend)
        return x


class Logits(NamedTuple):
    """The result of a forward without a cache: logits (B, R, V)."""

    logits: Tensor


class FastDLLMForCausalLM(nn.Module):
    """The network with its language-model head.

    A new network has random weights or, with `randomise` False, uninitialised ones. It is not a transformers model,
    because that base class takes four seconds to import.

    execution: how its forwards are run; None: module by module.
    """

    def __init__(self, config: FastDLLMConfig, *, randomise: bool = True):
        super().__init__()
        self.config = config
        self.execution: Execution | None = None
        self.model = FastDLLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if randomise:
            self.apply(self._randomise)

    def _randomise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def fuse(self) -> FastDLLMForCausalLM:
        """Let each layer compute q, k and v as one product, and gate and up as one. Returns the model.

        Needs additional memory for one layer only. Values stay equal within float32's rounding.
        """
        for module in self._fusible():
            module.fuse()
        return self

    def _fusible(self) -> Iterator[Attention | MLP]:
        return (module for module in self.modules() if isinstance(module, (Attention, MLP)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastDLLMForCausalLM:
        """Move or convert all weights, as nn.Module does. Fused weights are made again, and recordings are dropped."""
        was_fused = any(module.fused for module in self._fusible())
        for module in self._fusible():
            module.fused = None
        super()._apply(fn, recurse)
        if self.execution is not None:
            self.execution.forget()
        return self.fuse() if was_fused else self

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def save_pretrained(self, folder: str | Path, max_shard_size: str | int = "50GB") -> None:
        """Write config.json and the weights as `load_model` reads them, in shards of at most `max_shard_size`."""
        self.config.architectures = [FastDLLMForCausalLM.__name__]
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items() if name not in self.tied_names}
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)

    @property
    def tied_names(self) -> set[str]:
        """Names of tensors that a checkpoint may lack, because they are another tensor under a second name."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Logits:
        """Logits without a cache.

        input_ids (B, T); position_ids (B, T) or (T,), default 0..T-1; attention_mask (T, T) or (B, T, T) bool,
        True = may attend, default block-causal with blocks of `config.bd_size`; rows (B, R): those whose logits are
        wanted, default all. Returns logits (B, T or R, V).
        """
        B, T = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = torch.arange(T, device=device)
        if attention_mask is None:
            attention_mask = block_causal_mask(T, T, self.config.bd_size, device)
        mask = mask_for_heads(attention_mask, self.config)
        cos, sin = rope_tables(position_ids, self.config, self.dtype)
        hidden = self.model(input_ids, Attend(cos.unsqueeze(-2), sin.unsqueeze(-2), mask))
        if rows is not None:
            hidden = hidden[torch.arange(B, device=device)[:, None], rows]
        return Logits(self.lm_head(hidden))

    def new_cache(self, batch_size: int, max_length: int, block_size: int) -> KVCache:
        """An empty cache for `batch_size` sequences of at most `max_length` positions."""
        if max_length > self.config.max_position_embeddings:
            raise UsageError(
                f"prompt and answer need {max_length} positions, the model has {self.config.max_position_embeddings}"
            )
        return KVCache(self.config, batch_size, max_length, block_size, like=self.lm_head.weight)

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer, typed as such, because ModuleList does not know the type of its modules."""
        layer = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer
