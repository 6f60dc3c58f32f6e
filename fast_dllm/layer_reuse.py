"""Which layers may be skipped, on which denoising steps, and what is stored for them.

The rules are those of the layer-reuse experiment on Fast-dLLM v2 (docs/design.md, "Layer reuse"). Nothing here
touches a model: `LayerReuse` is a plain buffer that the network writes and reads by row position.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LAYER_SUBSETS = ("first", "middle", "last")
REUSE_KS = (1, 2, 3)
MIN_LAYERS = 13


def check_reuse(reuse_k: int, layer_subset: str | None) -> None:
    """Raise ValueError unless the pair is one of the experiment's configurations or 'no reuse' (1, None)."""
    if isinstance(reuse_k, bool) or reuse_k not in REUSE_KS:
        raise ValueError(f"reuse_k must be one of {', '.join(map(str, REUSE_KS))}, not {reuse_k!r}")
    if layer_subset is not None and layer_subset not in LAYER_SUBSETS:
        raise ValueError(f"layer_subset must be one of {', '.join(LAYER_SUBSETS)}, not {layer_subset!r}")
    if reuse_k > 1 and layer_subset is None:
        raise ValueError(f"reuse_k {reuse_k} needs a layer_subset: one of {', '.join(LAYER_SUBSETS)}")


def subset_layers(layer_subset: str, num_layers: int) -> range:
    """The contiguous layers [start, stop) that `layer_subset` names in a network of `num_layers`.

    first: layers 1..11 (layer 0 always runs); middle: 12 layers from num_layers // 2 - 6; last: the last 12.
    Raises ValueError for an unknown subset or fewer than 13 layers.
    """
    check_reuse(1, layer_subset)
    if num_layers < MIN_LAYERS:
        raise ValueError(
            f"layer_subset {layer_subset!r} needs at least {MIN_LAYERS} layers, the model has {num_layers}"
        )
    start = {"first": 1, "middle": num_layers // 2 - 6, "last": num_layers - 12}[layer_subset]
    return range(start, 12 if layer_subset == "first" else start + 12)


def is_reuse_step(counter: int, reuse_k: int) -> bool:
    """Whether the sub forward of denoising step `counter` (0 at the start of each block) reuses its subset."""
    return counter % reuse_k != 0


class LayerReuse:
    """What a contiguous range of layers gave for each row of the current block, written by row position.

    buffer: (num subset layers, B, block_size, C). One slot per row of the block, so that a row can never be read
    from another sub-block's store. `mode` says what is stored and how it is read back:

    - "output": the layer's output; reading it replaces the layer's input.
    - "residual": output - input, what the layer added; reading it adds the same to today's input.
    """

    def __init__(
        self,
        layers: range,
        mode: Literal["output", "residual"],
        batch_size: int,
        block_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        if mode not in ("output", "residual"):
            raise ValueError(f"mode must be 'output' or 'residual', not {mode!r}")
        self.layers = layers
        self.mode = mode
        self.buffer = torch.zeros(len(layers), batch_size, block_size, hidden_size, dtype=dtype, device=device)

    def store(self, layer: int, layer_input: Tensor, layer_output: Tensor, rows: Tensor, offsets: Tensor) -> None:
        """Keep one layer's result, (B, T, C), for batch rows `rows` (B, 1) at block rows `offsets` (B, T)."""
        value = layer_output if self.mode == "output" else layer_output - layer_input
        self.buffer[layer - self.layers.start, rows, offsets] = value

    def read(self, layer: int, layer_input: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """The layer's stand-in result (B, T, C) for the rows that were stored last at those positions."""
        stored = self.buffer[layer - self.layers.start, rows, offsets]
        return stored if self.mode == "output" else layer_input + stored
