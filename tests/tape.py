"""What a CUDA graph does, on a CPU: the operations of a piece of work on the tensors that it met, again and again.

    replay = record(work)     # the work has been done once; the first replay() is that one
    replay()                  # the same operations on the same memory; no Python of the work runs

A Python number that the work looked at stays what it was, as in a graph, so what should have followed it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, _tensors(result)))
        return result


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def record(work: Callable[[], object]) -> Callable[[], None]:
    with _Tape() as tape:
        work()
    operations, replays = tape.operations, 0

    def replay() -> None:
        nonlocal replays
        replays += 1
        if replays == 1:
            return  # recording a graph does not run it; a tape has
        for func, args, kwargs, given in operations:
            known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            for old, new in zip(given, _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in known:  # else a view, or written in place
                    old.copy_(new)

    return replay
