"""Decoding speed: forwards/s by kind, tokens/s and peak memory, medians after a warm-up; a JSON line last.

    python benchmarks/decode.py --model tiny --batch_size 1 --threshold 0.9
    python benchmarks/decode.py --model tiny --refresh rows      # the paper's block cache instead of whole blocks
    python benchmarks/decode.py --random_weights 36x512          # layers x hidden size, nothing to load; or 7b
    python benchmarks/decode.py --model tiny --baseline          # beside a straightforward form, and beside Qwen2
    python benchmarks/decode.py --model tiny --every             # each experiment, each of its configurations
    python benchmarks/decode.py --model tiny --graphs compiled   # layers compiled for this CPU

Forward kinds are those of fast_dllm/decoding.py, at a prefix of --prompt_tokens: prefill (the whole prompt), full (a
block), sub (a sub-block), commit (a block, one row read). GB/s: weights read once per forward; "weights" is the share
of the time that this alone would take at the device's measured copy bandwidth: near 100% means that only fewer or
smaller forwards can be faster.
--baseline: the same answers by benchmarks/straightforward.py, one prompt at a time, in turns with the engine's, tokens
compared; and transformers' Qwen2 of the same shape (random weights), one token a forward, greedy. With --graphs
compiled the engine with layers as written takes its turns too. --where: the share of
a full and a sub forward's time that each kind of operation takes. --every: the answers of each configuration of each
experiment (with --experiment: of that one), the forwards at full depth that they took, prefills and commits
among them, and the milliseconds for each of these.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.common import check_options, copy_bandwidth, full_depth_forwards, median_seconds, model_of
from benchmarks.straightforward import Straightforward
from fast_dllm.decode import experiments
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.compiled import CompiledExecution
from fast_dllm.network.devices import default_dtype
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import as_written, open_executor, use_graphs
from fast_dllm.network.packing import BlockRows
from fast_dllm.network.threads import fit_threads
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import resolve_model
from fast_dllm.spec.values import parse_arguments as knobs_of


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder, hub id or tiny")
    parser.add_argument("--random_weights", metavar="LAYERSxHIDDEN", help="a random model of this shape instead")
    parser.add_argument("--experiment", help="a name under experiments/ (default: the active file)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--small_block_size", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--set", default="", metavar="KNOB=VALUE,...", help="the experiment's knobs: reuse_k=2,…")
    parser.add_argument("--refresh", help="what a computing step runs: block or rows (default: the experiment's)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs; the median counts")
    parser.add_argument("--baseline", action="store_true", help="beside a straightforward form and transformers' Qwen2")
    parser.add_argument("--where", action="store_true", help="what kinds of operations the time goes to")
    parser.add_argument("--every", action="store_true", help="each configuration of each (or that) experiment")
    parser.add_argument("--graphs", default="off", help="off (default), or compiled: the layers, on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: see fast_dllm/network/threads.py)")
    arguments = parser.parse_args()
    check_options(arguments, "batch_size", "small_block_size", "prompt_tokens", "new_tokens", "runs", "threads")
    arguments.set = knobs_of(arguments.set, "--set") if arguments.set else {}
    if not arguments.random_weights:
        resolve_model(arguments.model, Path.cwd())
    return arguments


def qwen2_like(model: FastDLLMForCausalLM) -> Any:
    """transformers' Qwen2 of the model's shape, dtype and device, with random weights."""
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
    config = Qwen2Config(**{name: getattr(model.config, name) for name in names})
    with model.device, default_dtype(model.dtype):
        return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@torch.inference_mode()
def time_forwards(model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int) -> dict[str, float]:
    """Seconds of one forward of each kind over the whole batch."""
    batch, sub = arguments.batch_size, arguments.small_block_size
    prefix = max(arguments.prompt_tokens // block, 1) * block
    executor = open_executor(model, batch, prefix + block, block, shared=False)
    prompt = torch.randint(3, 300, (prefix,)).tolist()
    rows = list(range(batch))

    def prefill() -> None:
        executor.cache.lengths = [0] * batch
        executor.prefill(rows, [prompt] * batch, read=[prefix - 1] * batch)

    def run(offset: int, width: int, read: list[int]) -> None:
        executor.run_block(BlockRows(rows, [prompt[:width]] * batch, [offset] * batch, [read] * batch))

    work = {
        "prefill": prefill,
        "full": lambda: run(0, block, list(range(sub))),
        "sub": lambda: run(sub, sub, list(range(sub))),
        "commit": lambda: run(0, block, [block - 1]),
    }
    return {kind: median_seconds(once, arguments.runs * 4, model.device) for kind, once in work.items()}


def random_prompts(model: FastDLLMForCausalLM, arguments: argparse.Namespace) -> list[list[int]]:
    shape = (arguments.batch_size, arguments.prompt_tokens)
    top = min(model.config.vocab_size, 300)
    return torch.randint(3, top, shape, generator=torch.Generator().manual_seed(0)).tolist()


def answer_settings(model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int) -> dict[str, Any]:
    """The settings of both forms."""
    return {
        "mask_id": model.config.vocab_size - 1,
        "stop_token": model.config.vocab_size - 2,  # random prompts rarely lead there: answers run their full length
        "max_new_tokens": arguments.new_tokens // block * block,
        "block_size": block,
        "small_block_size": arguments.small_block_size,
        "threshold": arguments.threshold,
    } | ({"refresh": arguments.refresh} if arguments.refresh else {})


def time_against_straightforward(
    model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int
) -> dict[str, Any]:
    """Tokens/s of the engine and of the straightforward form, in turns, for the same prompts; how many are equal. With
    compiled layers also of the engine without them ("as written")."""
    settings = answer_settings(model, arguments, block)
    engine, plain = experiments.load("00_baseline"), Straightforward(model)
    settings.setdefault("refresh", "block")
    prompts = random_prompts(model, arguments)
    # Both forms wait for what they read back. On one thread, processor time does not depend on other processes.
    clock = time.process_time if model.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    answers: dict[str, list[list[int]]] = {}

    def by_engine() -> list[list[int]]:
        return [each.tokens for each in engine.generate(model, prompts, **settings)]

    def by_straightforward() -> list[list[int]]:
        return [plain.generate(prompt, **settings) for prompt in prompts]

    def by_written_layers() -> list[list[int]]:
        with as_written(model):
            return by_engine()

    ways = {"engine": by_engine, "straightforward": by_straightforward}
    if isinstance(model.execution, CompiledExecution):
        ways["as written"] = by_written_layers
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(arguments.runs + 1):  # the first does not count
        for name, way in ways.items():
            began = clock()
            answers[name] = way()
            seconds[name] += [clock() - began] if run else []
    tokens = sum(map(len, answers["engine"]))
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    ratios, equal = {}, {}
    for name in set(ways) - {"engine"}:
        ratios[name] = statistics.median(a / b for a, b in zip(seconds[name], seconds["engine"], strict=True))
        equal[name] = sum(a == b for a, b in zip(answers["engine"], answers[name], strict=True))
    return {"tokens_per_second": rates, "ratios": ratios, "equal_answers": equal, "answers": len(prompts)}


def time_qwen2(model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int) -> float:
    """Tokens/s of transformers' Qwen2 of the same shape with random weights: greedy, cached, one token a forward."""
    peer = qwen2_like(model)
    ids = torch.tensor(random_prompts(model, arguments), device=model.device)
    count = arguments.new_tokens // block * block

    def answer() -> None:
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            eos_token_id=None,
        )

    return len(ids) * count / median_seconds(answer, arguments.runs, model.device)


