"""Decides which measured speeds can be compared: by hardware, conditions and outliers; and the speed of k = 1."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import median, median_low

from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import columns

EQUAL_WORK = 0.05  # runs whose token counts differ by no more than this share did the same work
OUTLIER = 1.5  # the same work in this many times the usual time was measured under other conditions


def hardware(run: RunResult) -> str | None:
    """The name of the GPU, or the device (`cpu`)."""
    return run.facts.get("gpu") or run.facts.get("device")


def is_on_cpu(run: RunResult) -> bool:
    return run.facts.get("device") == "cpu"


def processes_on_cpu(run: RunResult) -> int | None:
    """Processes of all shards that divided one CPU. None on GPUs, where each process has a GPU of its own and its
    seconds are counted by themselves."""
    if not is_on_cpu(run):
        return None
    return (run.facts.get("num_processes") or 1) * (run.facts.get("num_shares") or 1)


def was_interrupted(run: RunResult) -> bool:
    return (run.facts.get("num_segments") or 1) > 1


def conditions(run: RunResult) -> tuple:
    """The facts in which two runs must agree, so that their speeds can be compared."""
    graphs = run.facts.get("graphs") or "off"  # older summaries do not record it: there were no graphs then
    return (*(run.facts.get(name) for name in ("gpu", "device", "batch_size")), graphs, processes_on_cpu(run))


def timed(runs: Iterable[RunResult]) -> list[float]:
    """New tokens per second of the runs that have a time."""
    return [speed for run in runs if (speed := run.tokens_per_second)]


def _same_work(run: RunResult, other: RunResult) -> bool:
    tokens = run.new_tokens or 0, other.new_tokens or 0
    return conditions(run) == conditions(other) and max(tokens) - min(tokens) <= EQUAL_WORK * max(tokens)


def outliers(table: ResultTable) -> dict[str, tuple[RunResult, list[RunResult]]]:
    """Configuration -> (its run, runs of the same work), if their times differ by the factor OUTLIER or more.

    Runs on a CPU are left out: other programs change their times.
    """
    outlier_runs = {}
    for group in (group for groups in columns(table).values() for group in groups):
        with_speed = [(run, speed) for run in group if not is_on_cpu(run) and (speed := run.tokens_per_second)]
        for run, speed in with_speed:
            peers = [
                (other, other_speed) for other, other_speed in with_speed if other is not run and _same_work(run, other)
            ]
            if not peers:
                continue
            speeds = [other_speed for _, other_speed in peers]
            middle, spread = median(speeds), max(speeds) / min(speeds)
            ratio = max(speed / middle, middle / speed)
            if ratio >= OUTLIER and (spread < OUTLIER or len(peers) == 1):
                outlier_runs[run.config] = (run, [other for other, _ in peers])
    return outlier_runs


def _forwards_key(table: ResultTable, run: RunResult) -> tuple | None:
    """A key that is equal for runs with the same forwards on the same hardware.

    None without counted forwards, and on a CPU, where other programs change the times.
    """
    if is_on_cpu(run) or table.is_foreign or not run.forwards or not run.tokens_per_second or was_interrupted(run):
        return None
    model = tuple(str(run.facts.get(name)) for name in ("model", "model_revision", "dtype"))
    return (*model, *map(str, conditions(run)), run.new_tokens, run.layers_run, *sorted(run.forwards.items()))


def slow_groups(tables: list[ResultTable]) -> list[tuple[str, list[RunResult], list[str], float]]:
    """(table's label, its slow runs, runs of other tables with the very same forwards, how many times as long).

    The usual time is the median over all runs with these forwards.
    """
    groups: dict[tuple, list[tuple[ResultTable, RunResult, float]]] = {}
    for table in tables:
        for run in table.runs.values():
            key, seconds = _forwards_key(table, run), run.summary.throughput.seconds_generating
            if key is not None and seconds:
                groups.setdefault(key, []).append((table, run, seconds))
    slow_of_tables = []
    for members in groups.values():
        usual = median_low([seconds for _, _, seconds in members])
        for label in dict.fromkeys(table.label for table, _, _ in members):
            slow = [(run, seconds) for t, run, seconds in members if t.label == label and seconds >= OUTLIER * usual]
            peers = [f"{t.label}/{run.config}" for t, run, s in members if t.label != label and s < OUTLIER * usual]
            if slow and peers:
                ratio = max(seconds for _, seconds in slow) / usual
                slow_of_tables.append((label, [run for run, _ in slow], peers, ratio))
    return slow_of_tables


def can_time(run: RunResult, base: RunResult) -> bool:
    """Whether the times of two runs can be compared: the same conditions, no interruption of `base`, no CPU."""
    return not is_on_cpu(run) and conditions(base) == conditions(run) and not was_interrupted(base)


def speed_without_reuse(table: ResultTable, run: RunResult, outlier_configs: Collection[str] = ()) -> float | None:
    """New tokens per second of the table's k = 1 under the run's conditions: the median of its usual columns.

    A table without such columns has the configuration that its matrix compares with. None on a CPU, where other
    programs change the times. outlier_configs: configurations whose times other tables have shown to be outliers.
    """
    outlier_configs = {*outlier_configs, *outliers(table)}
    ones = [one for one in table.runs.values() if one.reuse_k == 1 and one.arguments.get("layer_subset")]
    named = table.runs.get(table.compare_with or "")
    usual = [
        one
        for one in ones or ([named] if named else [])
        if can_time(run, one) and one.config not in outlier_configs and "+" not in one.config
    ]
    speeds = timed(usual)
    return median(speeds) if speeds else None
