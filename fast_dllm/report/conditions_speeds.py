"""Conditions of alarms about speeds that cannot be compared.

alarms.py has the rule of each condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from fast_dllm.report.matches import Match, configs_of
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import (
    hardware,
    outliers,
    slow_groups,
    speed_without_reuse,
    timed,
    was_interrupted,
)
from fast_dllm.report.words import by_value, listed, values_with_names

NOISE = 0.05  # two timings of one thing differ by so much


def _timed_runs(table: ResultTable) -> list[RunResult]:
    return [run for run in table.runs.values() if run.tokens_per_second]


def several_values(table: ResultTable, value_of: Callable[[RunResult], object]) -> Iterator[Match]:
    """The runs that have a time differ in this value."""
    runs = _timed_runs(table)
    values = by_value(runs, value_of)
    if len(values) > 1:
        yield Match(configs_of(runs), {"values": values_with_names(values)})


def several_memory_sizes(table: ResultTable) -> Iterator[Match]:
    runs = _timed_runs(table)
    sizes = by_value(runs, lambda run: run.facts.get("gpu_memory_gb"))
    if len(by_value(runs, hardware)) == 1 and len(sizes) > 1:
        yield Match(configs_of(runs), {"values": values_with_names(sizes)})


def interrupted(table: ResultTable) -> Iterator[Match]:
    runs = [run for run in _timed_runs(table) if was_interrupted(run)]
    if runs:
        yield Match(configs_of(runs))


def outliers_of_columns(table: ResultTable) -> Iterator[Match]:
    """A run took OUTLIER times as long as the same work of its table, or the reverse."""
    if not table.runs:
        return
    for config, (run, peers) in outliers(table).items():
        ratio = median(timed(peers)) / timed([run])[0]
        if ratio < 1 and len(peers) == 1:
            continue  # of two runs the slower one is the outlier
        same_tokens = len({one.new_tokens for one in (run, *peers)}) == 1
        yield Match(
            (config,),
            {
                "ratio": f"{ratio:.1f}" if ratio > 1 else f"only {ratio:.2f}",
                "peers": listed(configs_of(peers)),
                "work": f"{run.new_tokens:,} tokens" if same_tokens else "work",
            },
        )


def slower_than_without_reuse(table: ResultTable) -> Iterator[Match]:
    """All columns of one k are slower than k = 1 on the same hardware, so reuse saved nothing."""
    outlier_runs = outliers(table)
    runs = [
        run
        for config, run in table.runs.items()
        if run.tokens_per_second and config not in outlier_runs and "+" not in config and (run.reuse_k or 1) > 1
    ]
    for k, group in sorted(by_value(runs, lambda run: run.reuse_k).items()):
        ratios = [speed / base for run in group if (base := speed_without_reuse(table, run)) for speed in timed([run])]
        if ratios and max(ratios) < 1 and median(ratios) < 1 - NOISE:
            yield Match(configs_of(group), {"k": k, "ratio": f"{median(ratios):.2f}"})


def outliers_across(tables: list[ResultTable]) -> Iterator[Match]:
    """Runs that took OUTLIER times as long as the very same forwards in another experiment."""
    for label, slow, peers, ratio in slow_groups(tables):
        whose = "its speed was" if len(slow) == 1 else "their speeds were"
        yield Match(configs_of(slow), {"ratio": f"{ratio:.1f}", "peers": listed(peers), "whose": whose}, label)
