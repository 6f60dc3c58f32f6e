"""What a condition of an alarm yields: the configurations concerned, and the values of the rule's sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fast_dllm.report.results import RunResult

ALL_TABLES = "all experiments"  # the label of a Match that concerns no single table


@dataclass(frozen=True)
class Match:
    """One place where the condition of an alarm holds.

    configs: the configurations concerned. values: of the fields in the rule's sentence. table: the label of the table,
    if the condition compares several tables.
    """

    configs: tuple[str, ...]
    values: Mapping[str, object] = field(default_factory=dict)
    table: str | None = None


def configs_of(runs: Iterable[RunResult]) -> tuple[str, ...]:
    """The names of the runs' configurations."""
    return tuple(run.config for run in runs)
