"""Builds one Report from tables: alarms, contrasts, the curve to beat, AUP. verdict.py puts it in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fast_dllm.report.alarms import ALARM, Alarm, find_alarms
from fast_dllm.report.aup import aup, pareto
from fast_dllm.report.compare import Contrast, at_equal_speed, baseline_of, contrasts, forward_gain
from fast_dllm.report.matches import ALL_TABLES
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import distinct, is_plain, reuses
from fast_dllm.report.speeds import can_time, hardware, outliers, speed_without_reuse

# accuracy alarms that leave the other configurations of a table as they are
LOCAL = ("missing", "corrupt", "answers_never_stop", "too_few_questions")


@dataclass(frozen=True)
class AupEntry:
    """The accuracy under parallelism (AUP, see aup.py) of one experiment's settings.

    num_points: settings that were run. num_dropped: of these, those that lose too much accuracy to count.
    """

    name: str
    value: float | None
    num_points: int
    num_dropped: int


@dataclass(frozen=True)
class Report:
    """Everything that the report says about one task.

    folder: of the task, as `gsm8k_limit_10`; tables: those of this code and the imported ones; against: the run of one
    of them that replaces every table's baseline; contrasts: of each table's label; control: plain decoding's runs;
    front: those on its Pareto front; equal_speed: results against the control at the same speed, or faster; command:
    makes this report again.
    """

    folder: str
    task: str
    limit: float | None
    tables: tuple[ResultTable, ...]
    against: RunResult | None
    alarms: tuple[Alarm, ...]
    contrasts: Mapping[str, tuple[Contrast, ...]]
    control: tuple[RunResult, ...]
    front: tuple[RunResult, ...]
    equal_speed: tuple[tuple[Contrast, RunResult], ...]
    aup_entries: tuple[AupEntry, ...]
    command: str
    root: Path

    @property
    def local_tables(self) -> list[ResultTable]:
        return [table for table in self.tables if not table.is_foreign]

    @property
    def imported_tables(self) -> list[ResultTable]:
        return [table for table in self.tables if table.is_foreign]

    @property
    def num_alarms(self) -> int:
        return sum(alarm.level == ALARM for alarm in self.alarms)

    def baseline(self, table: ResultTable, run: RunResult | None = None) -> RunResult | None:
        """What a run of the table is compared with; None if the table has no such run."""
        return self.against or baseline_of(table, run)

    def forward_gain(self, table: ResultTable, run: RunResult) -> float | None:
        """The run's tokens per full-depth forward / those of its baseline."""
        base = self.baseline(table, run)
        return forward_gain(run, base) if base else None

    def baseline_speed(self, table: ResultTable, run: RunResult) -> float | None:
        """The baseline's new tokens per second; None where the run's speed cannot be compared with it."""
        base = self.against
        if base is None:
            return speed_without_reuse(table, run, self.outlier_configs(table.label))
        is_comparable = can_time(run, base) and base.config not in self.outlier_configs(base.table)
        return base.tokens_per_second if is_comparable else None

    def alarms_against(self, claim: str, table: str) -> list[Alarm]:
        """The alarms that forbid a claim (accuracy, speed, reuse) about a table as a whole."""
        return [
            alarm
            for alarm in self.alarms
            if alarm.level == ALARM
            and alarm.table in (table, ALL_TABLES)
            and alarm.spoils == claim
            and alarm.kind not in LOCAL
        ]

    def outlier_configs(self, table: str) -> set[str]:
        """The table's configurations that took far longer, or less, than the same work elsewhere."""
        return {
            c for alarm in self.alarms if (alarm.kind, alarm.table) == ("speed_outlier", table) for c in alarm.configs
        }

    def incomparable_configs(self, table: ResultTable) -> set[str]:
        """The table's configurations whose speeds an alarm calls incomparable.

        Different hardware is not among them: speeds are drawn for one kind of hardware at a time. Where a run is an
        outlier only beside other tables, all speeds of its table were measured under other conditions.
        """
        alarms = [
            alarm
            for alarm in self.alarms
            if (alarm.spoils, alarm.level, alarm.table) == ("speed", ALARM, table.label)
            and alarm.kind not in ("reuse_slower", "mixed_gpu")
        ]
        outliers_in_table = outliers(table).keys()
        if any(alarm.kind == "speed_outlier" and not outliers_in_table & set(alarm.configs) for alarm in alarms):
            return set(table.runs)
        return {config for alarm in alarms for config in alarm.configs}

    @property
    def hardware(self) -> str | None:
        """The hardware of most runs. Speeds are drawn for this hardware alone."""
        counts = Counter(hardware(run) for run in self.runs(timed=True))
        return counts.most_common(1)[0][0] if counts else None

    @property
    def drawn_tables(self) -> list[ResultTable]:
        """The tables of this code; where these have no run, the imported ones."""
        return self.local_tables if any(table.runs for table in self.local_tables) else self.imported_tables

    def runs(self, timed: bool = False) -> list[RunResult]:
        """The runs of the drawn tables. timed: only those with a speed."""
        runs = [run for table in self.drawn_tables for run in table.runs.values()]
        return [run for run in runs if run.tokens_per_second and hardware(run)] if timed else runs


