"""A device that is not the host, on a machine without one: it counts what crosses, and computes on the CPU.

    with FakeDevice() as device:
        model = device.move(model)
        ...                                # everything with device=model.device
    device.to_host                         # Counter({"item": 1, "copy": 2, "nonzero": 1}): transfers by kind

On the CPU a transfer is a no-op that nobody sees. Tensors of this device report a device of their own and hide the CPU
tensor that holds their values, so `.tolist()`, `.cpu()` and `.to("cpu")` are copies here, `if tensor`, `int(tensor)`,
`range(tensor)` and `x[tensor:]` reads, and `nonzero` or a boolean index a wait for the size of the result, as on a GPU.
Reading a tensor that never left the host counts nothing. What a GPU refuses is refused: `.numpy()`, and operations on
tensors of both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# torch's one device that needs no driver. Its tensors have no values, those of `OnDevice` have.
DEVICE = torch.device("meta")
MODULE = TypeVar("MODULE", bound=nn.Module)
aten = torch.ops.aten

# Results whose size depends on values: the host waits for it. `equal` gives the host a truth value.
SIZED_BY_VALUES = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.masked_select.out: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    aten._unique.default: "unique",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim_consecutive.default: "unique",
    aten.equal.default: "equal",
    aten.allclose.default: "equal",
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
COPIES = {aten.copy_.default, aten.copy.default}
# Run whole: attention because its parts depend on what the device can do, the others for their number.
WHOLE = {aten.scaled_dot_product_attention.default, aten.linear.default, aten.matmul.default, aten.reshape.default}


class OnDevice(Tensor):
    """A tensor of `DEVICE`; `held` has its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        with torch.inference_mode(held.is_inference()):  # a view must be of its base's kind
            wrapped = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        wrapped.held = held
        return wrapped

    def __repr__(self, **_) -> str:
        return f"OnDevice({self.cpu()!r})"  # who prints it reads it

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        raise RuntimeError(f"{func} on a tensor of the fake device outside its `with`")


def tensors_in(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)


def mapped(kind: type[Tensor], change: Callable[[Any], Tensor], values: Any) -> Any:
    """`values` with every tensor of a kind changed, in lists and tuples too."""
    if isinstance(values, kind):
        return change(values)
    if isinstance(values, (tuple, list)):
        return type(values)(mapped(kind, change, value) for value in values)
    return values


def held_by(tensor: OnDevice) -> Tensor:
    return tensor.held


def is_host(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, OnDevice)


def is_truth(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def is_device(value: object) -> bool:
    return value is not None and torch.device(value) == DEVICE


class _Functions(TorchFunctionMode):
    """What torch does in one step where no operation is seen, in steps that are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            args = (mapped(OnDevice, lambda tensor: tensor.item(), args[0]), *args[1:])
            if is_device(kwargs.get("device")):
                del kwargs["device"]  # with it, the values would be left out
                return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.__setitem__ and isinstance(args[0], OnDevice) and not isinstance(args[2], Tensor):
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))  # x[...] = 1: on a GPU the host's, too
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, to_host: Counter[str], to_device: Counter[str]):
        super().__init__()
        self.to_host, self.to_device = to_host, to_device
        self.whole = set(WHOLE)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        if not there and not is_device(kwargs.get("device")):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a generator of the device, found one of the host")
        if func not in self.whole:
            with self:  # in inference mode an operation comes before it is taken apart
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self.whole.add(func)
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        result_there = self._count(func, args, kwargs, there, here)
        inner_args = mapped(OnDevice, held_by, args)
        inner_kwargs = {name: mapped(OnDevice, held_by, value) for name, value in kwargs.items()}
        if "device" in inner_kwargs:
            inner_kwargs["device"] = torch.device("cpu")
        result = func(*inner_args, **inner_kwargs)
        if func._schema.is_mutable and isinstance(args[0], Tensor) and result is inner_args[0]:
            return args[0]  # in place: the same object
        return mapped(Tensor, OnDevice, result) if result_there else result

    def _count(self, func, args, kwargs, there: list[OnDevice], here: list[Tensor]) -> bool:
        """Count what crosses; returns whether the result is on the device. Refuses what a GPU would."""
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            stays = target is None or is_device(target) == bool(there)
            if not stays:
                (self.to_host if there else self.to_device)["copy"] += 1
            return bool(there) if stays else not there
        if func in COPIES:
            target, source = args[:2]
            if isinstance(target, OnDevice) != isinstance(source, OnDevice):
                (self.to_host if isinstance(source, OnDevice) else self.to_device)["copy"] += 1
            return isinstance(target, OnDevice)
        if func is aten._local_scalar_dense.default:
            self.to_host["item"] += 1
        if func in SIZED_BY_VALUES and not (
            func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        ):
            self.to_host[SIZED_BY_VALUES[func]] += 1
        if func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            value = args[2] if len(args) > 2 else None
            if len(indices) == 1 and is_truth(indices[0]) and is_host(value) and value.numel() == 1:
                indices = []  # x[mask] = 0 fills where the mask is true, without asking where that is
            for index in indices:
                if not isinstance(index, OnDevice):
                    self.to_device["index"] += 1
                elif is_truth(index):
                    self.to_host["boolean index"] += 1
            here = [tensor for tensor in here if not any(tensor is index for index in indices)]
        if there and any(tensor.dim() for tensor in here):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found the host and the device")
        return True


class FakeDevice:
    """The device while it is entered; see the module. `to_host` and `to_device` count transfers by kind."""

    def __init__(self) -> None:
        self.to_host: Counter[str] = Counter()
        self.to_device: Counter[str] = Counter()
        self._modes = (_Functions(), _Operations(self.to_host, self.to_device))

    @property
    def transfers(self) -> int:
        """Device to host, of all kinds."""
        return self.to_host.total()

    def __enter__(self) -> FakeDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def move(self, module: MODULE) -> MODULE:
        """`module` with its parameters and buffers on the device, in place and uncounted; it never comes back."""
        moved: dict[Tensor, OnDevice] = {}  # tied ones stay tied
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in moved:
                        moved[parameter] = OnDevice(parameter.detach())
                        moved[parameter]._is_param = True  # what makes it one for isinstance()
                    part._parameters[name] = moved[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnDevice(buffer)
        return module

    def tensor(self, values, **options) -> Tensor:
        """A tensor of the device, uncounted."""
        return OnDevice(torch.tensor(values, **options))
