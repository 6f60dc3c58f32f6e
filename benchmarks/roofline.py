"""How long each benchmark takes on each GPU of the cluster at best: the tables of docs/experiments.md.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --answer_tokens gsm8k=180,minerva_math=420      # as measured: new_tokens / requests

A forward takes as long as the slower of reading and calculating, at the GPU's full rate:

    seconds(T, S) = max(bytes / bandwidth, operations / peak)
    bytes         = 2 x (weights without the embedding table) + 2 x 2 x layers x KV heads x head size x S
    operations    = 2 x T x (weights of the layers) + 2 x (weights of lm_head) x rows read + 4 x layers x C x T x S

for T rows that see S positions, in a number format of 2 bytes. A generated answer of n tokens to a prompt of p takes
one prefill of p rows and n / (tokens per forward) forwards of a 32-row block that see p + n / 2 positions on average;
a scored question takes one forward of p rows. Batch size 1, as the jobs run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.runner.roofline import GPUS, TASKS, Sizes, TaskSize
from fast_dllm.spec.tasks import TASKS as DESCRIBED


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def task_table() -> list[str]:
    lines = [
        row(
            "task", "type", "accuracy: metric, filter", "examples", "prompt", "7B, threshold 1", "questions", "requests"
        ),
        row(*["---"] * 8),
    ]
    for task in TASKS:
        described = DESCRIBED[task.name]
        metric, _, kind = described.metric.partition(",")
        lines.append(
            row(
                f"`{task.name}`",
                "log-likelihood" if task.choices > 1 else "generate",
                f"`{metric}`, {'no filter' if kind == 'none' else kind}",
                task.fewshot,
                f"`{described.cue}` → boxed" if described.cue else "as it is",
                f"{described.published}" if described.published else "",
                task.questions,
                task.questions * task.choices,
            )
        )
    return lines


def duration(seconds: float) -> str:
    """A text such as 90 s, 12 min or 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_table(sizes: Sizes, tasks: tuple[TaskSize, ...]) -> list[str]:
    timed = [task for task in tasks if task.prompt]
    heads = [f"`{task.name}`" for task in timed]
    lines = [
        row("GPU", "format", "GB/s", "TFLOP/s", "a block", *heads),
        row(*["---"] * (5 + len(heads))),
    ]
    for gpu in GPUS:
        block = sizes.seconds(gpu, sizes.config.bd_size, 256, sizes.config.bd_size)
        cells = [
            " / ".join(
                duration(sizes.task_seconds(gpu, task, threshold))
                for threshold in ((1.0,) if task.choices > 1 else (1.0, 0.9))
            )
            for task in timed
        ]
        if not sizes.fits(gpu):
            cells = ["does not fit"] * len(timed)
        name = f"{gpu.name} ({gpu.note})" if gpu.note else gpu.name
        lines.append(row(name, gpu.dtype, gpu.bandwidth, f"{gpu.peak:g}", f"{block * 1e3:.1f} ms", *cells))
    return lines


def lookahead_table(sizes: Sizes, tasks: tuple[TaskSize, ...], ratios: dict[int, float]) -> list[str]:
    """Times at threshold 1 with plain decoding, then with 06_lookahead. ratios: states -> plain forwards / forwards."""
    lines = [row("GPU", "states", *(f"`{task.name}`" for task in tasks if task.prompt))]
    lines.append(row(*["---"] * len(lines[0].split(" | "))))
    block = sizes.config.bd_size
    for gpu in filter(sizes.fits, GPUS):
        for states, ratio in {1: 1.0, **ratios}.items():
            cells = []
            for task in (task for task in tasks if task.prompt):
                seconds = sizes.task_seconds(gpu, task, 1.0)
                if task.choices == 1:
                    seen, rows = task.prompt + task.answer / 2, states * block
                    saved = sizes.seconds(gpu, block, seen, block) - sizes.seconds(gpu, rows, seen, rows) / ratio
                    seconds -= task.questions * task.answer * saved
                cells.append(duration(seconds))
            lines.append(row(gpu.name, states, *cells))
    return lines


def parse_ratios(text: str) -> dict[int, float]:
    """{states: plain forwards / forwards} from "states=ratio,...". Raises UsageError."""
    try:
        ratios = {int(states): float(ratio) for states, ratio in (part.split("=") for part in text.split(",") if part)}
    except ValueError:
        ratios = {0: 0.0}
    if any(states < 1 or ratio <= 0 for states, ratio in ratios.items()):
        raise UsageError(f"--lookahead takes STATES=RATIO[,...], such as 2=1.7,4=2.4, not {text!r}")
    return ratios


def with_answer_tokens(text: str) -> tuple[TaskSize, ...]:
    """TASKS, with the mean number of answer tokens from "task=number,...". Raises UsageError."""
    numbers = {}
    names = [task.name for task in TASKS if task.answer]
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in names or not number.isdecimal() or not int(number):
            raise UsageError(
                f"--answer_tokens takes TASK=N with N from 1 and TASK one of {', '.join(names)}, not {part!r}"
            )
        numbers[name] = int(number)
    return tuple(replace(task, answer=numbers.get(task.name, task.answer)) for task in TASKS)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer_tokens", default="", metavar="TASK=N[,...]", help="mean tokens of an answer")
    parser.add_argument(
        "--lookahead",
        default="",
        metavar="STATES=RATIO[,...]",
        help="instead, times at threshold 1 with 06_lookahead, of which one forward replaces RATIO plain ones",
    )
    arguments = parser.parse_args()
    tasks, ratios = with_answer_tokens(arguments.answer_tokens), parse_ratios(arguments.lookahead)
    sizes = Sizes.of(FastDLLMConfig())
    if ratios:
        print("\n".join(lookahead_table(sizes, tasks, ratios)))
    else:
        print("\n".join([*task_table(), "", *time_table(sizes, tasks)]))


if __name__ == "__main__":
    with one_line():
        main()
