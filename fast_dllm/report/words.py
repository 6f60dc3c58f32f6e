"""Small pieces of text that the whole report shares: lists of names, percentages, intervals, values with their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.statistics import Interval

FORWARD_UNIT = "tokens per full-depth forward"


def listed(names: Iterable[str], most: int = 6) -> str:
    """`a, b and c`; a list of more than `most` names is cut."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A fraction as points: 0.0123 -> 1.2."""
    return f"{100 * value:.1f}"


def span(interval: Interval | None, signed: bool = False) -> str:
    """`[95.1, 98.0]`, in points or percent."""
    form = "+.1f" if signed else ".1f"
    return f"[{100 * interval.low:{form}}, {100 * interval.high:{form}}]" if interval else "[interval not known]"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def value_range(values: list, form: str) -> str:
    """`1.2 to 4.2`, or one value where the two ends look the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def name_of(configs: tuple[str, ...], table: ResultTable) -> str:
    """`k2 (first = middle = last)` where one result has several names."""
    if len(configs) == 1:
        return configs[0]
    parts = [config.split("_", 1) for config in configs]
    if all(len(part) == 2 for part in parts) and len({part[0] for part in parts}) == 1:
        return f"{parts[0][0]} ({' = '.join(part[1] for part in parts)})"
    return " = ".join(configs)


def by_value(runs: Iterable[RunResult], value_of: Callable[[RunResult], object]) -> dict[Any, list[RunResult]]:
    """Value -> the runs that have it, the most frequent value first. Runs that do not record it are left out."""
    groups: dict[object, list[RunResult]] = {}
    for run in runs:
        value = value_of(run)
        if value is not None:
            groups.setdefault(str(value) if isinstance(value, (list, dict)) else value, []).append(run)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def fact_of(name: str) -> Callable[[RunResult], str | None]:
    """For `by_value`: the text of a recorded fact."""
    return lambda run: None if run.facts.get(name) is None else str(run.facts[name])


def values_with_names(values: Mapping[object, list[RunResult]], shown: Callable[[object], str] = str) -> str:
    """`0.9 (k1_first and k1_last); 0.8 (k2_first)`."""
    return "; ".join(f"{shown(value)} ({listed(r.config for r in runs)})" for value, runs in values.items())


def short_value(value: object) -> str:
    """A hash is cut; paths and sentences stay whole."""
    text = str(value)
    return text if len(text) <= 24 or "/" in text or " " in text else f"{text[:10]}…"
