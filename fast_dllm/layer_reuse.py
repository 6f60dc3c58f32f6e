"""What a range of layers leaves behind when it runs, so that it need not run on a later step. Plain data.

When to read what is stored is policy (an experiment's generation_functions.py); fast_dllm.network.model writes and
reads a `LayerStore` in mid-forward.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

# part -> what stands in for the layers of the range
PARTS = {
    "output": "what the range's last layer gave; it replaces what enters the range",
    "residual": "what the range added, its output less its input; it is added to what enters the range today",
    "mlp": "what each layer's MLP added; the attention of every layer runs, its keys and values stay fresh",
}
ORDERS = (0, 1)


class LayerStore:
    """What a contiguous range of layers gave for each row of the current block, written by row position.

    values: (1, B, block_size, C), or (num layers, B, block_size, C) for "mlp". What a contiguous range added is the sum
    of what its layers added, so one value a row is enough for the whole range. inputs: (B, block_size, C), what entered
    the range. One place for each row of the block, so that a row can never be read from another sub-block's store.
    order 1 keeps the values before those too, `before`, and gives their straight line `ahead` (B,) times their distance
    beyond the last.
    """

    def __init__(self, layers: range, part: str, batch_size: int, block_size: int, like: Tensor, order: int = 0):
        """`like` (..., C) gives size, dtype and device of a row."""
        check_names("order", order, ORDERS)
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
        if layers.step != 1 or not layers:
            raise ValueError(f"the layers must be a range with a step of 1 and not empty, not {layers}")
        self.layers, self.part = layers, part
        depth = len(layers) if part == "mlp" else 1
        self.values = like.new_zeros(depth, batch_size, block_size, like.shape[-1])
        self.inputs = like.new_zeros(batch_size, block_size, like.shape[-1])
        self.before = self.values.clone() if order else None
        self.ahead = like.new_zeros(batch_size)

    def store(self, entered: Tensor, left: Tensor, rows: Tensor, block_rows: Tensor) -> None:
        """Keep what entered and left the range (B, T, C) of cache rows `rows` (B, 1) at block rows `block_rows` (B, T).

        The MLPs' own values are kept by `store_mlp`.
        """
        self.inputs[rows, block_rows] = entered
        if self.part != "mlp":
            self._keep(0, left if self.part == "output" else left - entered, rows, block_rows)

    def store_mlp(self, layer: int, added: Tensor, rows: Tensor, block_rows: Tensor) -> None:
        self._keep(layer - self.layers.start, added, rows, block_rows)

    def _keep(self, depth: int, value: Tensor, rows: Tensor, block_rows: Tensor) -> None:
        if self.before is not None:
            self.before[depth, rows, block_rows] = self.values[depth, rows, block_rows]
        self.values[depth, rows, block_rows] = value

    def _forecast(self, depth: int, rows: Tensor, block_rows: Tensor) -> Tensor:
        last = self.values[depth, rows, block_rows]
        if self.before is None:
            return last
        return last + self.ahead[rows].unsqueeze(-1) * (last - self.before[depth, rows, block_rows])

    def stand_in(self, entered: Tensor, rows: Tensor, block_rows: Tensor) -> Tensor:
        """What leaves the range (B, T, C) when it does not run ("output", "residual")."""
        stored = self._forecast(0, rows, block_rows)
        return stored if self.part == "output" else entered + stored

    def mlp(self, layer: int, rows: Tensor, block_rows: Tensor) -> Tensor:
        """What stands in for what the MLP of `layer` adds to these rows, (B, T, C)."""
        return self._forecast(layer - self.layers.start, rows, block_rows)

    def drift(self, entering: Tensor, rows: Tensor, block_rows: Tensor, read: Tensor) -> Tensor:
        """mean |h - stored| / mean |stored| over the rows `read` (B, R) of T, for each sequence: (B,) in float32.

        h (B, T, C) is what enters the range today, stored what entered when it last ran (DBCache's rule).
        """
        picked = read.unsqueeze(-1).expand(-1, -1, entering.shape[-1])
        now = entering.gather(1, picked).float()
        then = self.inputs[rows, block_rows.gather(1, read)].float()
        return (now - then).abs().mean(dim=(1, 2)) / then.abs().mean(dim=(1, 2))


def layer_range(text: str, num_layers: int) -> range:
    """The layers that "a-b" names, both ends included: "8-19" is range(8, 20). Raises ValueError."""
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
