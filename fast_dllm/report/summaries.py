"""summary.json files as the report reads them: one Run each, whatever its schema, and a Table for each place.

Two forms are read. Ours (schema_version 1, fast_dllm/record/results.py), and the earlier one of the lab's first runner
(`accuracy`, `throughput.tokens_generated`, `git`, no schema version), which records less: what it lacks is None here
and said in the report, never guessed. Runs of the earlier form are never results of this code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fast_dllm.record.questions import QUESTIONS_FILE, Questions, QuestionsError, content_sha256, read
from fast_dllm.report.matrix import Matrix
from fast_dllm.spec.hashes import file_sha256
from fast_dllm.spec.tasks import TASKS

# Questions in the whole task, where a summary does not say: the earlier form does not.
TASK_SIZE = {task.name: task.questions for task in TASKS.values() if task.questions is not None}
# a limit counts in each subtask: the questions of a group's smallest
SMALLEST_SUBTASK = {"mmlu": 100, "minerva_math": 474, "toy_choice": 300}
SCORED = tuple(task.family for task in TASKS.values() if task.is_scored)  # answered by log-likelihood
NO_FORWARD = ("reused", "score")  # kinds that cost no forward of decoding


@dataclass(frozen=True)
class Run:
    """One configuration's result. What its summary does not record is None.

    num_samples: questions; seconds: of generating; forwards: kind -> number; layers_run: layers summed over forwards.
    faults: what is wrong with the files themselves, (kind of alarm, text).
    """

    table: str
    experiment: str
    task: str
    limit: float | None
    config: str
    path: Path
    earlier: bool
    accuracy: float
    num_samples: int | None
    metric: str | None
    arguments: Mapping[str, Any]
    new_tokens: int | None
    seconds: float | None
    forwards: Mapping[str, int] | None
    layers_run: float | None
    num_layers: int | None
    facts: Mapping[str, Any]
    stderr: float | None = None
    scored: bool = False
    questions: Questions | None = None
    faults: tuple[tuple[str, str], ...] = ()
    summary: Mapping[str, object] = field(default_factory=dict, repr=False)

    @property
    def num_correct(self) -> int | None:
        """Right answers; None where accuracy times questions is no whole number."""
        if self.num_samples is None:
            return None
        count = self.accuracy * self.num_samples
        return round(count) if abs(count - round(count)) < 1e-6 * max(1, self.num_samples) else None

    @property
    def counts(self) -> tuple[int, int] | None:
        """Right answers and questions, where both are known."""
        right, asked = self.num_correct, self.num_samples
        return None if right is None or asked is None else (right, asked)

    @property
    def reuse_k(self) -> int | None:
        value = self.arguments.get("reuse_k")
        return int(str(value)) if str(value).isdecimal() else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.new_tokens / self.seconds if self.new_tokens and self.seconds else None

    @property
    def full_forwards(self) -> float | None:
        """Full-depth forwards: layers run / layers where both are recorded, else every forward counts as one."""
        if self.layers_run and self.num_layers:
            return self.layers_run / self.num_layers
        return sum(n for kind, n in self.forwards.items() if kind not in NO_FORWARD) if self.forwards else None

    @property
    def tokens_per_forward(self) -> float | None:
        return self.new_tokens / self.full_forwards if self.new_tokens and self.full_forwards else None

    @property
    def layers_per_token(self) -> float | None:
        if not self.new_tokens or not self.num_layers or not self.full_forwards:
            return None
        return self.full_forwards * self.num_layers / self.new_tokens

    @property
    def skips_layers(self) -> bool:
        """Some forward ran without some of the layers. A step that reads stored logits again is no forward."""
        if not (self.layers_run and self.num_layers and self.forwards):
            return False
        return self.layers_run < self.num_layers * sum(n for k, n in self.forwards.items() if k not in NO_FORWARD)


@dataclass(frozen=True)
class Table:
    """One experiment's runs on one task, or an imported folder's. problems: configuration -> why it has no run."""

    label: str
    experiment: str
    task: str
    limit: float | None
    earlier: bool
    matrix: Matrix
    runs: Mapping[str, Run]
    problems: Mapping[str, str] = field(default_factory=dict)
    code_sha256: str | None = None

    @property
    def missing(self) -> list[str]:
        """Configurations of the matrix with no file at all, once there is any."""
        if not any(name.split("+")[0] in self.matrix.configurations for name in (*self.runs, *self.problems)):
            return []
        return [name for name in self.matrix.configurations if name not in self.runs and name not in self.problems]


def is_scored(task: str) -> bool:
    return task.startswith(SCORED)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


class CorruptError(ValueError):
    """Why a file is no summary; one line."""


def _load(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise CorruptError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CorruptError(f"not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, Mapping):
        raise CorruptError("no JSON object")
    accuracy = _number(found.get("accuracy"))
    if accuracy is None or not 0 <= accuracy <= 1:
        raise CorruptError(f"the accuracy is {found.get('accuracy')!r}")
    return found


def _earlier_size(task: str, limit: float | None) -> int | None:
    """The question count that the earlier form leaves out; None where it would be a guess."""
    if limit is None or limit < 1:
        return TASK_SIZE.get(task) if limit is None else None
    if task in SMALLEST_SUBTASK:
        return int(limit) * TASKS[task].subtasks if limit <= SMALLEST_SUBTASK[task] else None
    return int(min(limit, TASK_SIZE.get(task, limit)))


def _by_choice(found: Mapping) -> bool:
    """Its group's metric is lm_eval's `acc`: the accuracy of the likeliest choice."""
    groups = _mapping(found.get("group_results"))
    return any(name.startswith("acc,") for group in groups.values() for name in _mapping(group))


def _earlier_run(found: Mapping, place: Mapping[str, Any]) -> Run:
    """A Run of the earlier form's facts."""
    cost, git, gpu = (_mapping(found.get(name)) for name in ("throughput", "git", "gpu_info"))
    machine, given = _mapping(found.get("environment")), _mapping(found.get("eval_params"))
    task, limit = str(found.get("task") or place["task"]), _number(given.get("limit"))
    arguments = {k: v for k, v in _mapping(found.get("model_args")).items() if k != "show_speed"}
    facts = {
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "gpu": gpu.get("gpu_name"),
        "gpu_memory_gb": gpu.get("gpu_total_vram_gb"),
        "torch": machine.get("torch_version"),
        "python": machine.get("python_version"),
        "host": machine.get("hostname"),
        "batch_size": given.get("batch_size"),
        "num_fewshot": given.get("num_fewshot"),
        "model": arguments.get("model_path"),
        "time": found.get("timestamp"),
    }
    tokens = _number(cost.get("tokens_generated"))
    return Run(
        **_where(place) | {"task": task, "limit": limit},
        earlier=True,
        accuracy=float(found["accuracy"]),
        num_samples=_earlier_size(task, limit),
        metric=None,
        arguments=arguments,
        new_tokens=int(tokens) if tokens else None,
        seconds=_number(cost.get("total_time_s")),
        forwards=None,
        layers_run=None,
        num_layers=None,
        facts={key: value for key, value in facts.items() if value is not None},
        scored=not tokens and (is_scored(task) or _by_choice(found)),
        summary=found,
    )


