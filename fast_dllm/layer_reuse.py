"""Stores the outputs of a range of layers, so that a later step can use them instead of running the layers.

An experiment's generation_functions.py decides when a store is read; an executor (fast_dllm.network.executor) writes
and reads it in mid-forward.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

# part -> what is stored, and how it replaces the layers
PARTS = {
    "output": "the output of the range's last layer; it replaces the hidden rows that enter the range",
    "residual": "the output of the range minus its input; it is added to the hidden rows that enter the range",
    "mlp": "what each layer's MLP added; the attention of every layer still runs and writes keys and values",
}
ORDERS = (0, 1)


class LayerStore:
    """Stored outputs of a contiguous range of layers, for each row of the current block.

    values: (1, B, block_size, C), since what the range added is the sum of what its layers added; for "mlp" (number of
    layers, B, block_size, C). inputs (B, block_size, C): the hidden rows that entered the range. Each row of the block
    has its own place, so that a row is never read from another sub-block's store. order 1 extrapolates: it also keeps
    the `previous` values, and a read takes the straight line through both, `ahead` (B,) times their distance beyond the
    last values.
    """

    def __init__(self, layers: range, part: str, batch_size: int, block_size: int, like: Tensor, order: int = 0):
        """like (..., C): has the size, dtype and device of a hidden row. Raises ValueError for unknown names."""
        check_names("order", order, ORDERS)
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
        if layers.step != 1 or not layers:
            raise ValueError(f"the layers must be a range with a step of 1 and not empty, not {layers}")
        self.layers, self.part = layers, part
        depth = len(layers) if part == "mlp" else 1
        self.values = like.new_zeros(depth, batch_size, block_size, like.shape[-1])
        self.inputs = like.new_zeros(batch_size, block_size, like.shape[-1])
        self.previous = self.values.clone() if order else None
        self.ahead = like.new_zeros(batch_size)

    def write(self, inputs: Tensor, outputs: Tensor, cache_rows: Tensor, block_rows: Tensor) -> None:
        """Store the hidden rows (B, T, C) that entered the range and those that left it.

        cache_rows (B, 1), block_rows (B, T): the sequences in the cache, and the rows' places within their block.
        For a store of MLPs only the inputs are stored here; see `write_mlp`.
        """
        self.inputs[cache_rows, block_rows] = inputs
        if self.part != "mlp":
            self._set(0, outputs if self.part == "output" else outputs - inputs, cache_rows, block_rows)

    def write_mlp(self, layer: int, added: Tensor, cache_rows: Tensor, block_rows: Tensor) -> None:
        """Store what the MLP of `layer` added, (B, T, C)."""
        self._set(layer - self.layers.start, added, cache_rows, block_rows)

    def _set(self, depth: int, value: Tensor, cache_rows: Tensor, block_rows: Tensor) -> None:
        if self.previous is not None:
            self.previous[depth, cache_rows, block_rows] = self.values[depth, cache_rows, block_rows]
        self.values[depth, cache_rows, block_rows] = value

    def _forecast(self, depth: int, cache_rows: Tensor, block_rows: Tensor) -> Tensor:
        """The last value (B, T, C), or with order 1 the straight line through the last two."""
        last = self.values[depth, cache_rows, block_rows]
        if self.previous is None:
            return last
        return last + self.ahead[cache_rows].unsqueeze(-1) * (last - self.previous[depth, cache_rows, block_rows])

    def output(self, inputs: Tensor, cache_rows: Tensor, block_rows: Tensor) -> Tensor:
        """The stored replacement for the range's output (B, T, C), for parts "output" and "residual"."""
        stored = self._forecast(0, cache_rows, block_rows)
        return stored if self.part == "output" else inputs + stored

    def mlp(self, layer: int, cache_rows: Tensor, block_rows: Tensor) -> Tensor:
        """The stored replacement for the output (B, T, C) of the MLP of `layer`."""
        return self._forecast(layer - self.layers.start, cache_rows, block_rows)

    def drift(self, inputs: Tensor, cache_rows: Tensor, block_rows: Tensor, read: Tensor) -> Tensor:
        """mean |h - stored| / mean |stored| over the rows `read` (B, R) of T, for each sequence: (B,) in float32.

        h: `inputs` (B, T, C), which enter the range now; stored: what entered it when it last ran. The rule is
        DBCache's (cache-dit).
        """
        picked = read.unsqueeze(-1).expand(-1, -1, inputs.shape[-1])
        now = inputs.gather(1, picked).float()
        then = self.inputs[cache_rows, block_rows.gather(1, read)].float()
        return (now - then).abs().mean(dim=(1, 2)) / then.abs().mean(dim=(1, 2))


def layer_range(text: str, num_layers: int) -> range:
    """The layers of "a-b", both ends included: "8-19" is range(8, 20). Raises ValueError."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"{text!r} is no range of layers such as 8-19")
    if not int(first) <= int(last) < num_layers:
        raise ValueError(f"the layers {text} are not a range within the model's 0-{num_layers - 1}")
    return range(int(first), int(last) + 1)


def check_names(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError, one line with the choices, unless `value` is one of them (True is not 1)."""
    choices = list(choices)
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
