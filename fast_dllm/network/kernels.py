"""The element-wise parts of a layer. In recorded forwards on a CUDA GPU, torch.compile makes one kernel of each.

A layer of the 7B at batch 1 takes about 0.2 ms on an H100, nearly all of it to read the weights. A kernel takes a few
microseconds whatever it does, and a layer as written has about twenty of them. Calling a compiled kernel takes the host
longer than the operations as written, so unrecorded forwards do not use them (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]


# Round after each step of a kernel, as the operations as written do: so float16 and bfloat16 give the same values.
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {"emulate_precision_casts": True}


class Compiling:
    """Decides whether a kernel runs compiled: on a GPU, in a thread that is within `used`, and until a compilation has
    failed, which is logged in one line."""

    def __init__(self) -> None:
        self.is_enabled = True
        self._thread = threading.local()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within this context, kernels that this thread calls on a GPU are compiled."""
        before, self._thread.used = getattr(self._thread, "used", False), True
        try:
            yield
        finally:
            self._thread.used = before

    def __call__(self, kernel: Kernel) -> Kernel:
        compiled: list[Kernel] = []

        def call(x: Tensor, *others: Tensor | float) -> Tensor:
            if not (x.is_cuda and self.is_enabled and getattr(self._thread, "used", False)):
                return kernel(x, *others)
            try:
                if not compiled:
                    compiled.append(torch.compile(kernel, dynamic=True, options=OPTIONS))
                return compiled[0](x, *others)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # no Triton for this GPU, no C compiler, a cache that cannot be written
                self.is_enabled = False
                first_line = str(error).strip().split("\n")[0]
                logger.warning("kernels are not compiled, decoding is slower (%s)", first_line)
                return kernel(x, *others)

        return call


compiled_on_cuda = Compiling()


@compiled_on_cuda
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32; scaled in the weight's dtype, which is the result's."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(weight.dtype)


@compiled_on_cuda
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, T, heads, D) with cos and signed sin (B or 1, T, 1, D).

    Two roundings, not a fused multiply-add: so the float32 logits on a CPU equal the reference implementation bit for
    bit.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@compiled_on_cuda
def gate(gates: Tensor, up: Tensor) -> Tensor:
    """SwiGLU: silu(gates) * up, of one shape."""
    return F.silu(gates) * up
