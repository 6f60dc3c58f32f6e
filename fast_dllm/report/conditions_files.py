"""Conditions of alarms about the files of results: damaged, missing, of other code, or imported with facts missing.

alarms.py has the rule of each condition.
"""

from __future__ import annotations

from collections.abc import Iterator

from fast_dllm.report.matches import Match, configs_of
from fast_dllm.report.results import ResultTable

# facts that a foreign summary may lack -> how to read them
RECORDED = {
    "the number of questions": lambda run: run.summary.num_samples,
    "which answer each question got": lambda run: run.questions,
    "forwards": lambda run: run.forwards,
    "a hash of the code": lambda run: run.facts.get("generation_code_sha256"),
    "the model's revision": lambda run: run.facts.get("model_revision"),
    "dtype": lambda run: run.facts.get("dtype"),
    "threshold": lambda run: run.arguments.get("threshold"),
    "interruptions": lambda run: run.facts.get("num_segments"),
    "metric": lambda run: run.summary.metric,
    "tokens and seconds": lambda run: run.tokens_per_second,
}


def left_out(table: ResultTable) -> Iterator[Match]:
    """Files that are no result."""
    for config, reason in table.problems.items():
        yield Match((config,), {"reason": reason})


def file_faults(table: ResultTable, kind: str) -> Iterator[Match]:
    """Faults of this kind that reading the summaries has shown."""
    for run in table.runs.values():
        for fault, text in run.faults:
            if fault == kind:
                yield Match((run.config,), {"reason": text})


def missing(table: ResultTable) -> Iterator[Match]:
    """Configurations of the matrix without a result."""
    if table.missing:
        have = "has" if len(table.missing) == 1 else "have"
        values = {"count": len(table.missing), "total": len(table.matrix.configurations), "have": have}
        yield Match(tuple(table.missing), values)


def stale(table: ResultTable) -> Iterator[Match]:
    """Results of a generation code that the experiment no longer has."""
    runs = [run for run in table.runs.values() if table.is_stale(run)]
    if runs:
        yield Match(configs_of(runs))


def not_recorded(table: ResultTable) -> Iterator[Match]:
    """A foreign table none of whose summaries records some of the facts."""
    runs = list(table.runs.values())
    lacking = [name for name, value_of in RECORDED.items() if all(value_of(run) is None for run in runs)]
    if table.is_foreign and runs and lacking:
        yield Match(configs_of(runs), {"lacking": ", ".join(lacking)})


def without_time(table: ResultTable) -> Iterator[Match]:
    """Foreign runs without a time, in a table in which other runs have one."""
    untimed = [run for run in table.runs.values() if not run.summary.is_scored and run.tokens_per_second is None]
    if table.is_foreign and untimed and len(untimed) < len(table.runs):
        yield Match(configs_of(untimed))


def uncommitted_changes(table: ResultTable) -> Iterator[Match]:
    dirty = [run for run in table.runs.values() if run.facts.get("dirty")]
    if table.is_foreign and dirty:
        yield Match(configs_of(dirty))
