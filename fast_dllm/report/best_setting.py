"""Which setting is the best: the most tokens per forward of those shown to lose no more accuracy than a budget."""

from __future__ import annotations

from dataclasses import dataclass

from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.words import name_of

BUDGETS = (0.01, 0.02, 0.05)  # losses of accuracy that a reader may accept, the strictest first


@dataclass(frozen=True)
class Best:
    """The setting with the most tokens per forward of those shown to lose no more than `budget`."""

    budget: float
    gain: float
    contrast: Contrast
    table: ResultTable

    @property
    def run(self) -> RunResult:
        return self.table.runs[self.contrast.configs[0]]

    @property
    def name(self) -> str:
        return f"{self.table.label}/{name_of(self.contrast.configs, self.table)}"


def candidates_of(report: Report) -> list[tuple[float, Contrast, ResultTable]]:
    """(gain in tokens per forward, contrast, table) of every paired result that no alarm spoils."""
    candidates = []
    for table in report.local_tables:
        if unfit_kinds(report, table) or report.alarms_against("reuse", table.label):
            continue
        for contrast in report.contrasts.get(table.label, ()):
            if contrast.paired and contrast.forward_gain is not None:
                candidates.append((contrast.forward_gain, contrast, table))
    return candidates


def best_within(candidates: list[tuple[float, Contrast, ResultTable]], budget: float) -> Best | None:
    shown = [entry for entry in candidates if entry[1].interval.low >= -budget and entry[0] > 1]
    if not shown:
        return None
    gain, contrast, table = max(shown, key=lambda entry: entry[0])
    return Best(budget, gain, contrast, table)


def best_setting(report: Report) -> Best | None:
    """The best setting within the strictest budget that any setting keeps."""
    candidates = candidates_of(report)
    return next((best for budget in BUDGETS if (best := best_within(candidates, budget))), None)


def unfit_kinds(report: Report, table: ResultTable) -> list[str]:
    """The kinds of the alarms that forbid any claim about the table's accuracies, or about those of its baseline."""
    labels = {table.label, report.against.table if report.against else table.label}
    few = [a for a in report.alarms if a.kind == "too_few_questions" and a.table in labels]
    alarms = (*few, *(alarm for label in sorted(labels) for alarm in report.alarms_against("accuracy", label)))
    return list(dict.fromkeys(alarm.kind.replace("_", " ") for alarm in alarms))
