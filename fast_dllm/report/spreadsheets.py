"""The results as CSV files for pandas and spreadsheets: runs.csv and questions.csv. docs/report.md has the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping

from fast_dllm.decoding import FORWARD_KINDS, GUESSES
from fast_dllm.report.build import Report, run_numbers
from fast_dllm.report.compare import interval_of
from fast_dllm.report.matches import ALL_TABLES
from fast_dllm.report.results import ResultTable, RunResult

RUNS_FILE, QUESTIONS_FILE = "runs.csv", "questions.csv"
FILES = (RUNS_FILE, QUESTIONS_FILE)

PLACE_COLUMNS = ("table", "experiment", "task", "limit", "config")
PROVENANCE_COLUMNS = (
    "model_revision", "generation_code_sha256", "decoding_sha256", "commit", "dtype", "device", "gpu", "host",
    "num_processes", "num_segments", "time",
)  # fmt: skip
RUN_COLUMNS = (
    *PLACE_COLUMNS,
    "imported", "metric", "num_questions", "num_correct", "accuracy", "accuracy_stderr", "accuracy_low",
    "accuracy_high", "new_tokens", "seconds", "tokens_per_second", "full_depth_forwards",
    "tokens_per_full_depth_forward", "layer_forwards_per_token", "row_layer_forwards_per_token", "speed_up_forwards",
    *(f"forwards_{kind}" for kind in FORWARD_KINDS),
    *(f"guesses_{result}_{kind}" for result in ("offered", "accepted") for kind in GUESSES),
    *PROVENANCE_COLUMNS,
    "alarms",
)  # fmt: skip
QUESTION_COLUMNS = (*PLACE_COLUMNS, "subtask", "doc_id", "key", "correct", "answer")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def spreadsheets(report: Report) -> dict[str, str]:
    """File name -> content. An empty cell is a value that is not recorded."""
    runs = [(table, run) for table in report.tables for run in table.runs.values()]
    arguments = sorted({name for _, run in runs for name in run.arguments})
    return {
        RUNS_FILE: _csv(
            (*RUN_COLUMNS, *(f"arg_{name}" for name in arguments)),
            (_run_row(report, table, run) for table, run in runs),
        ),
        QUESTIONS_FILE: _csv(QUESTION_COLUMNS, (row for _, run in runs for row in _question_rows(run))),
    }


def _place(run: RunResult) -> dict[str, object]:
    return {name: getattr(run, name) for name in PLACE_COLUMNS}


def _run_row(report: Report, table: ResultTable, run: RunResult) -> dict[str, object]:
    interval = interval_of(run)
    alarms = {a.kind for a in report.alarms if a.table in (table.label, ALL_TABLES) and run.config in a.configs}
    return {
        **_place(run),
        "imported": run.is_foreign,
        "metric": run.summary.metric,
        "num_questions": run.num_samples,
        "num_correct": run.num_correct,
        "accuracy": run.accuracy,
        "accuracy_stderr": run.summary.accuracy_stderr,
        "accuracy_low": interval.low if interval else None,
        "accuracy_high": interval.high if interval else None,
        **run_numbers(report, table, run),
        **{f"forwards_{kind}": count for kind, count in (run.forwards or {}).items() if kind in FORWARD_KINDS},
        **{name: run.facts.get(name) for name in PROVENANCE_COLUMNS},
        "alarms": " ".join(sorted(alarms)),
        **{f"arg_{name}": value for name, value in run.arguments.items()},
    }


def _question_rows(run: RunResult) -> Iterable[dict[str, object]]:
    for question in run.questions.questions if run.questions else ():
        values = {name: getattr(question, name) for name in ("doc_id", "key", "correct", "answer")}
        yield {**_place(run), "subtask": question.task, **values}


def _csv(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: object) -> object:
    """A spreadsheet runs a text that begins like a formula; an apostrophe before it keeps it a text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
