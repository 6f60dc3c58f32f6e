"""What graphs, fused products and compiled kernels give on a GPU, for a random model of the 7B's shape; JSON last.

    python -m benchmarks.gpu                       # everything, a few minutes
    python -m benchmarks.gpu --only forwards,batch --random_weights 36x512 --device cpu    # a trial without a GPU

forwards: one sequence at 512 tokens of context, ms by kind of forward, each means added to those before. tokens: the
same answers with recorded forwards, with unrecorded ones of the same padded shapes, and with those of exact lengths.
batch: 32 sequences against one. experiments: every experiment at k = 1, 2, 3, and the time that its forwards predict.
context: ms and memory (allocated by torch, and taken from the driver) against the context's length. where: the
kernels that one forward's time goes to. lookahead: a forward of 1, 2, 4 and 8 states of each sequence, and answers of
06_lookahead beside plain decoding in unrecorded forwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.common import (
    check_options,
    copy_bandwidth,
    full_depth_forwards,
    random_model,
    tiny_settings,
    toy_prompts,
)
from fast_dllm.decode import experiments
from fast_dllm.decoding import MOST_STATES
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network import kernels
from fast_dllm.network.devices import pick_device, pick_dtype
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import open_executor, use_graphs, use_padded_shapes
from fast_dllm.network.packing import BlockRows, Candidate

SECTIONS = ("forwards", "tokens", "batch", "experiments", "context", "where", "lookahead")
BLOCK, SUB = 32, 8


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random_weights", default="7b", metavar="SHAPE", help="as in benchmarks.decode")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--context", type=int, default=512, help="tokens before the block and in it")
    parser.add_argument("--longest_context", type=int, default=16384)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=16, help="of toy_math, for the section tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    for name in arguments.only:
        if name not in SECTIONS:
            raise UsageError(f"--only takes {', '.join(SECTIONS)}, not {name!r}")
    check_options(arguments, "context", "batch_size", "new_tokens", "questions")
    return arguments


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        if arguments.device == "auto" and not torch.cuda.is_available():
            raise UsageError("no CUDA GPU here; --device cpu --random_weights 36x64 tries the benchmark on a CPU")
        self.device = pick_device(arguments.device)
        self.dtype = pick_dtype(arguments.dtype, self.device)
        self.model = random_model(arguments.random_weights, self.device, self.dtype)
        config = self.model.config
        read = sum(p.numel() for p in self.model.parameters()) - (
            0 if config.tie_word_embeddings else self.model.model.embed_tokens.weight.numel()
        )
        self._fused = False
        self.weight_bytes = read * self.model.lm_head.weight.element_size()
        self.bandwidth = copy_bandwidth(self.device)
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "dtype": str(self.dtype)[6:],
            "shape": arguments.random_weights,
            "weight_gigabytes": self.weight_bytes / 1e9,
            "copy_gigabytes_per_second": self.bandwidth / 1e9,
        }

    # -- pieces ------------------------------------------------------------------------------------------------------
    def fuse(self) -> None:
        if not self._fused:
            self.model.fuse()
            self._fused = True

    def as_shipped(self) -> None:
        """The form in which a model is loaded on this device, nothing recorded yet."""
        if self.device.type == "cuda":
            self.fuse()
            torch.cuda.empty_cache()
        use_graphs(self.model, "auto")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        randomness = torch.Generator().manual_seed(0)
        return torch.randint(3, min(self.model.config.vocab_size, 300), (count, length), generator=randomness).tolist()

    def answers(self, model: FastDLLMForCausalLM, prompts: list[list[int]], name: str | None = None, **knobs: Any):
        experiment = experiments.load(name)
        size = model.config.vocab_size
        settings: dict[str, Any] = {"mask_id": size - 1, "stop_token": size - 2, "block_size": BLOCK}
        settings |= {"max_new_tokens": self.arguments.new_tokens, "threshold": 1.0} | knobs
        return experiment.generate(model, prompts, **settings)

    def timed_answers(self, prompts: list[list[int]], name: str | None = None, **knobs: Any) -> tuple[float, list]:
        """Seconds of the third of equal runs, or of the first after it, up to the sixth, that recorded nothing."""
        seconds, generations = 0.0, []
        for run in range(6):
            recorded = self._recorded()
            self.synchronize()
            began = time.perf_counter()
            generations = self.answers(self.model, prompts, name, **knobs)
            self.synchronize()
            seconds = time.perf_counter() - began
            if run >= 2 and self._recorded() == recorded:
                break
        return seconds, generations

    def _recorded(self) -> int:
        return self.model.execution.counts.get("recorded", 0) if self.model.execution else 0

    @torch.inference_mode()
    def step_seconds(
        self, context: int, batch: int, width: int, read: int, runs: int = 20, states: int | None = None
    ) -> float:
        """Median seconds of one step as the engine takes it: a forward of `width` rows, `read` of them put through the
        head, what they predict, and its transfer. states: of each sequence, as candidates."""
        length = max(context // BLOCK, 1) * BLOCK
        rows = [row for row in range(batch) for _ in range(states or 1)]
        candidates = [Candidate(row * MOST_STATES + index % (states or 1)) for index, row in enumerate(rows)]
        block = BlockRows(
            rows,
            [list(range(3, 3 + width))] * len(rows),
            [0] * len(rows),
            [list(range(read))] * len(rows),
            candidates if states else None,
        )
        mask_id = self.model.config.vocab_size - 1
        seconds = []
        with open_executor(self.model, batch, length, BLOCK) as executor:
            executor.cache.lengths[:batch] = [length - BLOCK] * batch
            for run in range(runs + 5):
                self.synchronize()
                began = time.perf_counter()
                executor.greedy(executor.run_block(block).flatten(0, 1), mask_id).tolist()
                if run >= 5:
                    seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    def kinds(self, context: int, batch: int = 1) -> dict[str, float]:
        """ms of a forward of each kind."""
        shapes = {"full": (BLOCK, SUB), "sub": (SUB, SUB), "commit": (BLOCK, 1)}
        return {kind: 1e3 * self.step_seconds(context, batch, *shape) for kind, shape in shapes.items()}

    # -- sections ----------------------------------------------------------------------------------------------------
    def forwards(self) -> Iterator[str]:
        results: dict[str, dict[str, float]] = {}
        at_best = self.weight_bytes / self.bandwidth
        # (compiled, graphs): compiled kernels are for recorded forwards alone
        steps = {
            "as written": (False, "off"),
            "and fused products": (False, "off"),
            "and graphs": (False, "auto"),
            "and compiled kernels": (True, "auto"),
        }
        for name, (compiled, graphs) in steps.items():
            if name != "as written":
                self.fuse()
            kernels.compiled_on_cuda.is_enabled = compiled
            use_graphs(self.model, graphs)
            results[name] = self.kinds(self.arguments.context)
            yield f"{name:>21}  " + "  ".join(
                f"{kind} {ms:6.2f} ms {1e3 / ms:6.1f}/s {at_best * 1e3 / ms:4.0%}" for kind, ms in results[name].items()
            )
        self.results["forwards"] = results

    def tokens(self) -> Iterator[str]:
        results: dict[str, Any] = {}
        tiny = load_model("tiny", str(self.device), str(self.dtype)[6:])
        questions = toy_prompts(self.arguments.questions)
        cases: list[tuple[str, FastDLLMForCausalLM, list[list[int]], dict]] = [
            ("random", self.model, self.prompts(8, 96), {}),
            ("random, residual", self.model, self.prompts(4, 96),
             {"name": "02_residual_reuse", "reuse_k": 2, "layer_subset": "middle"}),
            ("embedded", tiny.fuse(), questions, tiny_settings()),
            ("embedded, rows", tiny, questions, tiny_settings() | {"refresh": "rows"}),
        ]  # fmt: skip
        for name, model, prompts, knobs in cases:
            tokens: dict[str, list[list[int]]] = {}
            for mode in ("auto", "off", "padded"):
                if mode == "padded":
                    use_padded_shapes(model)
                else:
                    use_graphs(model, mode)
                tokens[mode] = [
                    answer.tokens for prompt in prompts for answer in self.answers(model, [prompt], **knobs)
                ]
                if mode == "auto" and model.execution:
                    results[f"{name}: parts"] = model.execution.counts
            same = sum(a == b for a, b in zip(tokens["auto"], tokens["padded"], strict=True))
            plain = sum(a == b for a, b in zip(tokens["auto"], tokens["off"], strict=True))
            results[name] = {"answers": len(prompts), "as padded": same, "as off": plain}
            yield f"{name}: {results[name]} {results.get(f'{name}: parts')}"
            use_graphs(model, "auto")
        self.results["tokens"] = results

    def batch(self) -> Iterator[str]:
        results: dict[str, Any] = {}
        size = self.arguments.batch_size
        context = self.arguments.context
        for refresh in ("rows", "block"):
            for batch in (1, size):
                seconds, generations = self.timed_answers(self.prompts(batch, context - BLOCK), refresh=refresh)
                tokens = sum(len(answer.tokens) for answer in generations)
                results[f"{refresh} {batch}"] = {"seconds": seconds, "tokens_per_second": tokens / seconds}
                counts = self.model.execution.counts if self.model.execution else {}
                yield f"refresh={refresh}, batch {batch}: {tokens / seconds:.1f} tokens/s {counts}"
        for batch in sorted({each for each in (1, 2, 4, 8, 16) if each < size} | {size}):
            kinds = self.kinds(context, batch)
            results[f"forwards {batch}"] = kinds
            flops = 2 * self.weight_bytes / self.model.lm_head.weight.element_size() * batch * BLOCK
            line = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in kinds.items())
            yield f"batch {batch}: {line}; full {flops / kinds['full'] / 1e9:.0f} TFLOP/s"
        self.results["batch"] = results

    def experiments(self) -> Iterator[str]:
        results: dict[str, Any] = {}
        prompts = self.prompts(1, self.arguments.context - BLOCK - self.arguments.new_tokens)
        cases: list[tuple[str, dict]] = [("00_baseline", {})]
        cases += [("00_baseline", {"refresh": "rows"})]
        for k in (2, 3):
            cases += [("00_baseline", {"reuse_k": k, "layer_subset": "middle"})]
            cases += [("01_adaptive_skip", {"reuse_k": k, "reread_above": 0.0})]
            for subset in ("first", "middle", "last"):
                cases += [("02_residual_reuse", {"reuse_k": k, "layer_subset": subset})]
            cases += [("02_residual_reuse", {"reuse_k": k, "layer_subset": "middle", "tolerance": 0.1})]
        cases += [("03_carry_rows", {}), ("03_carry_rows", {"reread_above": 0.0})]
        base = 0.0
        for name, knobs in cases:
            seconds, generations = self.timed_answers(prompts, name, **knobs)
            tokens = sum(len(answer.tokens) for answer in generations)
            full_depth = full_depth_forwards(self.model, generations)
            forwards = {kind: count for kind, count in generations[0].forwards.items() if count}
            base = base or seconds / full_depth
            label = f"{name} " + " ".join(f"{key}={value}" for key, value in knobs.items())
            results[label] = {
                "tokens_per_second": tokens / seconds,
                "forwards": forwards,
                "full_depth_forwards": full_depth,
                "seconds": seconds,
                "predicted_seconds": base * full_depth,
            }
            yield (
                f"{label}: {tokens / seconds:.1f} tokens/s, {full_depth:.1f} forwards at full depth, "
                f"{seconds / (base * full_depth):.2f} of the time these predict; {forwards}"
            )
        self.results["experiments"] = results

    def context(self) -> Iterator[str]:
        results = {}
        context = 512
        while context <= self.arguments.longest_context:
            self.as_shipped()  # the memory is that of this context alone
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            results[context] = self.kinds(context)
            if self.device.type == "cuda":
                free, total = torch.cuda.mem_get_info(self.device)
                results[context]["peak_gigabytes"] = torch.cuda.max_memory_allocated(self.device) / 1e9
                results[context]["taken_gigabytes"] = (total - free) / 1e9
            yield f"context {context}: " + ", ".join(f"{key} {value:.2f}" for key, value in results[context].items())
            context *= 2
        self.results["context"] = results

    def lookahead(self) -> Iterator[str]:
        results: dict[str, Any] = {}
        for batch in sorted({min(each, self.arguments.batch_size) for each in (1, 4, 16)}):
            for context in (512, 2048):
                ms = {str(n): 1e3 * self.step_seconds(context, batch, BLOCK, BLOCK, states=n) for n in (1, 2, 4, 8)}
                ms["plain"] = 1e3 * self.step_seconds(context, batch, BLOCK, SUB)
                results[f"forward, batch {batch}, context {context}"] = ms
                line = ", ".join(f"{states} {each:.2f} ms" for states, each in ms.items())
                yield f"batch {batch}, context {context}, states: {line}"
        tiny = load_model("tiny", str(self.device), str(self.dtype)[6:]).fuse()
        questions, settings = toy_prompts(self.arguments.questions), tiny_settings() | {"threshold": 1.0}
        use_padded_shapes(tiny)
        plain = [self.answers(tiny, [prompt], **settings)[0] for prompt in questions]
        use_graphs(tiny, "auto")
        for states in (1, 2, 4, 8):
            knobs = settings | {"name": "06_lookahead", "states": states}
            self.synchronize()
            began = time.perf_counter()
            generations = [self.answers(tiny, [prompt], **knobs)[0] for prompt in questions]
            self.synchronize()
            seconds = time.perf_counter() - began
            same = sum(a.tokens == b.tokens for a, b in zip(generations, plain, strict=True))
            forwards = sum(each.forwards[kind] for each in generations for kind in ("full", "commit"))
            results[f"answers, {states} states"] = {"same": same, "forwards": forwards, "seconds": seconds}
            yield f"{states} states: {same} of {len(plain)} answers equal, {forwards} forwards, {seconds:.1f} s"
        self.results["lookahead"] = results

    def where(self) -> Iterator[str]:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        for width in (SUB, BLOCK):
            self.step_seconds(self.arguments.context, 1, width, SUB)
            with profile(activities=activities) as profiled:
                self.step_seconds(self.arguments.context, 1, width, SUB, runs=5)
            table = profiled.key_averages().table(
                sort_by="self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total",
                row_limit=24,
                max_name_column_width=70,
            )
            yield from (line[:72] + line[-75:] if len(line) > 150 else line for line in table.splitlines())


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    print(json.dumps(bench.results), flush=True)
    for name in arguments.only:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            if name != "forwards":  # it adds one means after another
                bench.as_shipped()
            for line in getattr(bench, name)():
                print(line, flush=True)
        except Exception:
            traceback.print_exc()  # the other sections are worth their minutes
            bench.results.setdefault("failed", []).append(name)
        print(f"   {time.perf_counter() - began:.1f} s", flush=True)
        if arguments.json:
            with contextlib.suppress(OSError):
                arguments.json.write_text(json.dumps(bench.results, indent=1))
    print(json.dumps(bench.results))


if __name__ == "__main__":
    with one_line():
        main()
