"""What the report knows of results: a RunResult of each summary.json, a ResultTable of each experiment and task.

What a summary does not record is None. The report then says that it is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_dllm.decoding import GUESSES
from fast_dllm.record.questions import Questions
from fast_dllm.record.summary import Summary
from fast_dllm.spec.matrix import Matrix
from fast_dllm.spec.tasks import TASKS
from fast_dllm.spec.values import parse_value

TASK_SIZE = {task.name: task.questions for task in TASKS.values() if task.questions is not None}
SCORED = tuple(task.family for task in TASKS.values() if task.is_scored)  # answered by log-likelihood
NO_FORWARD = ("reused", "guessed", "guessed_commit", "score")  # kinds that cost no forward of decoding


@dataclass(frozen=True)
class RunResult:
    """The result of one configuration. What its summary does not record is None.

    table: the label of its table. is_foreign: imported, or of the lab's first runner. facts: those that alarms and the
    provenance section compare, by name. faults: what is wrong with the files themselves, (kind of alarm, text).
    """

    table: str
    experiment: str
    config: str
    path: Path
    is_foreign: bool
    task: str
    accuracy: float
    summary: Summary = field(repr=False)
    facts: Mapping[str, Any]
    questions: Questions | None = None
    faults: tuple[tuple[str, str], ...] = ()

    @property
    def limit(self) -> float | None:
        return self.summary.limit

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.summary.model_args

    @property
    def num_samples(self) -> int | None:
        return self.summary.num_questions

    @property
    def new_tokens(self) -> int | None:
        tokens = self.summary.throughput.new_tokens
        return int(tokens) if tokens else None

    @property
    def forwards(self) -> Mapping[str, int] | None:
        """Kind of forward -> number."""
        return {kind: int(count) for kind, count in self.summary.throughput.forwards.items()} or None

    @property
    def layers_run(self) -> float | None:
        """The layers that ran, summed over all forwards."""
        return sum(self.summary.throughput.layer_forwards.values()) or None

    @property
    def num_correct(self) -> int | None:
        """The number of right answers; None if accuracy times questions is not a whole number."""
        if self.num_samples is None:
            return None
        count = self.accuracy * self.num_samples
        return round(count) if abs(count - round(count)) < 1e-6 * max(1, self.num_samples) else None

    @property
    def counts(self) -> tuple[int, int] | None:
        """(right answers, questions); None unless both are known."""
        right, questions = self.num_correct, self.num_samples
        return None if right is None or questions is None else (right, questions)

    @property
    def reuse_k(self) -> int | None:
        value = self.arguments.get("reuse_k")
        return int(str(value)) if str(value).isdecimal() else None

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self.summary.throughput.seconds_generating
        return self.new_tokens / seconds if self.new_tokens and seconds else None

    @property
    def full_forwards(self) -> float | None:
        """Full-depth forwards: layers run / layers of the model; if these are not recorded, all forwards."""
        if self.summary.full_forwards is not None:
            return self.summary.full_forwards
        return sum(n for kind, n in self.forwards.items() if kind not in NO_FORWARD) if self.forwards else None

    @property
    def tokens_per_forward(self) -> float | None:
        return self.new_tokens / self.full_forwards if self.new_tokens and self.full_forwards else None

    @property
    def layers_per_token(self) -> float | None:
        layers = self.summary.num_layers
        if not self.new_tokens or not layers or not self.full_forwards:
            return None
        return self.full_forwards * layers / self.new_tokens

    @property
    def row_layers_per_token(self) -> float | None:
        """As `layers_per_token`, times the rows that each layer ran, those of guesses included."""
        row_layers = sum(self.summary.throughput.row_layer_forwards.values())
        return row_layers / self.new_tokens if row_layers and self.new_tokens else None

    @property
    def guesses(self) -> Mapping[str, tuple[int, int]]:
        """What was guessed (decoding.GUESSES) -> (accepted, offered). Empty for a run without guesses."""
        cost = self.summary.throughput
        if not cost.guesses_offered:
            return {}
        return {
            kind: (int(cost.guesses_accepted.get(kind, 0)), int(cost.guesses_offered.get(kind, 0))) for kind in GUESSES
        }

    @property
    def skips_layers(self) -> bool:
        """Whether some forward skipped layers. A step that reads stored logits again is no forward."""
        layers = self.summary.num_layers
        if not (self.layers_run and layers and self.forwards):
            return False
        return self.layers_run < layers * sum(n for k, n in self.forwards.items() if k not in NO_FORWARD)


@dataclass(frozen=True)
class ResultTable:
    """The runs of one experiment on one task, or those of an imported folder.

    compare_with: the configuration that the others are compared with; None: k = 1 of the same column. problems:
    configuration -> why it has no run. code_sha256: of the experiment's generation code today. is_control: plain
    decoding is measured here. replayed: hashes of decoding code that reproduced the experiment's transcript.
    """

    label: str
    experiment: str
    task: str
    limit: float | None
    is_foreign: bool
    matrix: Matrix
    compare_with: str | None
    runs: Mapping[str, RunResult]
    problems: Mapping[str, str] = field(default_factory=dict)
    code_sha256: str | None = None
    is_control: bool = False
    replayed: frozenset[str] = frozenset()

    @property
    def missing(self) -> list[str]:
        """Configurations of the matrix with no file at all, once there is any."""
        if not any(name.split("+")[0] in self.matrix.configurations for name in (*self.runs, *self.problems)):
            return []
        return [name for name in self.matrix.configurations if name not in self.runs and name not in self.problems]

    @property
    def is_scored(self) -> bool:
        """The answers are scored by log-likelihood, where nothing can be reused."""
        return bool(self.runs) and (is_scored(self.task) or all(run.summary.is_scored for run in self.runs.values()))

    def is_stale(self, run: RunResult) -> bool:
        """The experiment's generation code has changed since this run."""
        code = run.facts.get("generation_code_sha256")
        return not run.is_foreign and self.code_sha256 is not None and code != self.code_sha256

    def announced(self, config: str) -> dict[str, object]:
        """The arguments that a folder's name announces: `k2_middle+threshold=0.8` has those of k2_middle and that
        threshold."""
        name, *changes = config.split("+")
        arguments = dict(self.matrix.configurations.get(name, {}))
        for change in changes:
            key, _, text = change.partition("=")
            arguments[key] = parse_value(text)
        return arguments


def is_scored(task: str) -> bool:
    """Whether this task, or subtask of a group, is scored by log-likelihood."""
    return task.startswith(SCORED)