def control_runs(tables: list[ResultTable]) -> list[RunResult]:
    """The runs of the control experiments that reuse nothing, whatever rule unmasks; where there are none, k = 1 of
    every table."""
    with_speed = [(table, run) for table in tables for run in table.runs.values() if run.tokens_per_forward]
    of_controls = [run for table, run in with_speed if table.is_control and not reuses(run)]
    return of_controls or [run for table, run in with_speed if run.reuse_k == 1 and is_plain(run, table)]


def speed_accuracy_points(runs: list[RunResult]) -> list[tuple[float, float]]:
    """(tokens per full-depth forward, accuracy in percent)."""
    return [(run.tokens_per_forward, 100 * run.accuracy) for run in runs if run.tokens_per_forward]


def _aup_entries(tables: list[ResultTable], front: list[RunResult]) -> list[AupEntry]:
    """The accuracy under parallelism (AUP) of each table, and of plain decoding's Pareto front."""
    accuracies = [100 * run.accuracy for table in tables for run in table.runs.values()]
    best = max(accuracies, default=0.0)
    entries = []
    named = [(table.label, [group[0] for group in distinct(table.runs.values())]) for table in tables]
    if len(front) > 1:
        named.append(("plain decoding, its envelope", front))
    for name, runs in named:
        curve = sorted(speed_accuracy_points(runs))
        dropped = sum(y < curve[0][1] - 5.0 for _, y in curve) if curve else 0
        if curve:
            entries.append(AupEntry(name, aup(curve, best), len(curve), dropped))
    return entries


def build_report(
    folder: str,
    task: str,
    limit: float | None,
    tables: list[ResultTable],
    root: Path,
    command: str,
    against: RunResult | None = None,
) -> Report:
    """The Report of the tables of one task. against: see Report."""
    local_tables = [table for table in tables if not table.is_foreign and not table.is_scored]
    control = control_runs(local_tables)
    front = [control[index] for index in pareto(speed_accuracy_points(control))]
    groups = [
        group
        for table in local_tables
        for group in distinct(table.runs.values())
        if not any(run in control for run in group) and not is_plain(group[0], table)
    ]
    return Report(
        folder=folder,
        task=task,
        limit=limit,
        tables=tuple(tables),
        against=against,
        alarms=tuple(find_alarms(tables)),
        contrasts={table.label: tuple(contrasts(table, against)) for table in tables},
        control=tuple(control),
        front=tuple(front),
        equal_speed=tuple(at_equal_speed(groups, control, lambda run: run.tokens_per_forward)),
        aup_entries=tuple(_aup_entries(local_tables, front)),
        command=command,
        root=root,
    )


def run_numbers(report: Report, table: ResultTable, run: RunResult) -> dict[str, float | None]:
    """The measured numbers of a run by the names that report.json and runs.csv give them; None: not recorded."""
    return {
        "new_tokens": run.new_tokens,
        "seconds": run.summary.throughput.seconds_generating,
        "tokens_per_second": run.tokens_per_second,
        "full_depth_forwards": run.full_forwards,
        "tokens_per_full_depth_forward": run.tokens_per_forward,
        "layer_forwards_per_token": run.layers_per_token,
        "row_layer_forwards_per_token": run.row_layers_per_token,
        "speed_up_forwards": report.forward_gain(table, run),
        **{f"guesses_offered_{kind}": offered for kind, (_, offered) in run.guesses.items()},
        **{f"guesses_accepted_{kind}": accepted for kind, (accepted, _) in run.guesses.items()},
    }
