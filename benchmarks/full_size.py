"""The published model's size on this machine: write such a checkpoint, load it, answer one question; a JSON line last.

    python -m benchmarks.full_size --folder /scratch            # the 7B: 15.2 GB of disk, 16 GB of memory on a CPU
    python -m benchmarks.full_size --folder /scratch --shape 1.5b
    python -m benchmarks.full_size --folder . --files ../fast_dllm_v2_7b --data ../hub      # without a network

The weights are random, in bfloat16; shapes, names and shards are the published ones. The 1.5B's head is tied to its
embedding, as in Qwen2.5-1.5B. configuration and tokenizer come from the hub, or from --files; the question is GSM8K's
first one, from the hub, or from --data, a folder with openai/gsm8k in the hub's layout. load_model and eval.py run in
processes of their own. A random model unmasks one token a step: --new_tokens is about the number of steps. The
checkpoint is removed at the end. peak memory: of the process, the files that it has mapped included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch
from huggingface_hub import snapshot_download

from benchmarks.common import check_options
from fast_dllm.errors import OneLineParser, UsageError, line_of
from fast_dllm.network.config import read_config
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.record.traces import TRACES_FILE, read
from fast_dllm.spec.checkpoint import CONFIG_FILE, INDEX_FILE
from fast_dllm.spec.defaults import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
DTYPE = torch.bfloat16
# Fields of config.json that differ from the published 7B's.
SHAPES: Mapping[str, Mapping[str, object]] = {
    "7b": {},
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
LOAD = """
import json, sys, time
import torch
from fast_dllm.network.loading import load_model
began = time.perf_counter()
model = load_model(sys.argv[1], sys.argv[2], "bfloat16")
if model.device.type == "cuda":
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
else:
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))
"""


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written and removed")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument(
        "--files", type=Path, help="a folder with the 7B's config.json and tokenizer (default: the hub)"
    )
    parser.add_argument("--data", type=Path, help="a folder with openai/gsm8k (default: the hub)")
    parser.add_argument("--shards", type=int, default=4, help="where --files has no index of this shape (default 4)")
    parser.add_argument("--new_tokens", type=int, default=32, help="at most, of the answer (default 32)")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.dtype = "bfloat16"
    check_options(arguments, "shards", "new_tokens")
    for name in ("folder", "files", "data"):
        path = getattr(arguments, name)
        if path is not None and not path.is_dir():
            raise UsageError(f"--{name}: no folder {str(path)!r}")
    if arguments.data is not None and not (arguments.data / "openai" / "gsm8k").is_dir():
        raise UsageError(f"--data: {str(arguments.data)!r} has no openai/gsm8k")
    return arguments


# -- the checkpoint ----------------------------------------------------------------------------------------------------
def copy_small_files(source: Path | None, folder: Path, shape: str) -> None:
    """The published configuration, changed to the shape, and the tokenizer. Raises UsageError."""
    if source is None:
        try:
            source = Path(snapshot_download(DEFAULT_MODEL, allow_patterns=["*.json", "*.txt", "*.jinja"]))
        except Exception as error:  # the hub's errors are of many types
            raise UsageError(
                f"{DEFAULT_MODEL} cannot be had from the hub ({line_of(error)}); --files names a copy"
            ) from None
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".jinja"):
            shutil.copy(path, folder)
    config = json.loads((folder / CONFIG_FILE).read_text()) | SHAPES[shape]
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def shards_of(shapes: Mapping[str, Sequence[int]], index: Path, num_shards: int) -> dict[str, list[str]]:
    """Shard -> names of its tensors: those of the published index where it is of these tensors, else in equal parts."""
    published = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    shards: dict[str, list[str]] = {}
    if published.keys() == shapes.keys():
        for name in shapes:
            shards.setdefault(published[name], []).append(name)
        return shards
    total, seen = sum(map(size_of, shapes.values())), 0
    parts: dict[int, list[str]] = {}  # a tensor that is larger than a part leaves the next one empty
    for name, shape in shapes.items():
        parts.setdefault(min(seen * num_shards // total, num_shards - 1), []).append(name)
        seen += size_of(shape)
    names = (f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1))
    return dict(zip(names, parts.values(), strict=True))


def size_of(shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * DTYPE.itemsize


def random_bytes(name: str, shape: Sequence[int], block: torch.Tensor) -> Iterator[bytes]:
    """The bytes of a tensor: ones for a norm, zeros for a bias, else a block of random numbers again and again."""
    if "norm" in name or name.endswith(".bias"):
        block = torch.full_like(block, float("norm" in name))
    left = torch.Size(shape).numel()
    while left:
        part = block[: min(left, len(block))]
        yield part.view(torch.uint8).numpy().tobytes()
        left -= len(part)


def write_shard(path: Path, shapes: Mapping[str, Sequence[int]], block: torch.Tensor) -> None:
    """A safetensors file, tensor by tensor: the library's writer would hold the whole shard twice."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size_of(shape)]}
        end += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for part in random_bytes(name, shape, block):
                file.write(part)


