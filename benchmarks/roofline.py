"""How long each benchmark takes on each GPU of the cluster at best: the tables of docs/experiments.md.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --answer_tokens gsm8k=180,minerva_math=420      # as measured: new_tokens / requests

A forward takes as long as the slower of reading and calculating, at the GPU's full rate:

    seconds(T, S) = max(bytes / bandwidth, operations / peak)
    bytes         = 2 x (weights without the embedding table) + 2 x 2 x layers x KV heads x head size x S
    operations    = 2 x T x (weights of the layers) + 2 x (weights of lm_head) x rows read + 4 x layers x C x T x S

for T rows that see S positions, in a number format of 2 bytes. A generated answer of n tokens to a prompt of p takes
one prefill of p rows and n / (tokens a forward) forwards of a 32-row block that see p + n / 2 positions on average;
a scored question takes one forward of p rows. Batch size 1, as the jobs run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.config import FastDLLMConfig
from fast_dllm.errors import UsageError
from fast_dllm.runner.tasks import TASKS as DESCRIBED

BYTES = 2  # of a float16 or bfloat16 number
WORK_BYTES = 2e9  # beside the weights: CUDA's own share, caches and activations of one long question
# By threshold. 1 is one token a forward by construction; at 0.9 the paper (arXiv 2509.26328) is 2.5 times as fast as
# autoregressive decoding, which is one token a forward too.
TOKENS_PER_FORWARD = {1.0: 1.0, 0.9: 2.5}


@dataclass(frozen=True)
class GPU:
    """memory: GB. bandwidth: GB/s. peak: TFLOP/s of its tensor cores in 16 bits, dense, with float32 sums.

    From NVIDIA's Turing white paper (Quadro RTX 6000) and the data sheets of the V100, L40S, A100, H100 and H200.
    """

    name: str
    capability: str
    memory: int
    bandwidth: int
    peak: float
    note: str = ""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.capability >= "8.0" else "float16"


GPUS = (
    GPU("RTX 6000", "7.5", 24, 672, 130.5),
    GPU("V100 PCIe 16 GB", "7.0", 16, 900, 112),
    GPU("V100 PCIe 32 GB", "7.0", 32, 900, 112, "with a torch that has code for it"),
    GPU("L40S", "8.9", 48, 864, 362),
    GPU("A100 SXM 40 GB", "8.0", 40, 1555, 312),
    GPU("A100 SXM 80 GB", "8.0", 80, 2039, 312),
    GPU("H100 SXM", "9.0", 80, 3350, 989),
    GPU("H200 SXM", "9.0", 141, 4800, 989),
)


@dataclass(frozen=True)
class Task:
    """questions, choices: counts (1 choice: generation). prompt, answer: mean tokens, 0 where no time is told."""

    name: str
    questions: int
    choices: int = 1
    fewshot: int = 0
    prompt: int = 0
    answer: int = 0


TASKS = tuple(
    Task(task.name, task.questions, task.choices, task.num_fewshot, task.prompt_tokens or 0, task.answer_tokens or 0)
    for task in DESCRIBED.values()
    if not task.code and task.questions is not None
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights: of all layers, and of the embedding table (lm_head has as many)."""

    layers: int
    table: int
    config: FastDLLMConfig

    @classmethod
    def of(cls, config: FastDLLMConfig) -> Sizes:
        C, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        attention = 2 * C * C + 2 * C * kv + C + 2 * kv  # q, o; k, v; the three biases
        layer = attention + 3 * C * config.intermediate_size + 2 * C  # MLP, two norms
        return cls(config.num_hidden_layers * layer + C, config.vocab_size * C, config)

    @property
    def total_bytes(self) -> int:
        return BYTES * (self.layers + (1 if self.config.tie_word_embeddings else 2) * self.table)

    def seconds(self, gpu: GPU, rows: int, seen: float, rows_read: int) -> float:
        """Of one forward of `rows` rows that see `seen` positions each, `rows_read` of which get logits."""
        config = self.config
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * seen
        read = BYTES * (self.layers + self.table + cached)
        attention = 4 * config.num_hidden_layers * config.hidden_size * rows * seen
        operations = 2 * rows * self.layers + 2 * rows_read * self.table + attention
        return max(read / (gpu.bandwidth * 1e9), operations / (gpu.peak * 1e12))

    def task_seconds(self, gpu: GPU, task: Task, threshold: float) -> float:
        if task.choices > 1:  # the choices' first tokens are read in one forward
            return task.questions * self.seconds(gpu, task.prompt, task.prompt, 1)
        block = self.config.bd_size
        forwards = task.answer / TOKENS_PER_FORWARD[threshold]
        step = self.seconds(gpu, block, task.prompt + task.answer / 2, block)
        return task.questions * (self.seconds(gpu, task.prompt, task.prompt, 1) + forwards * step)

    def fits(self, gpu: GPU) -> bool:
        return self.total_bytes + WORK_BYTES <= gpu.memory * 1e9


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


def told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_table(sizes: Sizes, tasks: tuple[Task, ...]) -> list[str]:
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
                told(sizes.task_seconds(gpu, task, threshold))
                for threshold in ((1.0,) if task.choices > 1 else (1.0, 0.9))
            )
            for task in timed
        ]
        if not sizes.fits(gpu):
            cells = ["does not fit"] * len(timed)
        name = f"{gpu.name} ({gpu.note})" if gpu.note else gpu.name
        lines.append(row(name, gpu.dtype, gpu.bandwidth, f"{gpu.peak:g}", f"{block * 1e3:.1f} ms", *cells))
    return lines


def with_answer_tokens(given: str) -> tuple[Task, ...]:
    """TASKS with the answers' mean tokens that "task=number,..." gives. Raises UsageError."""
    numbers = {}
    names = [task.name for task in TASKS if task.answer]
    for part in filter(None, given.split(",")):
        name, _, number = part.partition("=")
        if name not in names or not number.isdecimal() or not int(number):
            raise UsageError(
                f"--answer_tokens takes TASK=N with N from 1 and TASK one of {', '.join(names)}, not {part!r}"
            )
        numbers[name] = int(number)
    return tuple(replace(task, answer=numbers.get(task.name, task.answer)) for task in TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer_tokens", default="", metavar="TASK=N[,...]", help="mean tokens of an answer")
    try:
        tasks = with_answer_tokens(parser.parse_args().answer_tokens)
    except UsageError as error:
        print(f"roofline.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join([*task_table(), "", *time_table(Sizes.of(FastDLLMConfig()), tasks)]))


if __name__ == "__main__":
    main()
