"""Two ways to answer many questions in a fixed number of rows: by batches, or by refilling free rows; a JSON line last.

    python -m benchmarks.batches                        # 256 questions of toy_math, the embedded model, 32 rows
    python -m benchmarks.batches --refresh block --questions 1200
    python -m benchmarks.batches --graphs compiled      # and the layers as written

The ways answer the same questions in turns, and the number of equal answers is printed. forwards: of the model, each
counted once for all its rows, because a GPU's time depends on it; rows: in a forward, on average. seconds: processor
time, which does not depend on other processes. products: the time of the linear layers of these forwards alone, at the
same shapes and with the weights of each layer; "share": this time over the whole time; "+ attention" adds the two
products of each attention, queries by keys and weights by values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch
from torch import nn

from benchmarks.common import check_options, tiny_settings, toy_prompts
from fast_dllm.decode import experiments
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.cache import Attend
from fast_dllm.network.compiled import CompiledExecution, CompiledExecutor
from fast_dllm.network.devices import pick_device
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import as_written, use_graphs


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=256, help="of toy_math's test split")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--refresh", default="rows")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--graphs", default="auto", help="as of the model; compiled: beside layers as written, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    check_options(arguments, "questions", "batch_size", "runs", "threads")
    return arguments


@contextmanager
def shapes_run(model: FastDLLMForCausalLM) -> Iterator[Counter[tuple[str, int, int, int]]]:
    """Within this context, count forwards and products of the head by (part, sequences, rows of each, keys)."""
    counts: Counter[tuple[str, int, int, int]] = Counter()

    def counting(run_network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(executor: EagerExecutor, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
            counts["forward", ids.shape[0], ids.shape[1], attend.num_keys] += 1
            return run_network(executor, ids, attend)

        return run

    def head(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts["head", 1, inputs[0].shape[:-1].numel(), 0] += 1

    handle = model.lm_head.register_forward_hook(head)
    with ExitStack() as patches:
        for executor in (EagerExecutor, CompiledExecutor):  # a hook would not see compiled layers
            patches.enter_context(patch.object(executor, "run_network", counting(executor.run_network)))
        try:
            yield counts
        finally:
            handle.remove()


@torch.inference_mode()
def product_seconds(model: FastDLLMForCausalLM, counts: Counter[tuple[str, int, int, int]]) -> tuple[float, float]:
    """Processor seconds of these forwards' matrix products alone, of random numbers at their shapes: of the linear
    layers, with each layer's own weights, and of attention."""
    config = model.config
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    linears: dict[str, list[nn.Linear]] = {
        "forward": [module for module in model.model.modules() if isinstance(module, nn.Linear)],
        "head": [model.lm_head],
    }
    by_linears = by_attention = 0.0
    for (part, sequences, rows, num_keys), times in counts.items():
        inputs = {linear.in_features: torch.randn(sequences * rows, linear.in_features) for linear in linears[part]}
        began = time.process_time()
        for linear in linears[part]:
            linear(inputs[linear.in_features])
        by_linears += times * (time.process_time() - began)
        if not num_keys:  # the head
            continue
        queries = torch.randn(sequences, heads, groups * rows, config.head_dim)
        keys = torch.randn(sequences, heads, num_keys, config.head_dim)
        weights = torch.randn(sequences, heads, groups * rows, num_keys)
        began = time.process_time()
        for _ in range(config.num_hidden_layers):
            queries @ keys.mT
            weights @ keys
        by_attention += times * (time.process_time() - began)
    return by_linears, by_attention


@dataclass
class Measured:
    """What was measured of one way. seconds: of each run; products: seconds of its matrix products (linear layers,
    attention), measured after each run; counts: what ran, by shape; answers: the new tokens of each question."""

    seconds: list[float] = field(default_factory=list)
    products: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[tuple[str, int, int, int]] = field(default_factory=Counter)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def facts(self) -> dict[str, float]:
        """The values for the JSON line."""
        ran = [(sequences * rows, n) for (part, sequences, rows, _), n in self.counts.items() if part == "forward"]
        linear, attention = (statistics.median(each) for each in zip(*self.products, strict=True))
        return {
            "seconds": self.median,
            "tokens_per_second": sum(map(len, self.answers)) / self.median,
            "forwards": sum(n for _, n in ran),
            "rows": sum(rows * n for rows, n in ran),
            "product_seconds": linear,
            "product_share": linear / self.median,
            "attention_product_seconds": attention,
            "all_products_share": (linear + attention) / self.median,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Measured]:
    """Measure each way of answering the questions, in turns. Raises UsageError."""
    model = load_model("tiny", arguments.device, arguments.dtype)
    use_graphs(model, arguments.graphs, several=arguments.batch_size > 1)
    experiment = experiments.load(None)
    settings = tiny_settings() | {
        "max_new_tokens": 256,
        "threshold": arguments.threshold,
        "refresh": arguments.refresh,
    }
    prompts, size = toy_prompts(arguments.questions), arguments.batch_size

    def timed(generate: Callable[[], list[Any]]) -> tuple[float, list[list[int]]]:
        began = time.process_time()
        answers = generate()
        return time.process_time() - began, [each.tokens for each in answers]

    def batch_by_batch() -> list[Any]:
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return [each for batch in batches for each in experiment.generate(model, batch, **settings)]

    def continuous() -> list[Any]:
        return experiment.generate(model, prompts, num_rows=size, **settings)

    def by_written_layers() -> list[Any]:
        with as_written(model):
            return continuous()

    ways: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {
        "batch by batch": lambda: timed(batch_by_batch),
        "continuous": lambda: timed(continuous),
    }
    if isinstance(model.execution, CompiledExecution):
        ways["as written"] = lambda: timed(by_written_layers)
    measured = {name: Measured() for name in ways}
    for name, way in ways.items():  # which also warms up
        with shapes_run(model) as measured[name].counts:
            _, measured[name].answers = way()
    for _ in range(arguments.runs):
        for name, way in ways.items():  # in turns: a machine's speed changes
            measured[name].seconds.append(way()[0])
            measured[name].products.append(product_seconds(model, measured[name].counts))
    return measured


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    try:
        measured = measure(arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    same = sum(
        all(each == answers[0] for each in answers)
        for answers in zip(*(way.answers for way in measured.values()), strict=True)
    )
    tokens = sum(map(len, measured["continuous"].answers))
    print(
        f"{arguments.questions} questions, {tokens} tokens, on {pick_device(arguments.device)}, "
        f"{arguments.threads} threads, {arguments.batch_size} rows, refresh={arguments.refresh}; equal answers: {same}"
    )
    print(
        f"{'':>14} {'forwards':>9} {'rows':>7} {'seconds':>8} {'tokens/s':>9} {'products s':>11} {'share':>6} "
        f"{'+ attention':>11}"
    )
    report: dict[str, Any] = {"settings": vars(arguments), "equal_answers": same, "new_tokens": tokens}
    for name, way in measured.items():
        facts = report[name] = way.facts()
        facts["continuous_is_times"] = way.median / measured["continuous"].median
        print(
            f"{name:>14} {facts['forwards']:9} {facts['rows'] / facts['forwards']:7.0f} {facts['seconds']:8.2f} "
            f"{facts['tokens_per_second']:9.1f} {facts['product_seconds']:11.2f} {facts['product_share']:6.0%} "
            f"{facts['all_products_share']:11.0%}"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    with one_line():
        main()
