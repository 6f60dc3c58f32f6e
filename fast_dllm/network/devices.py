"""The device and the number format that a model runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fast_dllm.errors import UsageError


def pick_device(device: str = "auto") -> torch.device:
    """The device of this name. `auto`: the first CUDA GPU, else the CPU. Raises UsageError if it does not exist."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; valid ones: auto, cpu, cuda, cuda:N") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} is not there; this machine has {torch.cuda.device_count()} CUDA GPUs")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of this name. `auto`: bfloat16 from compute capability 8.0, float16 on 7.x, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context new tensors have `dtype` by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
