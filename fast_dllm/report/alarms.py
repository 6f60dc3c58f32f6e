"""What is wrong with a table, found before any number is shown. One rule a function; docs/report.md lists the kinds.

An alarm spoils a claim; a note is something to know. Each names the configurations and the comparison that it concerns,
so that what is meant to differ raises none: a threshold sweep is not "mixed thresholds", processes of one run are not
"several segments", two versions of the engine whose replay is recorded are not "mixed code".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fast_dllm.report.summaries import Run, Table

ALARM, NOTE = "alarm", "note"


@dataclass(frozen=True)
class Alarm:
    """kind: its name in report.json; spoils: accuracy, speed, reuse or provenance; text: one line for people."""

    kind: str
    table: str
    configs: tuple[str, ...]
    spoils: str
    text: str
    level: str = ALARM


def listed(names: Iterable[str], most: int = 6) -> str:
    """`a, b and c`; a long list is cut."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def by_value(runs: Iterable[Run], value_of: Callable[[Run], object]) -> dict[Any, list[Run]]:
    """Value -> runs that have it, most frequent first; runs that do not record it are left out."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        value = value_of(run)
        if value is not None:
            found.setdefault(str(value) if isinstance(value, (list, dict)) else value, []).append(run)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def fact_of(name: str) -> Callable[[Run], str | None]:
    """For `by_value`: a fact's text."""
    return lambda run: None if run.facts.get(name) is None else str(run.facts[name])


def told(values: Mapping[object, list[Run]], shown=str) -> str:
    """`0.9 (k1_first and k1_last), 0.8 (k2_first)`."""
    return "; ".join(f"{shown(value)} ({listed(r.config for r in runs)})" for value, runs in values.items())


# ---- the files ----

FAULTS = {
    "hand_edited": ("accuracy", "changed by hand"),
    "copies_differ": ("accuracy", "two different files"),
    "not_a_count": ("accuracy", "an accuracy that no run can have"),
    "mixed_limit": ("accuracy", "another number of questions than its folder says"),
}


def file_alarms(table: Table) -> list[Alarm]:
    """Corrupt, missing, stale, edited and contradictory summaries."""
    found = [
        Alarm("corrupt", table.label, (config,), "accuracy", f"{config}: corrupt, left out: {reason}")
        for config, reason in table.problems.items()
    ]
    for run in table.runs.values():
        for kind, text in run.faults:
            spoils, what = FAULTS.get(kind, ("accuracy", kind))
            found.append(Alarm(kind, table.label, (run.config,), spoils, f"{run.config}: {what}: {text}"))
    if table.missing:
        total = len(table.matrix.configurations)
        text = f"{len(table.missing)} of {total} configurations have no result: {listed(table.missing)}"
        found.append(Alarm("missing", table.label, tuple(table.missing), "accuracy", text))
    stale = [
        run.config
        for run in table.runs.values()
        if not run.is_foreign and table.code_sha256 and run.facts.get("generation_code_sha256") != table.code_sha256
    ]
    if stale:
        text = f"stale, its generation code is no longer the experiment's: {listed(stale)}"
        found.append(Alarm("stale", table.label, tuple(stale), "provenance", text))
    return found


# ---- notes on foreign results ----

LACKING = {
    "the number of questions": lambda run: run.summary.num_samples,
    "which answer each question got": lambda run: run.questions,
    "forwards": lambda run: run.forwards,
    "a hash of the code": lambda run: run.facts.get("generation_code_sha256"),
    "the model's revision": lambda run: run.facts.get("model_revision"),
    "dtype": lambda run: run.facts.get("dtype"),
    "threshold": lambda run: run.arguments.get("threshold"),
    "interruptions": lambda run: run.facts.get("num_segments"),
    "metric": lambda run: run.metric,
    "tokens and seconds": lambda run: run.tokens_per_second,
}


def foreign_notes(table: Table) -> list[Alarm]:
    """What imported summaries do not record, and what that means."""
    runs = list(table.runs.values())
    if not table.is_foreign or not runs:
        return []
    lacking = [name for name, value_of in LACKING.items() if all(value_of(run) is None for run in runs)]
    names = tuple(run.config for run in runs)
    found = []
    if lacking:
        text = f"imported or from an earlier runner, no result of this code; not recorded: {', '.join(lacking)}"
        found.append(Alarm("earlier_form", table.label, names, "provenance", text, NOTE))
    untimed = [run.config for run in runs if not run.scored and run.tokens_per_second is None]
    if untimed and len(untimed) < len(runs):
        text = f"tokens and seconds are not recorded: {listed(untimed)}"
        found.append(Alarm("no_throughput", table.label, tuple(untimed), "speed", text, NOTE))
    dirty = [run.config for run in runs if run.facts.get("dirty")]
    if dirty:
        text = f"ran from a checkout with uncommitted changes, so the commit does not say which code: {listed(dirty)}"
        found.append(Alarm("dirty_checkout", table.label, tuple(dirty), "provenance", text, NOTE))
    return found


def find_alarms(tables: list[Table], root=None) -> list[Alarm]:
    """All alarms and notes of the tables, alarms first, in the order of the tables."""
    from fast_dllm.report import alarms_answers, alarms_mixed, alarms_speed

    replays = alarms_mixed.replays(root) if root else {}
    found: list[Alarm] = []
    for table in tables:
        found += file_alarms(table)
        found += alarms_answers.answer_alarms(table)
        found += alarms_mixed.mixed_alarms(table, replays)
        found += alarms_speed.speed_alarms(table)
        found += foreign_notes(table)
    found += alarms_answers.plain_differs(tables)
    found += alarms_answers.repeated_tables(tables)
    found += alarms_mixed.across_tables(tables)
    found += alarms_speed.outliers_across(tables)
    return sorted(found, key=lambda alarm: alarm.level != ALARM)