# the torch operations of a forward -> what they are part of; the first that an operation's name contains
PARTS = (
    ("attention", ("scaled_dot_product", "flash", "efficient_attention")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "gemm", "aten::matmul")),
    ("norms", ("rms_norm", "aten::pow", "aten::rsqrt", "aten::sum", "aten::mean")),
    ("cache", ("index_copy", "index_select")),
    ("softmax and argmax", ("softmax", "argmax", "masked_fill", "isfinite")),
    (
        "element by element, copies",
        ("aten::mul", "aten::add", "aten::silu", "aten::cat", "aten::roll", "copy", "clone"),
    ),
)


@torch.inference_mode()
def where_time_goes(
    model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int
) -> dict[str, dict[str, float]]:
    """Shares of the self time of a step (a forward and what it predicts), by kind of operation; the rest is views,
    indices and Python. The profiler itself slows small operations; it cannot look into compiled layers, so that these
    are run as written."""
    from torch.profiler import ProfilerActivity, profile

    batch, sub = arguments.batch_size, arguments.small_block_size
    prefix = max(arguments.prompt_tokens // block, 1) * block
    executor = EagerExecutor(model, model.new_cache(batch, prefix + block, block))
    executor.cache.lengths = [prefix] * batch
    on_gpu = model.device.type == "cuda"
    shares: dict[str, dict[str, float]] = {}
    for kind, width in (("full", block), ("sub", sub)):

        def step(width: int = width) -> None:
            ids = [list(range(3, 3 + width))] * batch
            rows = BlockRows(list(range(batch)), ids, [0] * batch, [list(range(sub))] * batch)
            logits = executor.run_block(rows)
            executor.greedy(logits.flatten(0, 1), model.config.vocab_size - 1).tolist()

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        step()
        with profile(activities=activities) as profiled:
            for _ in range(arguments.runs):
                step()
        times: dict[str, float] = {name: 0.0 for name, _ in PARTS} | {"views, indices, other": 0.0}
        for event in profiled.key_averages():
            part = next((name for name, words in PARTS if any(word in event.key for word in words)), None)
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[part or "views, indices, other"] += spent
        whole = sum(times.values())
        shares[kind] = {name: value / whole for name, value in times.items()}
    return shares


def time_answers(
    model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int, experiment: str | None, knobs: Mapping
) -> dict[str, Any]:
    """Tokens/s of whole answers to random prompts, with the forwards they took."""
    generation = experiments.load(experiment)
    prompts = random_prompts(model, arguments)
    settings = answer_settings(model, arguments, block) | dict(knobs)
    if "refresh" not in generation.knobs:
        settings.pop("refresh", None)
    answers: list[Any] = []

    def answer() -> None:
        answers[:] = generation.generate(model, prompts, **settings)

    seconds = median_seconds(answer, arguments.runs, model.device)
    tokens = sum(len(generation.tokens) for generation in answers)
    forwards = {kind: sum(generation.forwards[kind] for generation in answers) for kind in answers[0].forwards}
    return {
        "seconds": seconds,
        "new_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "forwards": forwards,
        "full_depth_forwards": full_depth_forwards(model, answers),
    }


def time_every(model: FastDLLMForCausalLM, arguments: argparse.Namespace, block: int) -> Iterator[tuple[str, dict]]:
    """`time_answers` of each configuration, under the name EXPERIMENT CONFIGURATION."""
    for experiment in [arguments.experiment] if arguments.experiment else experiments.available():
        for name, knobs in matrix_of(experiment, experiments.ROOT).configurations.items():
            label = f"{experiment} {name}"
            try:
                yield label, time_answers(model, arguments, block, experiment, arguments.set | dict(knobs))
            except ValueError as error:
                raise UsageError(f"{label}: {error}") from error


def main() -> None:
    arguments = parse_arguments()
    model = model_of(arguments)
    device = model.device
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        else:
            fit_threads(model)
        use_graphs(model, arguments.graphs, several=arguments.batch_size > 1)
        block = model.config.bd_size
        seconds = time_forwards(model, arguments, block)
        answers = time_answers(model, arguments, block, arguments.experiment, arguments.set)
    except ValueError as error:
        raise UsageError(str(error)) from error
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    at_best = weight_bytes / copy_bandwidth(device)
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name, peak = (
            f"CPU, {torch.get_num_threads()} threads",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    model_name = arguments.random_weights or arguments.model
    print(
        f"{model_name} ({weight_bytes / 2**20:.0f} MiB {str(model.dtype)[6:]}) on {name}, batch {arguments.batch_size}"
    )
    print(f"{'forward':>8} {'ms':>9} {'forwards/s':>11} {'GB/s':>7} {'weights':>8}")
    for kind, value in seconds.items():
        rate = weight_bytes / value / 1e9
        print(f"{kind:>8} {value * 1e3:9.2f} {1 / value:11.1f} {rate:7.1f} {at_best / value:8.1%}")
    forwards = ", ".join(f"{kind} {count}" for kind, count in answers["forwards"].items() if count)
    print(f"answers: {answers['new_tokens']} tokens, {answers['tokens_per_second']:.1f} tokens/s ({forwards})")
    print(f"peak memory: {peak / 2**20:.0f} MiB")
    report: dict[str, Any] = {"forward_seconds": seconds, "answers": answers, "peak_memory_bytes": peak}
    report["weight_bytes"], report["copy_bytes_per_second"] = weight_bytes, weight_bytes / at_best
    if arguments.every:
        report["every"] = {}
        print(f"{'tokens/s':>9} {'full-depth forwards':>20} {'ms each':>8}")
        for label, timed in time_every(model, arguments, block):
            report["every"][label] = timed
            num_forwards = timed["full_depth_forwards"]
            each = 1e3 * timed["seconds"] / num_forwards
            print(f"{timed['tokens_per_second']:9.1f} {num_forwards:20.1f} {each:8.2f}  {label}", flush=True)
    if arguments.baseline:
        compared = report["baseline"] = time_against_straightforward(model, arguments, block)
        compared["qwen2_tokens_per_second"] = time_qwen2(model, arguments, block)
        rates = compared["tokens_per_second"]
        for name, ratio in compared["ratios"].items():
            print(
                f"{name}: {rates[name]:.1f} tokens/s, the engine beside it {rates['engine']:.1f}: "
                f"{ratio:.2f} times; {compared['equal_answers'][name]} of {compared['answers']} answers equal"
            )
        print(f"transformers' Qwen2, one token a forward: {compared['qwen2_tokens_per_second']:.1f} tokens/s")
    if arguments.where:
        report["where"] = where_time_goes(model, arguments, block)
        for kind, shares in report["where"].items():
            print(f"{kind}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    settings = {**vars(arguments), "device_name": name, "dtype": str(model.dtype)[6:]}
    print(json.dumps({"settings": settings, **report}))


if __name__ == "__main__":
    with one_line():
        main()
