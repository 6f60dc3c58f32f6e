"""The Fast-dLLM v2 network (arXiv 2509.26328): a Qwen2.5 decoder with block-causal attention and a static cache.

Tensor axes
    B batch, T query rows, S keys, H query heads, K key/value heads, G = H // K, D head size, C hidden, V vocabulary.

Two conventions set this network apart from a causal one:
    block-causal attention  a query in block i attends every key whose block is <= i: both ways inside a block of
                            `bd_size` absolute positions, causally between blocks.
    token shift             the logits at position p predict the token at p + 1, so the prediction for a masked
                            position p is read at p - 1.

Decoding runs it over a cache: fast_dllm.network.executor has the moves, and eager.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor, nn

from fast_dllm.errors import UsageError
from fast_dllm.network.cache import Attend, KVCache, block_causal_mask, mask_for_heads, rope_tables
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.executor import Execution
from fast_dllm.network.kernels import gate, rms_norm, rotate


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Does nothing: the network sets random values itself (`_randomise`), and a checkpoint needs none."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Does nothing, as above."""


class Fused:
    """Several linear layers of one input as one matrix product.

    Their weights become views of the fused weight: there is no second copy, and the layers keep their names and can
    run by themselves. `fits` is False after one of them was moved or replaced, and where gradients are wanted.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        with torch.no_grad():
            self.weight = torch.cat([linear.weight for linear in linears])
            self.bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
            for linear, view in zip(linears, self.weight.split(self.sizes), strict=True):
                linear.weight.data = view
            if self.bias is not None:
                for linear, view in zip(linears, self.bias.split(self.sizes), strict=True):
                    linear.bias.data = view
        self.addresses = self._addresses()

    def _addresses(self) -> list[int]:
        tensors = [linear.weight for linear in self.linears]
        if self.bias is not None:
            tensors += [linear.bias for linear in self.linears]
        return [tensor.data_ptr() for tensor in tensors]

    def fits(self) -> bool:
        return not torch.is_grad_enabled() and self._addresses() == self.addresses

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis: see kernels.rms_norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and biases on q, k and v, as in Qwen2.5."""

    def __init__(self, config: FastDLLMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, self.num_heads * self.head_dim, bias=True)
        self.k_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.v_proj = Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.fused: Fused | None = None

    def fuse(self) -> None:
        self.fused = Fused((self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Normed hidden rows (B, T, C) -> what attention adds to them (B, T, C)."""
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        if self.fused is not None and self.fused.fits():
            queries_keys, values = self.fused(x).view(B, T, H + 2 * K, D).split((H + K, K), dim=2)
        else:
            queries_keys = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1).view(B, T, H + K, D)
            values = self.v_proj(x).view(B, T, K, D)
        queries, keys = rotate(queries_keys, attend.cos, attend.sin).split((H, K), dim=2)
        keys, values = attend.keys_and_values(self.layer, keys, values)
        # The G query heads that share a key head become more query rows, so keys and values are never repeated.
        queries = queries.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G * T, D)
        out = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attend.mask)
        out = out.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)
        return self.o_proj(out)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused: Fused | None = None

    def fuse(self) -> None:
        self.fused = Fused((self.gate_proj, self.up_proj))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None and self.fused.fits():
            gates, up = self.fused(x).chunk(2, dim=-1)
        else:
            gates, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate(gates, up))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: FastDLLMConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def mlp_share(self) -> float:
        """The share of the layer's weights that its MLP has."""
        of_mlp, of_layer = (sum(each.numel() for each in module.parameters()) for module in (self.mlp, self))
        return of_mlp / of_layer

    def attention(self, x: Tensor, attend: Attend) -> Tensor:
        """Hidden rows (B, T, C) with what the attention adds."""
        return x + self.self_attn(self.input_layernorm(x), attend)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.attention(x, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        """dtype of the hidden rows between layers, the sum of what all layers before have added.

        That of the weights, but float32 for float16 weights: a few channels of Qwen2-like models reach 2e4 and more,
        and float16 ends at 65504. Projections and keys and values stay in float16.
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

    A new one has random weights or, with `randomise` False, uninitialised ones. It is not a transformers model, whose
    base class takes four seconds to import.
    """

    def __init__(self, config: FastDLLMConfig, *, randomise: bool = True):
        super().__init__()
        self.config = config
        self.execution: Execution | None = None  # how its forwards are run; None: module by module
        self.build(config)
        if randomise:
            self.apply(self._randomise)

    def build(self, config: FastDLLMConfig) -> None:
        """Make the modules. The head shares the embedding's weight where the configuration ties them."""
        self.model = FastDLLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _randomise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def fuse(self) -> FastDLLMForCausalLM:
        """Let each layer compute q, k and v as one product, and gate and up as one. Takes no additional memory but for
        one layer at a time. Values stay equal within float32's rounding."""
        for module in self._fusible():
            module.fuse()
        return self

    def _fusible(self) -> Iterator[Attention | MLP]:
        return (module for module in self.modules() if isinstance(module, (Attention, MLP)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastDLLMForCausalLM:
        """As nn.Module's, for `.to` and the like. What depends on the weights' addresses is made anew."""
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
        """Tensors that a checkpoint need not hold."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_size: int | None = None,
        rows: Tensor | None = None,
    ) -> Logits:
        """Logits without a cache.

        input_ids (B, T); position_ids (B, T) or (T,), default 0..T-1; attention_mask (T, T) or (B, T, T) bool,
        True = may attend, default block-causal with blocks of `block_size` (default `config.bd_size`); `rows` (B, R)
        picks the rows whose logits are wanted, default all. Returns logits (B, T or R, V).
        """
        B, T = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = torch.arange(T, device=device)
        if attention_mask is None:
            attention_mask = block_causal_mask(T, T, block_size or self.config.bd_size, device)
        mask = mask_for_heads(attention_mask, self.config)
        cos, sin = rope_tables(position_ids, self.config, self.dtype)
        hidden = self.model(input_ids, Attend(cos.unsqueeze(-2), sin.unsqueeze(-2), mask))
        if rows is not None:
            hidden = hidden[torch.arange(B, device=device)[:, None], rows]
        return Logits(self.lm_head(hidden))

    def new_cache(self, batch_size: int, max_length: int, block_size: int | None = None) -> KVCache:
        """An empty cache for `batch_size` sequences of at most `max_length` positions."""
        block_size = block_size or self.config.bd_size
        if max_length > self.config.max_position_embeddings:
            raise UsageError(
                f"prompt and answer need {max_length} positions, the model has {self.config.max_position_embeddings}"
            )
        return KVCache(self.config, batch_size, max_length, block_size, like=self.lm_head.weight)

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer, with its type (ModuleList does not say what it holds)."""
        layer = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer
