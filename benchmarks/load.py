"""From a checkpoint's folder to a model that can answer: seconds and peak memory, beside transformers; JSON line last.

    python -m benchmarks.load                            # 24 layers x 1024, some 250 million parameters, in four shards
    python -m benchmarks.load --random_weights 12x512 --runs 5
    python -m benchmarks.load --model /scratch/Fast_dLLM_v2_7B --no_peer

A checkpoint of random weights is written to a temporary folder first (or --model names one). Each load is a process of
its own, in turns, after one that does not count: it leaves the files in the page cache. seconds: of the load, torch and
transformers being imported. memory: the process's peak above what it had before, in checkpoints; 1.0 is the model
itself. The peer is transformers' Qwen2 of the same shape with from_pretrained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.decode import check_options, qwen2_like, random_model
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.model import FastDLLMForCausalLM

ROOT = Path(__file__).resolve().parent.parent
MEASURE = """
import json, sys, time
sys.path.insert(0, {root!r})
import torch
{imports}
def memory():
    if {device!r} != "cpu":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:  # getrusage's would be the parent's, where that is larger
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
before, began = memory(), time.perf_counter()
model = {load}
if {device!r} != "cpu":
    torch.cuda.synchronize()
print(json.dumps([time.perf_counter() - began, memory() - before]))
"""


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random_weights", default="24x1024", metavar="SHAPE", help="as in benchmarks.decode")
    parser.add_argument("--model", help="a checkpoint's folder instead")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no_peer", action="store_true")
    arguments = parser.parse_args()
    check_options(arguments, "shards", "runs")
    if arguments.model and not (Path(arguments.model) / "config.json").is_file():
        raise UsageError(f"--model must be a checkpoint's folder, and {arguments.model!r} has no config.json")
    return arguments


def write_peer(model: FastDLLMForCausalLM, folder: Path, shard_bytes: int) -> None:
    """transformers' Qwen2 with the same weights, as it writes itself."""
    peer = qwen2_like(model)
    peer.load_state_dict(model.state_dict())
    peer.save_pretrained(folder, max_shard_size=shard_bytes)


def measure(imports: str, load: str, device: str) -> tuple[float, float]:
    """Seconds and bytes of one load in a process of its own."""
    text = MEASURE.format(root=str(ROOT), imports=imports, load=load, device=device)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"a load failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def main() -> None:
    arguments = parse_arguments()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype != "auto" else torch.float32
    with tempfile.TemporaryDirectory(prefix="load-benchmark-") as made:
        own, peer = Path(arguments.model or f"{made}/own"), Path(made) / "peer"
        if not arguments.model:
            model = random_model(arguments.random_weights, torch.device("cpu"), dtype)
            size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            model.save_pretrained(own, max_shard_size=max(size // arguments.shards + 2**20, 2**20))
            if not arguments.no_peer:
                write_peer(model, peer, max(size // arguments.shards + 2**20, 2**20))
            del model
        elif not arguments.no_peer:
            raise UsageError("there is no peer for a checkpoint of yours: --no_peer with --model")
        size = sum(path.stat().st_size for path in own.glob("*.safetensors"))
        sides = {
            "fast_dllm": (
                "from fast_dllm.network.loading import load_model",
                f"load_model({str(own)!r}, {arguments.device!r}, {arguments.dtype!r})",
            )
        }
        if peer.is_dir():
            sides["transformers"] = (
                "from transformers.models.qwen2 import Qwen2ForCausalLM",
                f"Qwen2ForCausalLM.from_pretrained({str(peer)!r}, dtype={arguments.dtype!r}).to({arguments.device!r})",
            )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for run in range(arguments.runs + 1):
            for name, (imports, load) in sides.items():
                taken = measure(imports, load, arguments.device)
                found[name] += [taken] if run else []
    print(f"{size / 2**20:.0f} MiB, {arguments.device}, {arguments.dtype}; medians of {arguments.runs}")
    report: dict[str, object] = {"settings": vars(arguments), "checkpoint_bytes": size}
    for name, runs in found.items():
        seconds, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        report[name] = {"seconds": seconds, "peak_bytes": memory}
        print(
            f"{name:>13} {seconds:7.2f} s {size / seconds / 1e9:6.2f} GB/s, {memory / size:.2f} checkpoints of memory"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    with one_line():
        main()
