"""Chooses the GPU type that a job asks for, and says why a type is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Callable, Iterable, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner.roofline import GPUS, LEAST_CAPABILITY, TYPES, sizes_of
from fast_dllm.runner.slurm import ask, lines_of
from fast_dllm.spec.request import Request

SOONEST = "soonest"


def check_gpu(request: Request, text: str) -> list[str]:
    """The types that the value of `--gpu` allows. Raises UsageError."""
    if text.lower() == SOONEST:
        return [one for one in TYPES if not why_not(request.model_or_default, request.code_root, one)]
    wanted = [one.lower() for one in text.split(",")]
    for one in wanted:
        if one not in TYPES:
            raise UsageError(f"--gpu: no type {one!r}; valid: {' '.join(TYPES)}, several by commas, or {SOONEST}")
        reason = why_not(request.model_or_default, request.code_root, one)
        if reason:
            raise UsageError(f"--gpu {one}: {reason}")
    return list(dict.fromkeys(wanted))


def why_not(model: str, code_root: Path, gpu: str) -> str:
    """Why the model cannot run on any card of a GPU type; "" if it can."""
    cards, sizes = [card for card in GPUS if card.slurm == gpu], sizes_of(model, code_root)
    if all(card.capability < LEAST_CAPABILITY for card in cards):
        major, minor = cards[0].capability
        pinned = re.search(r"^torch==(\S+)", (code_root / "constraints.txt").read_text(), re.MULTILINE)
        return f"the pinned torch {pinned[1] if pinned else ''} has no code for its capability {major}.{minor}"
    if sizes and not any(sizes.fits(card) for card in cards):
        largest = max(card.memory for card in cards)
        return f"{sizes.total_bytes / 1e9:.1f} GB of weights do not fit into its {largest} GB"
    return ""


def choose_gpu(
    request: Request, text: str, present: Iterable[str], settings: Callable[[str], Mapping[str, str]]
) -> tuple[str, list[str]]:
    """(a GPU type, lines about the choice).

    If the table's other results and jobs have one type (`present`), it is chosen, because speeds in one table must be
    comparable; else the type that starts soonest. settings: the variables for sbatch, of a type. Raises UsageError if
    Slurm would start none of them.
    """
    wanted, present = check_gpu(request, text), sorted(set(present))
    if len(wanted) == 1:
        return wanted[0], []
    if len(present) == 1 and present[0] in wanted:
        return present[0], [f"GPU {present[0]}, as the table's other configurations have"]
    if not shutil.which("sbatch"):
        return wanted[0], [f"GPU {wanted[0]}: no sbatch here that could say which one starts soonest"]
    starts, replies = {}, []
    for gpu in wanted:
        start, reply = first_start(request, {**settings(gpu), "SBATCH_GRES": f"gpu:{gpu}:1"})
        replies.append(f"{gpu}: {reply}")
        if start:
            starts[gpu] = start
    if not starts:
        raise UsageError(f"--gpu {text}: Slurm would start none of them; {'; '.join(replies)}")
    best = min(starts, key=lambda gpu: (starts[gpu], wanted.index(gpu)))
    return best, [f"GPU {best} starts soonest, at {starts[best]} ({'; '.join(replies)})"]


def first_start(request: Request, settings: Mapping[str, str]) -> tuple[str, str]:
    """(when Slurm would start such a job, or ""; Slurm's reply). Nothing is submitted."""
    script = str(request.code_root / "sbatch" / "_job.sh")
    worked, reply = ask("sbatch", "--test-only", script, settings=settings)
    match = re.search(r"to start at (\S+)", reply)
    reason = re.sub(r"sbatch: (error: )?|allocation failure: ", "", reply)
    return (match[1], match[1]) if worked and match else ("", reason or "no reply")


def count_of(gres: str) -> int:
    """The number of GPUs in gpu:a100:2."""
    match = re.search(r":(\d+)$", gres)
    return int(match[1]) if match else 1


def memory_for(gpu: str, asked: str) -> dict[str, str]:
    """A smaller host memory than the script asks for (`asked`), if the nodes of this type have less for each GPU."""
    megabytes = int(asked.rstrip("G")) * 1024
    if os.environ.get("SBATCH_MEM_PER_NODE"):
        return {}
    per_gpu = []
    for gres, memory in lines_of("sinfo", "--noheader", "--format=%G|%m") or ():
        kinds = re.findall(r"gpu:([A-Za-z_]\w*):(\d+)", gres)
        if gpu in (kind.lower() for kind, _ in kinds):
            per_gpu.append(int(memory.rstrip("+")) // sum(int(count) for _, count in kinds))
    smallest = max(per_gpu, default=megabytes)
    return {"SBATCH_MEM_PER_NODE": str(smallest)} if smallest < megabytes else {}
