"""Block diffusion decoding as one would first write it, which `benchmarks.decode --baseline` measures the engine by.

The same algorithm for one sequence (k = 1), and nothing done to make it fast: keys and values are concatenated for
every forward, key heads repeated for their query heads, a mask built for every step, the head put on every row, and the
confidences of all of them read. It has the weights of a fast_dllm model and none of its code.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from fast_dllm.network.model import FastDLLMForCausalLM

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer, (1, heads, S, D)


class Straightforward:
    """One sequence. forwards: how many of each kind were run."""

    def __init__(self, model: FastDLLMForCausalLM):
        self.config = model.config
        self.weights = dict(model.named_parameters())
        self.head = model.lm_head.weight
        self.forwards: Counter[str] = Counter()

    # -- the network -------------------------------------------------------------------------------------------------
    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        weight = self.weights[f"{name}.weight"]
        return weight * wide.to(weight.dtype)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        size = x.shape[-1]
        powers = torch.arange(0, size, 2, device=x.device).float() / size
        angles = positions.float()[:, None] / self.config.rope_theta**powers
        cos, sin = (torch.cat((each, each), dim=-1).to(x.dtype) for each in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(self, ids: list[int], start: int, past: KeysAndValues, mask: Tensor) -> tuple[Tensor, KeysAndValues]:
        """Tokens from position `start` on, behind what is past; mask (T, S) bool. Logits (T, V), keys and values."""
        config, device = self.config, self.head.device
        positions = torch.arange(start, start + len(ids), device=device)
        x = F.embedding(torch.tensor([ids], device=device), self.weights["model.embed_tokens.weight"])
        if x.dtype == torch.float16:
            x = x.float()  # as the engine's model: the sum of the layers needs float32's range
        repeats = config.num_attention_heads // config.num_key_value_heads
        new: KeysAndValues = []
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(f"{name}.input_layernorm", x)
            queries, keys, values = (
                self._linear(f"{name}.self_attn.{kind}_proj", normed)
                .view(1, len(ids), -1, config.head_dim)
                .transpose(1, 2)
                for kind in "qkv"
            )
            queries, keys = self._rotated(queries, positions), self._rotated(keys, positions)
            new.append((keys, values))
            if past:
                keys = torch.cat((past[layer][0], keys), dim=2)
                values = torch.cat((past[layer][1], values), dim=2)
            keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
            out = F.scaled_dot_product_attention(queries, keys, values, mask)
            x = x + self._linear(f"{name}.self_attn.o_proj", out.transpose(1, 2).reshape(1, len(ids), -1))
            normed = self._norm(f"{name}.post_attention_layernorm", x)
            gates = F.silu(self._linear(f"{name}.mlp.gate_proj", normed))
            x = x + self._linear(f"{name}.mlp.down_proj", gates * self._linear(f"{name}.mlp.up_proj", normed))
        return F.linear(self._norm("model.norm", x), self.head)[0], new

    def _behind(self, past: KeysAndValues, more: KeysAndValues) -> KeysAndValues:
        if not past:
            return more
        return [(torch.cat((a, c), dim=2), torch.cat((b, d), dim=2)) for (a, b), (c, d) in zip(past, more, strict=True)]

    # -- decoding ----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        *,
        mask_id: int,
        stop_token: int,
        max_new_tokens: int,
        block_size: int = 32,
        small_block_size: int = 8,
        threshold: float = 0.9,
        refresh: str = "block",
    ) -> list[int]:
        """New tokens, through the first stop token or to the end of the last block."""
        device = self.head.device
        tokens, size, sub = list(prompt), block_size, small_block_size
        first = len(prompt) // size * size
        limit = first + max_new_tokens // size * size
        past: KeysAndValues = []
        if first:
            blocks = torch.arange(first, device=device) // size
            logits, past = self.forward(tokens[:first], 0, [], blocks[:, None] >= blocks[None])
            self.forwards["prefill"] += 1
            if len(prompt) == first:
                tokens.append(self._best(logits, mask_id)[0][-1])
        for start in range(first, limit, size):
            tokens += [mask_id] * (start + size - len(tokens))
            inside: KeysAndValues = []  # those of the block, as they were last computed
            for low in range(start, start + size, sub):
                while mask_id in (window := tokens[low : low + sub]):
                    if refresh == "block" or not inside or window[0] == mask_id:
                        mask = torch.ones(size, start + size, dtype=torch.bool, device=device)
                        logits, inside = self.forward(tokens[start : start + size], start, past, mask)
                        self.forwards["full"] += 1
                        candidates, confidences = self._shifted(logits, mask_id)
                        candidates, confidences = (
                            candidates[low - start :][:sub],
                            confidences[low - start :][:sub],
                        )
                    else:
                        at = slice(low - start, low - start + sub)
                        before = [(keys[:, :, : at.start], values[:, :, : at.start]) for keys, values in inside]
                        after = [(keys[:, :, at.stop :], values[:, :, at.stop :]) for keys, values in inside]
                        seen = self._behind(self._behind(past, before) if past else before, after)
                        mask = torch.ones(sub, start + size, dtype=torch.bool, device=device)
                        logits, fresh = self.forward(window, low, seen, mask)
                        inside = self._behind(self._behind(before, fresh), after)
                        self.forwards["sub"] += 1
                        candidates, confidences = self._shifted(logits, mask_id)
                    masked = [index for index, token in enumerate(window) if token == mask_id]
                    best = max(masked, key=confidences.__getitem__)
                    for index in masked:
                        if index == best or confidences[index] > threshold:
                            tokens[low + index] = candidates[index]
                    if ended := self._end(tokens, len(prompt), mask_id, stop_token):
                        return tokens[len(prompt) : ended]
            if start + size == limit:
                break
            logits, inside = self.forward(
                tokens[start : start + size],
                start,
                past,
                torch.ones(size, start + size, dtype=torch.bool, device=device),
            )
            self.forwards["commit"] += 1
            past = self._behind(past, inside)
            tokens.append(self._best(logits, mask_id)[0][-1])
            if ended := self._end(tokens, len(prompt), mask_id, stop_token):
                return tokens[len(prompt) : ended]
        return tokens[len(prompt) : limit]

    def _best(self, logits: Tensor, mask_id: int) -> tuple[list[int], list[float]]:
        allowed = logits.float().clone()
        allowed[:, mask_id] = -torch.inf
        tokens = allowed.argmax(-1)
        return tokens.tolist(), logits.float().softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()

    def _shifted(self, logits: Tensor, mask_id: int) -> tuple[list[int], list[float]]:
        """Row p predicts position p + 1; nothing predicts the first, which is never masked where that matters."""
        tokens, confidences = self._best(logits, mask_id)
        return [tokens[0], *tokens[:-1]], [confidences[0], *confidences[:-1]]

    def _end(self, tokens: list[int], begin: int, mask_id: int, stop_token: int) -> int:
        """Where the answer ends, 0 while it does not: a stop token with no mask before it."""
        for index in range(begin, len(tokens)):
            if tokens[index] == mask_id:
                return 0
            if tokens[index] == stop_token:
                return index + 1
        return 0
