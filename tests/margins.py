"""How near an answer came to another one: what float32's rounding would have to move for a token to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fast_dllm.decode.decoding_run import DecodingRun, Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decoding import Answer, Generation
from fast_dllm.network.eager import EagerExecutor

BOUND = 1e-3  # of logits that reach some tens: what another batch shape may move them by, with room


class _Watched(EagerExecutor):
    """Notes for every prediction the gap of its top two logits, and of its confidence to each bar."""

    def __init__(self, model, cache, bars: list[float]):
        super().__init__(model, cache)
        self.bars, self.margins = bars, []

    def greedy(self, logits, mask_id):
        flat = logits.float().clone()
        flat[:, mask_id] = -torch.inf
        if len(flat):
            top = flat.topk(2, dim=-1).values
            self.margins += (top[:, 0] - top[:, 1]).tolist()
            confidences = flat.softmax(-1).amax(-1)
            for bar in self.bars:
                self.margins += (confidences - bar).abs().tolist()
        return super().greedy(logits, mask_id)


def smallest_margin(model, experiment, prompt: list[int], settings: Mapping[str, Any]) -> float:
    """Of all predictions of one answer: the smallest gap that a rounding would have to bridge."""
    ids = ("mask_id", "stop_token")
    options = experiment.options_type(
        **{name: settings[name] for name in (*ids, *experiment.knobs) if name in settings}
    )
    bars = [value for value in vars(options).values() if isinstance(value, float) and 0 < value < 1]
    length = Answer(0, prompt, options, model.config.num_hidden_layers).limit
    executor = _Watched(model, model.new_cache(1, length, options.block_size), bars)
    settings_of_run = Engine(model, experiment.decode_one, options)._settings
    list(DecodingRun(executor, settings_of_run, [Prompt(prompt)], 1).events())
    return min(executor.margins)


def assert_same_but_for_rounding(
    model, experiment, prompt: list[int], settings: Mapping[str, Any], alone: Generation, got: Generation
) -> None:
    """Equal; or some prediction stood so near to another that float32's rounding may have moved it, which is told."""
    if got == alone:
        return
    margin = smallest_margin(model, experiment, prompt, settings)
    assert margin < BOUND, f"another answer, though the smallest margin of {len(prompt)} tokens is {margin:g}"
    print(f"{experiment.name}: another answer to a prompt of {len(prompt)} tokens; smallest margin {margin:g}")
