"""How long an evaluation takes at best, from the GPU's memory bandwidth and peak arithmetic, at batch size 1.

run.sh and benchmarks/roofline.py use it; benchmarks/roofline.py states the formula.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.files import read_json
from fast_dllm.spec.tasks import TASKS as DESCRIBED

BYTES = 2  # of a float16 or bfloat16 number
WORK_BYTES = 2e9  # besides the weights: CUDA itself, and the caches and activations of one long question
# By threshold. Threshold 1 gives one token per forward by construction. At 0.9 the paper (arXiv 2509.26328) is 2.5
# times as fast as autoregressive decoding, which also gives one token per forward.
TOKENS_PER_FORWARD = {1.0: 1.0, 0.9: 2.5}


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet.

    slurm: the type that a job names; if cards of one type differ, the smallest comes first. memory: GB. bandwidth:
    GB/s. peak: TFLOP/s of the tensor cores in 16 bits, dense, with float32 sums. card: a regular expression for the
    name that the driver reports.

    Sources: NVIDIA's Turing white paper (Quadro RTX 6000) and the data sheets of the V100, L40S, A100, H100 and H200.
    The numbers of the RTX PRO 6000 Blackwell are secondary reports about its Workstation Edition, not from a data sheet
    (the Server Edition has lower clocks).
    """

    slurm: str
    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: int
    peak: float
    card: str
    note: str = ""

    @property
    def dtype(self) -> str:
        """The dtype that `dtype=auto` chooses on it."""
        return "bfloat16" if self.capability >= (8, 0) else "float16"


GPUS = (
    GPU("rtx_6000", "RTX 6000", (7, 5), 24, 672, 130.5, "Quadro RTX 6000"),
    GPU("v100", "V100 PCIe 16 GB", (7, 0), 16, 900, 112, "V100.*16GB"),
    GPU("v100", "V100 PCIe 32 GB", (7, 0), 32, 900, 112, "V100.*32GB", "with a torch that has code for it"),
    GPU("l40s", "L40S", (8, 9), 48, 864, 362, "L40S"),
    GPU("a100", "A100 SXM 40 GB", (8, 0), 40, 1555, 312, "A100.*40GB"),
    GPU("a100", "A100 SXM 80 GB", (8, 0), 80, 2039, 312, "A100.*80GB"),
    GPU("h100", "H100 SXM", (9, 0), 80, 3350, 989, "H100"),
    GPU("h200", "H200 SXM", (9, 0), 141, 4800, 989, "H200"),
    GPU("rtx_pro_6000_blackwell", "RTX PRO 6000 Blackwell", (12, 0), 96, 1792, 503.8, "RTX PRO 6000 Blackwell"),
)
TYPES = tuple(dict.fromkeys(gpu.slurm for gpu in GPUS))
# The lowest compute capability that the pinned torch (constraints.txt) supports; docs/reference/pace-cluster.md.
LEAST_CAPABILITY = (7, 5)


def type_of_card(name: str) -> str:
    """The Slurm type of a card, from the name that its driver reports; "" for a card that is not in GPUS."""
    return next((gpu.slurm for gpu in GPUS if re.search(gpu.card, name)), "")


@dataclass(frozen=True)
class TaskSize:
    """The size of a task. choices: 1 for generation. prompt, answer: mean number of tokens; 0 if no time is known."""

    name: str
    questions: int
    choices: int = 1
    fewshot: int = 0
    prompt: int = 0
    answer: int = 0


TASKS = tuple(
    TaskSize(
        task.name, task.questions, task.choices, task.num_fewshot, task.prompt_tokens or 0, task.answer_tokens or 0
    )
    for task in DESCRIBED.values()
    if not task.code and task.questions is not None
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of a model. layers: of all layers together. table: of the embedding; lm_head has as many."""

    layers: int
    table: int
    config: Any  # with the fields of a config.json

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes of a model, from the fields of its config.json."""
        C, kv = config.hidden_size, config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        attention = 2 * C * C + 2 * C * kv + C + 2 * kv  # q, o; k, v; the three biases
        layer = attention + 3 * C * config.intermediate_size + 2 * C  # MLP, two norms
        return cls(config.num_hidden_layers * layer + C, config.vocab_size * C, config)

    @property
    def total_bytes(self) -> int:
        return BYTES * (self.layers + (1 if self.config.tie_word_embeddings else 2) * self.table)

    def seconds(self, gpu: GPU, rows: int, seen: float, rows_read: int) -> float:
        """Seconds of one forward of `rows` rows. seen: positions that each attends to. rows_read: rows with logits."""
        config = self.config
        head = config.hidden_size // config.num_attention_heads
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head * seen
        read = BYTES * (self.layers + self.table + cached)
        attention = 4 * config.num_hidden_layers * config.hidden_size * rows * seen
        operations = 2 * rows * self.layers + 2 * rows_read * self.table + attention
        return max(read / (gpu.bandwidth * 1e9), operations / (gpu.peak * 1e12))

    def task_seconds(self, gpu: GPU, task: TaskSize, threshold: float) -> float:
        """Seconds of a whole task: for each question a prefill, then forwards of one block."""
        if task.choices > 1:  # the choices' first tokens are read in one forward
            return task.questions * self.seconds(gpu, task.prompt, task.prompt, 1)
        block = self.config.bd_size
        forwards = task.answer / TOKENS_PER_FORWARD[threshold]
        step = self.seconds(gpu, block, task.prompt + task.answer / 2, block)
        return task.questions * (self.seconds(gpu, task.prompt, task.prompt, 1) + forwards * step)

    def fits(self, gpu: GPU) -> bool:
        """Whether the model and what one question needs fit into the GPU's memory."""
        return self.total_bytes + WORK_BYTES <= gpu.memory * 1e9


# The config of the published 7B (DEFAULT_MODEL), so that none of its files is needed.
PUBLISHED = SimpleNamespace(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, bd_size=32, tie_word_embeddings=False,
)  # fmt: skip


def sizes_of(model: str, root: Path) -> Sizes | None:
    """The sizes of the published 7B, of `tiny`, or of a folder with a config.json; None for any other model."""
    if model == DEFAULT_MODEL:
        return Sizes.of(PUBLISHED)
    folder = root / "models" / "tiny" if model == "tiny" else root / model
    content = read_json(folder / "config.json")[0]
    if content is None or any(not isinstance(content.get(name), int) for name in vars(PUBLISHED)):
        return None
    return Sizes.of(SimpleNamespace(**content))
