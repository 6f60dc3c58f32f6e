"""Reads one summary.json as a RunResult, and lists the faults of its files: changed by hand, torn, contradictory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast_dllm.record.questions import Questions, QuestionsError, read
from fast_dllm.record.summary import (
    AS_THE_SCRIPTS_RUN,
    QUESTIONS_FILE,
    RESULTS_FILE,
    Summary,
    SummaryError,
    read_summary,
    setting_text,
)
from fast_dllm.report.results import RunResult
from fast_dllm.spec.files import as_object, is_file_name, read_json
from fast_dllm.spec.hashes import file_sha256

MOST_RESULTS_BYTES = 256 * 2**20
FACTS = (
    "generation_code_sha256", "decoding_sha256", "model_revision", "dtype", "gpu", "gpu_memory_gb",
    "host", "graphs", "num_fewshot", "num_processes", "num_shares", "num_segments", "python", "metric",
)  # fmt: skip


def _facts(summary: Summary, questions: Questions | None) -> dict[str, Any]:
    """The recorded facts that alarms and the provenance section use."""
    facts: dict[str, Any] = {name: getattr(summary, name) for name in FACTS}
    facts |= {
        "commit": summary.git_commit,
        "dirty": summary.git_dirty,
        "model": summary.model,
        "batch_size": summary.model_args.get("batch_size"),
        "device": str(summary.device or "").split(":")[0] or None,
        "torch": summary.packages.get("torch"),
        "lm_eval": summary.packages.get("lm_eval"),
        "time": summary.end_time,
    }
    if not summary.is_foreign:
        settings = summary.settings()
        facts |= {name: setting_text(settings[name]) for name in AS_THE_SCRIPTS_RUN}
    if questions:
        facts["task_version"] = _one(questions.versions)
        facts["prompts"] = _one(questions.prompts)
    return {name: value for name, value in facts.items() if value is not None}


def _one(values: Mapping[str, object]) -> object:
    """The value of a single task; for a group, the values of all subtasks as JSON."""
    return next(iter(values.values())) if len(values) == 1 else json.dumps(dict(values), sort_keys=True)


def read_run(path: Path, label: str, task: str, limit: float | None, imported: bool) -> RunResult:
    """The RunResult of one summary.json. Raises SummaryError, one line, if it is not usable.

    label: of the table; unless `imported`, that is the experiment. task, limit: those that the folder's name says.
    """
    summary = read_summary(path)
    if summary is None:
        raise SummaryError("no file")
    if summary.accuracy is None:
        raise SummaryError("the accuracy is 'null'")
    faults: list[tuple[str, str]] = []
    questions = None if summary.is_foreign else _questions(path, summary, faults)
    run = RunResult(
        table=label,
        experiment=label,
        config=path.parent.name,
        path=path,
        is_foreign=imported or summary.is_foreign,
        task=summary.task or task,
        accuracy=summary.accuracy,
        summary=summary,
        facts=_facts(summary, questions),
        questions=questions,
    )
    names = {"config": run.config}
    if not imported:  # an imported folder may have any name: what its summaries say of themselves counts
        names["task"] = task
        if not summary.is_foreign:
            names["experiment"] = label
    faults += [*_seals(path, summary), *_faults_of_place(run, names, task, limit), *_contradictions(run)]
    broken = [text for kind, text in faults if kind == "corrupt"]
    if broken:
        raise SummaryError("; ".join(dict.fromkeys(broken)))
    return replace(run, faults=tuple(dict.fromkeys(faults)))


def _questions(path: Path, summary: Summary, faults: list[tuple[str, str]]) -> Questions | None:
    file = path.with_name(QUESTIONS_FILE)
    if not file.is_file():
        return None
    if summary.questions_sha256 not in (None, file_sha256(file)):
        faults.append(("hand_edited", f"{QUESTIONS_FILE} is not the one that its summary was written with"))
    try:
        return read(file)
    except QuestionsError as error:
        faults.append(("corrupt", str(error)))
        return None


def _seals(path: Path, summary: Summary) -> list[tuple[str, str]]:
    """Faults that the hashes show.

    summary.json has a hash of itself and one of results.json, and results.json has those of its samples.
    """
    faults = []
    if summary.is_edited:
        faults.append(("hand_edited", "summary.json was changed after it was written (its own hash does not fit)"))
    results = path.with_name(RESULTS_FILE)
    if results.is_file() and summary.results_sha256 is not None:
        if file_sha256(results) != summary.results_sha256:
            faults.append(("hand_edited", "results.json is not the one that its summary was written with"))
        else:
            faults += _sample_seals(results)
    return faults


def _sample_seals(results: Path) -> list[tuple[str, str]]:
    content, fault = read_json(results, MOST_RESULTS_BYTES, finite=False)  # as lm_eval leaves them
    if content is None:
        return [("corrupt", f"results.json cannot be read: {fault or 'no file'}")]
    hashes = {name: value for name, value in as_object(content.get("samples_sha256")).items() if is_file_name(name)}
    changed = [
        name
        for name, expected in hashes.items()
        if (results.parent / name).is_file() and file_sha256(results.parent / name) != expected
    ]
    return [("hand_edited", f"{name} is not the one that results.json was written with") for name in changed]


def _faults_of_place(
    run: RunResult, names: Mapping[str, str], task: str, limit: float | None
) -> Iterator[tuple[str, str]]:
    """Contradictions between a summary and its folder. names: fields of the summary, as the folder says them."""
    summary = run.summary
    for name, expected in names.items():
        value = getattr(summary, name)
        if value is not None and value != expected:
            yield "corrupt", f"it is of {name} {value!r}, its folder of {expected!r}"
    if run.limit != limit and run.task == task:
        kind = "mixed_limit" if summary.is_foreign else "corrupt"
        yield kind, f"it ran with limit {_limit(run.limit)}, its folder says {_limit(limit)}"
    if summary.num_samples_expected not in (None, run.num_samples):
        yield "corrupt", f"{run.num_samples} of {summary.num_samples_expected} questions"


def _limit(limit: object) -> str:
    return "none" if limit is None else f"{limit:g}"


def _contradictions(run: RunResult) -> list[tuple[str, str]]:
    """Faults: numbers of one summary that contradict each other."""
    faults = []
    stated = run.summary.throughput.tokens_per_second
    speed = run.tokens_per_second
    if stated and speed and abs(stated - speed) > 0.01 + 1e-3 * speed:
        faults.append(("hand_edited", f"it states {stated:g} tokens/s; its tokens and seconds give {speed:.2f}"))
    is_count = not (run.summary.metric or "").startswith(("inst_level", "pass"))
    if is_count and run.num_samples and run.num_correct is None and run.questions is None:
        faults.append(
            ("not_a_count", f"an accuracy of {run.accuracy:.6g} is no whole number of {run.num_samples} questions")
        )
    if run.questions and run.questions.questions:
        mean = weighted_accuracy(run.questions, run.task)
        if mean is not None and abs(mean - run.accuracy) > 1e-9:
            faults.append(("hand_edited", f"it states {100 * run.accuracy:.4g}%; its questions give {100 * mean:.4g}%"))
    return faults


def weighted_accuracy(questions: Questions, task: str) -> float | None:
    """The task's accuracy from its questions, with the task's weights of subtasks; None if these are not known."""
    by_task: dict[str, list[float]] = {}
    for question in questions.questions:
        by_task.setdefault(question.task, []).append(question.correct)
    if len(by_task) == 1 or questions.groups.get(task) == "size":
        return sum(map(sum, by_task.values())) / len(questions.questions)
    if questions.groups.get(task) == "equal":
        return sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)
    return None
