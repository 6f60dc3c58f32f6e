"""The layers of the network, as modules with the checkpoint's names: linear, norm, attention, MLP, decoder layer.

Tensor axes: see fast_dllm.network.model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor, nn

from fast_dllm.network.cache import Attend
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.kernels import gate, rms_norm, rotate


class Linear(nn.Linear):
    """torch's linear layer, whose construction leaves the weights uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing: a checkpoint fills the weights, or `FastDLLMForCausalLM` sets random ones."""


class Embedding(nn.Embedding):
    """torch's embedding, whose construction leaves the weights uninitialised."""

    def reset_parameters(self) -> None:
        """Do nothing, as in `Linear`."""


class Fused:
    """Several linear layers of one input as one matrix product.

    Their weights become views of the fused weight, so that no second copy exists. The layers keep their names and can
    still run one by one.
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
        """Memory addresses of all weights and biases."""
        tensors = [linear.weight for linear in self.linears]
        if self.bias is not None:
            tensors += [linear.bias for linear in self.linears]
        return [tensor.data_ptr() for tensor in tensors]

    def fits(self) -> bool:
        """Whether the fused product may be used: no weight was moved or replaced, and no gradients are computed."""
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
        """Compute q, k and v as one matrix product from now on."""
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
    """The feed-forward part of a layer, with a SwiGLU gate: (..., C) -> (..., C)."""

    def __init__(self, config: FastDLLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused: Fused | None = None

    def fuse(self) -> None:
        """Compute gate and up as one matrix product from now on."""
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
        mlp_weights, layer_weights = (sum(p.numel() for p in module.parameters()) for module in (self.mlp, self))
        return mlp_weights / layer_weights

    def attention(self, x: Tensor, attend: Attend) -> Tensor:
        """Hidden rows (B, T, C) plus the output of the attention."""
        return x + self.self_attn(self.input_layernorm(x), attend)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.attention(x, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
