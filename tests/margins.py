"""How near an answer came to another one: what float32's rounding would have to move for a token to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fast_dllm.decode import engine
from fast_dllm.decoding import Generation

BOUND = 1e-3  # of logits that reach some tens: what another batch shape may move them by, with room


class _Watched(engine.Engine):
    """Notes for every prediction the gap of its top two logits, and of its confidence to the threshold."""

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.margins: list[float] = []

    def _predict(self, group, forwards, logits, *given: Any):
        flat = logits.flatten(0, 1).float().clone()
        flat[:, self.options.mask_id] = -torch.inf
        if len(flat):
            top = flat.topk(2, dim=-1).values
            self.margins += (top[:, 0] - top[:, 1]).tolist()
            confidences = flat.softmax(-1).amax(-1)
            for bar in self._bars():
                self.margins += (confidences - bar).abs().tolist()
        return super()._predict(group, forwards, logits, *given)

    def _bars(self) -> list[float]:
        """Every knob that a probability is compared with."""
        values = {name: getattr(self.options, name) for name in vars(self.options)}
        return [value for value in values.values() if isinstance(value, float) and 0 < value < 1]


def smallest_margin(model, experiment, prompt: list[int], settings: Mapping[str, Any]) -> float:
    """Of all predictions of one answer: the smallest gap that a rounding would have to bridge."""
    ids = ("mask_id", "stop_token")
    options = experiment.options_type(
        **{name: settings[name] for name in (*ids, *experiment.knobs) if name in settings}
    )
    watched = _Watched(model, experiment.decode_one, options)
    list(watched.run([engine.Request(prompt)]))
    return min(watched.margins)


def assert_same_but_for_rounding(
    model, experiment, prompt: list[int], settings: Mapping[str, Any], alone: Generation, got: Generation
) -> None:
    """Equal; or some prediction stood so near to another that float32's rounding may have moved it, which is told."""
    if got == alone:
        return
    margin = smallest_margin(model, experiment, prompt, settings)
    assert margin < BOUND, f"another answer, though the smallest margin of {len(prompt)} tokens is {margin:g}"
    print(f"{experiment.name}: another answer to a prompt of {len(prompt)} tokens; smallest margin {margin:g}")
