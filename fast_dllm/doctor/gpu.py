"""Checks of the GPU: number format, memory, and whether this torch has code for it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from fast_dllm.doctor.cluster import gpu_of_jobs
from fast_dllm.doctor.model_files import weight_count
from fast_dllm.doctor.situation import GIB, Finding, Situation

CONTEXT_BYTES = GIB // 2  # CUDA's own share of a GPU's memory
WORK_BYTES = 2 * GIB  # that, caches and activations of one long question


def check_gpu(situation: Situation) -> Iterator[Finding]:
    """The device and dtype that fast_dllm.network.devices picks, whether this torch has code for it, and its memory."""
    import torch

    from fast_dllm.network.devices import pick_device, pick_dtype
    from fast_dllm.network.memory import what_to_set

    device = pick_device()
    dtype = pick_dtype("auto", device)
    count = weight_count(situation)
    weights = None if count is None else count * dtype.itemsize
    needs = (
        "the weights' size is not known before the model is here and whole"
        if weights is None
        else f"{weights / GIB:.1f} GiB of weights"
    )
    if device.type == "cpu":
        yield from findings_without_gpu(situation, count, f"{str(dtype)[6:]}, {needs}")
        return
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    name = f"GPU {properties.name}, capability {capability[0]}.{capability[1]}"
    built_for = torch.cuda.get_arch_list()
    if not runs_on(capability, built_for):
        yield Finding(
            "fail",
            f"{name}: torch {torch.__version__} has code for {' '.join(built_for)} only; another GPU (SBATCH_GRES)",
        )
        return
    memory = f"{properties.total_memory / GIB:.1f} GiB for {needs} in {str(dtype)[6:]}"
    if count is None or weights is None or weights + WORK_BYTES <= properties.total_memory:
        yield Finding("ok", f"{name}: {memory}")
    elif weights + CONTEXT_BYTES > properties.total_memory:
        advice = what_to_set(count, device, dtype, properties.total_memory - CONTEXT_BYTES)
        yield Finding("fail", f"{name}: {memory} do not fit; {advice}")
    else:
        yield Finding("warn", f"{name}: {memory} leaves little for long questions; a larger GPU (SBATCH_GRES) is safer")


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a GPU runs one of these: sm_XY runs on X.Y and X's later minor versions, compute_XY on all later ones."""
    for target in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)", target)
        if match:
            major, minor = int(match[2]), int(match[3])
            if (major, minor) <= capability and (match[1] == "compute" or major == capability[0]):
                return True
    return False


def findings_without_gpu(situation: Situation, count: int | None, needs: str) -> Iterator[Finding]:
    """count: number of weights, None where it is not known. needs: dtype and size of the weights, in words."""
    import torch

    from fast_dllm.network.memory import available_on_host, what_to_set

    memory = available_on_host()
    if situation.model == "tiny":
        yield Finding("ok", f"no GPU: the embedded model runs on the CPU ({needs})")
    elif shutil.which("sbatch"):
        yield Finding(
            "warn", f"no GPU on this node; jobs ask for {gpu_of_jobs(situation)}. In an salloc the doctor checks theirs"
        )
    elif count is not None and count * torch.float32.itemsize > memory:
        advice = what_to_set(count, torch.device("cpu"), torch.float32, memory)
        yield Finding(
            "fail", f"no GPU, and {memory / GIB:.1f} GiB of memory are free for {needs}; {advice}; or --model tiny"
        )
    else:
        yield Finding("warn", f"no GPU: on the CPU ({needs}) a benchmark takes weeks; --model tiny is for trying out")
