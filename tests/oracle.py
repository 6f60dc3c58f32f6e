"""The network of fast_dllm/network/model.py once more in float64, to say how far from the truth a float32 forward is.

It shares nothing with what it judges: numpy instead of torch, tensor names and `config.json` instead of the model's
classes, and its own norm, rotary embedding and mask. The model's own code in double would share their mistakes.

Why a distance from float64 and not from the reference's numbers: two float32 forwards that differ only in the order of
their sums, as those of two kinds of CPU do, stand up to 3.5e-4 apart on the golden models, while each is as far from
float64 as the reference is (docs/LOG.md, "Foundation").
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

# How many times as far from float64 as the reference's own float32 numbers another float32 forward may be. Over all the
# golden logits of a model, 570 forwards that sum in other orders gave 0.84 to 1.20 by root mean square and 0.40 to 2.52
# by the largest; RMSNorm without its eps of 1e-6, the smallest fault known, gives 3.1 and 3.3.
RMS, LARGEST = 1.5, 4.0


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def assert_float32_of(
    truth: np.ndarray, got: np.ndarray, reference: np.ndarray, *, rms: float = RMS, largest: float = LARGEST
) -> None:
    """`got` is no further from `truth` (float64) than `rms` and `largest` times what `reference` is (both float32)."""
    off, allowed = got.astype(np.float64) - truth, reference.astype(np.float64) - truth
    assert np.isfinite(off).all(), "not finite"
    for name, measure, limit in (
        ("root mean square", root_mean_square, rms),
        ("largest", lambda x: np.abs(x).max(), largest),
    ):
        ratio = measure(off) / measure(allowed)
        assert ratio <= limit, f"{name} error {measure(off):.2e}: {ratio:.3g} times the reference's, not {limit}"


class Oracle:
    """Logits in float64 of the checkpoint `weights` (safetensors) with the sizes in `config` (JSON)."""

    def __init__(self, config: Path, weights: Path):
        self.config = json.loads(config.read_text())
        self.weights = {name: tensor.astype(np.float64) for name, tensor in load_file(weights).items()}

    def logits(self, ids: list[int]) -> np.ndarray:
        """(positions, vocabulary) for one sequence from position 0, without a cache."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(f"{prefix}.self_attn", self._norm(f"{prefix}.input_layernorm", x))
            x = x + self._mlp(f"{prefix}.mlp", self._norm(f"{prefix}.post_attention_layernorm", x))
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self._linear(head, self._norm("model.norm", x))

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean_square = (x * x).sum(axis=-1, keepdims=True) / x.shape[-1]
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        gate = self._linear(f"{name}.gate_proj", x)
        return self._linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self._linear(f"{name}.up_proj", x))

    def _heads(self, name: str, x: np.ndarray) -> list[np.ndarray]:
        """A projection with its bias, (positions, head size) for each head."""
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        out = self._linear(name, x) + self.weights[f"{name}.bias"]
        return [out[:, first : first + size] for first in range(0, out.shape[-1], size)]

    def _rotated(self, head: np.ndarray) -> np.ndarray:
        """Every position's pair (i, i + half) turned by position * theta ** (-2 i / size)."""
        positions, size = head.shape
        out = np.empty_like(head)
        for pair in range(size // 2):
            angle = np.arange(positions) * self.config["rope_theta"] ** (-2 * pair / size)
            a, b = head[:, pair], head[:, pair + size // 2]
            out[:, pair] = a * np.cos(angle) - b * np.sin(angle)
            out[:, pair + size // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        queries = [self._rotated(head) for head in self._heads(f"{name}.q_proj", x)]
        keys = [self._rotated(head) for head in self._heads(f"{name}.k_proj", x)]
        values = self._heads(f"{name}.v_proj", x)
        sharing = len(queries) // len(keys)
        out = []
        for head, query in enumerate(queries):
            scores = query @ keys[head // sharing].T / np.sqrt(query.shape[-1])
            for position in range(len(x)):
                # a position sees its own block to its end, and nothing behind it
                scores[position, (position // self.config["bd_size"] + 1) * self.config["bd_size"] :] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out.append(weights / weights.sum(axis=-1, keepdims=True) @ values[head // sharing])
        return self._linear(f"{name}.o_proj", np.concatenate(out, axis=-1))