def _where(place: Mapping[str, Any]) -> dict[str, Any]:
    return {name: place[name] for name in ("table", "experiment", "config", "path")}


FACTS = (
    *("generation_code_sha256", "decoding_sha256", "fast_dllm_sha256", "model_revision", "dtype", "gpu", "host"),
    *(
        "graphs",
        "num_fewshot",
        "chat_template",
        "seeds",
        "num_processes",
        "num_shares",
        "num_segments",
        "python",
        "metric",
    ),
)


def _own_run(found: Mapping, place: Mapping[str, Any], questions: Questions | None) -> Run:
    cost = _mapping(found.get("throughput"))
    arguments = dict(_mapping(found.get("model_args")))
    facts = {name: found[name] for name in FACTS if found.get(name) is not None}
    packages = _mapping(found.get("packages"))
    facts |= {
        "commit": found.get("git_commit"),
        "dirty": found.get("git_dirty"),
        "model": arguments.get("model_path"),
        "batch_size": arguments.get("batch_size"),
        "device": str(found.get("device") or "").split(":")[0] or None,
        "torch": packages.get("torch"),
        "lm_eval": packages.get("lm_eval"),
        "time": found.get("end_time"),
    }
    if questions:
        facts["task_version"] = _one(questions.versions)
        facts["prompts"] = _one(questions.prompts)
    forwards = {str(kind): int(n) for kind, n in _mapping(cost.get("forwards")).items() if _number(n) is not None}
    layers_run = [float(n) for n in _mapping(cost.get("layer_forwards")).values() if _number(n) is not None]
    layers = _number(found.get("num_layers"))
    tokens, samples = _number(cost.get("new_tokens")), _number(found.get("num_samples"))
    limit = _number(found.get("limit"))
    return Run(
        **_where(place) | {"task": str(found.get("task") or place["task"]), "limit": limit},
        earlier=False,
        accuracy=float(found["accuracy"]),
        stderr=_number(found.get("accuracy_stderr")),
        num_samples=int(samples) if samples else None,
        metric=None if found.get("metric") is None else str(found["metric"]),
        arguments=arguments,
        new_tokens=int(tokens) if tokens else None,
        seconds=_number(cost.get("seconds_generating")),
        forwards=forwards or None,
        layers_run=sum(layers_run) or None,
        num_layers=int(layers) if layers else None,
        facts={key: value for key, value in facts.items() if value is not None},
        scored=bool(cost.get("scored_requests")) and not cost.get("requests"),
        questions=questions,
        summary=found,
    )


def _one(values: Mapping[str, object]) -> object:
    """A task's own value, or all subtasks' together."""
    return next(iter(values.values())) if len(values) == 1 else json.dumps(dict(values), sort_keys=True)


def is_earlier(found: Mapping) -> bool:
    return "schema_version" not in found and ("git" in found or "gpu_info" in found or "model_args" in found)


