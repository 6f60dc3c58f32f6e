"""Measures the free memory of a device and refuses a model whose weights do not fit into it.

It is checked before weights are read or downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from fast_dllm.errors import UsageError
from fast_dllm.network.devices import pick_dtype

GIB = 2**30
MEMORY_INFO = Path("/proc/meminfo")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def num_weights(network: nn.Module) -> int:
    """Number of weights, a tied one counted once. The network may be on the meta device."""
    return sum(weight.numel() for weight in network.parameters())


def check_fits(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError, which says what to set, where the free memory of the device is smaller than the weights.

    network: on the meta device, so that it takes no memory itself. Only weights are counted, so a model that is
    refused can never work. Devices other than CUDA GPUs and the CPU are not checked.
    """
    if device.type == "cuda":
        free, place = free_on_gpu(device), f"of memory are free on {device}"
    elif device.type == "cpu":
        free, place = available_on_host(), "of memory are free"
    else:
        return
    needed = num_weights(network) * dtype.itemsize
    if needed > free:
        raise UsageError(
            f"its weights take {needed / GIB:.1f} GiB in {_name(dtype)}, and {free / GIB:.1f} GiB {place}; "
            + what_to_set(num_weights(network), device, dtype, free)
        )


def what_to_set(count: int, device: torch.device, dtype: torch.dtype, free: int) -> str:
    """The advice for a user whose device has `free` bytes, too few for `count` weights in `dtype`."""
    short = short_dtype(device)
    if dtype.itemsize > short.itemsize and count * short.itemsize <= free:
        return f"set dtype={_name(short)}, which takes {count * short.itemsize / GIB:.1f} GiB"
    least = count * min(dtype.itemsize, short.itemsize) / GIB
    if device.type == "cuda":
        return f"it needs a GPU with more than {least:.1f} GiB (SBATCH_GRES, or --gpu of run.sh)"
    return f"it needs a machine with more than {least:.1f} GiB, or a GPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype of a device: that of `auto` on a GPU, bfloat16 on a CPU."""
    if device.type != "cuda":
        return torch.bfloat16
    dtype = pick_dtype("auto", device)
    return torch.float16 if dtype.itemsize > 2 else dtype


def free_on_gpu(device: torch.device) -> int:
    """Bytes of GPU memory that this process can still use: free memory, and memory that torch has reserved."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def available_on_host() -> int:
    """Bytes of memory that this process can still use without swapping.

    That is Linux's own estimate (MemAvailable), or less where a control group of this process limits it, as Slurm and
    containers do. Where neither is known, the machine's memory.
    """
    return min([_available_on_machine(), *_available_in_cgroups()])


def _available_on_machine() -> int:
    if MEMORY_INFO.is_file():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_in_cgroups() -> Iterator[int]:
    """Free bytes of each control group of this process that has a limit. The cache of files counts as free."""
    for group, limit_file, usage_file in _cgroups():
        try:
            limit = (group / limit_file).read_text().strip()
            usage = int((group / usage_file).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue  # a level without a controller, or one that is not visible in a container
        if limit.isdecimal():
            yield max(int(limit) - usage + _file_cache(dict(line.split() for line in lines)), 0)


def _cgroups() -> Iterator[tuple[Path, str, str]]:
    """(folder, its file with the limit, its file with the usage) of each memory group of this process, up to the root.

    Lines of /proc/self/cgroup are `<number>:<controllers>:<path>`: version 2 has no controllers, version 1 `memory`.
    """
    lines = CGROUPS_OF_PROCESS.read_text().splitlines() if CGROUPS_OF_PROCESS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = CGROUP_ROOT, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = CGROUP_ROOT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        innermost = root / path.lstrip("/")
        for group in (innermost, *innermost.parents):
            yield group, *files
            if group == root:
                break


def _file_cache(stat: Mapping[str, str]) -> int:
    """Bytes of cached files in a group. Version 1 has other names for the sums over child groups."""
    names = ("total_active_file", "total_inactive_file")
    if names[0] not in stat:
        names = ("active_file", "inactive_file")
    return sum(int(stat.get(name, 0)) for name in names)