def write_checkpoint(folder: Path, num_shards: int) -> tuple[int, int]:
    """Write random weights for the configuration in `folder`; returns bytes and number of shards. Raises UsageError."""
    with torch.device("meta"):
        model = FastDLLMForCausalLM(read_config(str(folder)), randomise=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in model.tied_names}
    shards = shards_of(shapes, folder / INDEX_FILE, num_shards)
    total = sum(map(size_of, shapes.values()))
    free = shutil.disk_usage(folder).free
    if free < 1.05 * total:
        raise UsageError(f"--folder has {free / GB:.1f} GB free; the checkpoint takes {total / GB:.1f} GB")
    block = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).to(DTYPE)
    for file, names in shards.items():
        write_shard(folder / file, {name: shapes[name] for name in names}, block)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total, len(shards)


@contextmanager
def checkpoint(arguments: argparse.Namespace) -> Iterator[tuple[Path, dict[str, float]]]:
    """A folder with the checkpoint, which is removed afterwards, and what it took to write."""
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=arguments.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        began = time.perf_counter()
        copy_small_files(arguments.files, folder, arguments.shape)
        num_bytes, num_shards = write_checkpoint(folder, arguments.shards)
        seconds = time.perf_counter() - began
        yield folder, {"seconds": seconds, "bytes": num_bytes, "shards": num_shards}


# -- what is measured --------------------------------------------------------------------------------------------------
def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    """What a process prints. Raises UsageError with its last line where it fails."""
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UsageError(
            f"{Path(command[1]).name} ended with {done.returncode}: {lines[-1] if lines else 'no message'}"
        )
    return done.stdout


def answer(arguments: argparse.Namespace, model: Path, environment: Mapping[str, str]) -> dict[str, object]:
    """One question through eval.py: what its summary says, and each step of its trace."""
    work, out = model.parent, model.parent / "out"
    if arguments.data is not None:
        (work / "openai").symlink_to((arguments.data / "openai").resolve())
    model_args = f"model_path={model},dtype=bfloat16,device={arguments.device},threshold={arguments.threshold}"
    words = ["--model", "fast_dllm_v2", "--tasks", "gsm8k", "--num_fewshot", "0", "--limit", "1", "--batch_size", "1"]
    words += ["--apply_chat_template", "--fewshot_as_multiturn", "--traces", "--output_path", f"{out}/"]
    words += ["--model_args", f"{model_args},max_new_tokens={arguments.new_tokens}"]
    began = time.perf_counter()
    run([sys.executable, str(ROOT / "eval.py"), *words], environment, work)
    seconds = time.perf_counter() - began
    summary = json.loads((out / "summary.json").read_text())
    _, traces = read(out / TRACES_FILE)
    steps = [
        {"kind": step["kind"], "ms": step["ms"], "rows": step["rows"], "unmasked": len(step["filled"]["positions"])}
        for step in next(traces)["steps"]
    ]
    names = ("seconds_loading", "peak_memory_bytes", "num_threads", "device", "gpu")
    cost = {name: summary["throughput"][name] for name in ("new_tokens", "seconds_generating")}
    return {"seconds": seconds, **{name: summary[name] for name in names}, **cost, "steps": steps}


def show(report: dict) -> None:
    """The report in lines."""
    written, load, answered = report["write"], report["load"], report["answer"]
    speed = written["bytes"] / load["seconds"] / GB
    print(f"written: {written['bytes'] / GB:.2f} GB in {written['shards']} shards, {written['seconds']:.1f} s")
    print(f"load_model: {load['seconds']:.1f} s ({speed:.2f} GB/s), peak memory {load['peak_bytes'] / GB:.2f} GB")
    print(
        f"eval.py: {answered['seconds']:.1f} s, of which {answered['seconds_loading']:.1f} s until the model was loaded"
        f" and {answered['seconds_generating']:.1f} s for {answered['new_tokens']} tokens; "
        f"peak memory {answered['peak_memory_bytes'] / GB:.2f} GB; {answered['num_threads']} threads"
    )
    for number, step in enumerate(answered["steps"], 1):
        rows = f"rows {step['rows'][0]} to {step['rows'][1] - 1}" if step["rows"] else "no rows"
        print(f"  {number:4} {step['kind']:8} {step['ms'] / 1000:8.2f} s  {rows}, {step['unmasked']} tokens unmasked")
    kinds = {step["kind"] for step in answered["steps"]}
    for kind in sorted(kinds):
        times = [step["ms"] for step in answered["steps"] if step["kind"] == kind]
        print(f"{kind}: {len(times)}, median {statistics.median(times) / 1000:.2f} s")


def main() -> None:
    arguments = parse_arguments()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if arguments.files is not None and arguments.data is not None:
        environment["HF_HUB_OFFLINE"] = "1"
    report: dict[str, object] = {"settings": {name: str(value) for name, value in vars(arguments).items()}}
    with checkpoint(arguments) as (folder, report["write"]):
        text = run([sys.executable, "-c", LOAD, str(folder), arguments.device], environment, folder.parent)
        report["load"] = json.loads(text.splitlines()[-1])
        report["answer"] = answer(arguments, folder, environment)
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    with one_line():
        main()