def read_run(path: Path, place: Mapping[str, object]) -> Run:
    """The Run of one summary.json. Raises ValueError, one line, where it is none."""
    found = _load(path)
    if is_earlier(found):
        run = _earlier_run(found, place)
        return _with_faults(run, place, [])
    if found.get("schema_version") != 1:
        raise CorruptError(f"schema version {found.get('schema_version')!r}")
    faults: list[tuple[str, str]] = []
    questions = _questions(path, found, faults)
    faults += _seals(path, found)
    return _with_faults(_own_run(found, place, questions), place, faults)


def _questions(path: Path, found: Mapping, faults: list[tuple[str, str]]) -> Questions | None:
    file = path.with_name(QUESTIONS_FILE)
    if not file.is_file():
        return None
    if found.get("questions_sha256") not in (None, file_sha256(file)):
        faults.append(("hand_edited", f"{QUESTIONS_FILE} is not the one that its summary was written with"))
    try:
        return read(file)
    except QuestionsError as error:
        faults.append(("corrupt", str(error)))
        return None


def _seals(path: Path, found: Mapping) -> list[tuple[str, str]]:
    """What the chain of hashes says: summary.json over itself and over results.json, that one over its samples."""
    faults = []
    if found.get("summary_sha256") not in (None, content_sha256(found)):
        faults.append(("hand_edited", "summary.json was changed after it was written (its own hash does not fit)"))
    results = path.with_name("results.json")
    if results.is_file() and found.get("results_sha256") is not None:
        if file_sha256(results) != found["results_sha256"]:
            faults.append(("hand_edited", "results.json is not the one that its summary was written with"))
        else:
            faults += _sample_seals(results)
    return faults


def _sample_seals(results: Path) -> list[tuple[str, str]]:
    try:
        kept = _mapping(json.loads(results.read_text()).get("samples_sha256"))
    except (OSError, ValueError, AttributeError):
        return [("corrupt", "results.json cannot be read")]
    changed = [
        name
        for name, expected in kept.items()
        if (results.parent / name).is_file() and file_sha256(results.parent / name) != expected
    ]
    return [("hand_edited", f"{name} is not the one that results.json was written with") for name in changed]


def _with_faults(run: Run, place: Mapping[str, object], faults: list[tuple[str, str]]) -> Run:
    """The run with what contradicts itself, or its folder, among its faults."""
    own = run.summary
    # an imported folder may be called anything but a configuration: what its summaries say of themselves counts
    names = (
        ("config",) if place["imported"] else ("config", "task") if run.earlier else ("config", "task", "experiment")
    )
    for name in names:
        if own.get(name) is not None and own[name] != place[name]:
            faults.append(("corrupt", f"it is of {name} {own[name]!r}, its folder of {place[name]!r}"))
    if run.limit != place["limit"] and run.task == place["task"]:
        kind = "mixed_limit" if run.earlier else "corrupt"
        faults.append((kind, f"it ran with limit {_limit(run.limit)}, its folder says {_limit(place['limit'])}"))
    expected = _number(own.get("num_samples_expected"))
    if expected is not None and run.num_samples != expected:
        faults.append(("corrupt", f"{run.num_samples} of {expected:g} questions"))
    faults += _contradictions(run)
    return replace(run, faults=tuple(dict.fromkeys(faults)))


def _limit(limit: object) -> str:
    return "none" if limit is None else f"{limit:g}"


def _contradictions(run: Run) -> list[tuple[str, str]]:
    """Numbers of one summary that cannot all be true."""
    found = []
    cost = _mapping(run.summary.get("throughput"))
    stated = _number(cost.get("tokens_per_s" if run.earlier else "tokens_per_second"))
    speed = run.tokens_per_second
    if stated and speed and abs(stated - speed) > 0.01 + 1e-3 * speed:
        found.append(("hand_edited", f"it states {stated:g} tokens/s; its tokens and seconds give {speed:.2f}"))
    whole = run.metric is None or not run.metric.startswith(("inst_level", "pass"))
    if whole and run.num_samples and run.num_correct is None and (run.earlier or run.questions is None):
        found.append(
            ("not_a_count", f"an accuracy of {run.accuracy:.6g} is no whole number of {run.num_samples} questions")
        )
    if run.questions and run.questions.questions:
        mean = weighted_accuracy(run.questions, run.task)
        if mean is not None and abs(mean - run.accuracy) > 1e-9:
            found.append(("hand_edited", f"it states {100 * run.accuracy:.4g}%; its questions give {100 * mean:.4g}%"))
    return found


def weighted_accuracy(questions: Questions, task: str) -> float | None:
    """The task's accuracy from its questions, subtasks weighted as the task does; None where that is not known."""
    by_task: dict[str, list[float]] = {}
    for question in questions.questions:
        by_task.setdefault(question.task, []).append(question.correct)
    if len(by_task) == 1 or questions.groups.get(task) == "size":
        return sum(map(sum, by_task.values())) / len(questions.questions)
    if questions.groups.get(task) == "equal":
        return sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)
    return None
