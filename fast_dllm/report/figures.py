"""Draws the report's pictures, as wide as one column of a paper.

Each function returns a Matplotlib Figure, or None if there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import matplotlib
from matplotlib.figure import Figure

from fast_dllm.report.aup import pareto
from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast, interval_of
from fast_dllm.report.drawing import STYLE, file_name, new_figure, short_name, style_of
from fast_dllm.report.heat_map import heat_map
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import distinct, is_plain
from fast_dllm.report.speeds import hardware, outliers
from fast_dllm.report.statistics import Interval
from fast_dllm.report.words import name_of
from fast_dllm.spec.matrix import NINE

INCOMPARABLE = "#b0b0b0"  # points whose speeds cannot be compared
MOST_NAMES = 14  # points that are still labelled with their names
MOST_ROWS = 40  # contrasts in one picture of differences
CLOSE = 0.5  # the second picture leaves out speeds below this fraction of the highest one (threshold 1 is far below)


def _errors(runs: list[RunResult]) -> list[list[float]]:
    """Error bars of the runs' accuracies, in points: the lengths below, and those above."""
    intervals = [(run.accuracy, interval_of(run) or Interval(run.accuracy, run.accuracy)) for run in runs]
    low = [100 * max(0, accuracy - interval.low) for accuracy, interval in intervals]
    high = [100 * max(0, interval.high - accuracy) for accuracy, interval in intervals]
    return [low, high]


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto-optimal points, by speed."""
    return [points[index] for index in pareto(points)]


@dataclass(frozen=True)
class Point:
    """One result in a picture. Several runs with the same answers and forwards are one result.

    run: one of these runs. speed: the median of theirs. is_comparable: whether no alarm forbids comparing the speed.
    """

    table: ResultTable
    run: RunResult
    speed: float
    name: str
    is_comparable: bool = True

    @property
    def place(self) -> tuple[float, float]:
        return self.speed, 100 * self.run.accuracy


def points_of(report: Report, speed: Callable[[RunResult], float | None], only: str | None = None) -> list[Point]:
    """Every distinct result that has a speed.

    only: use only runs on this hardware, and leave out runs whose time is an outlier.
    """
    points = []
    for table in report.drawn_tables:
        outlier_configs = {*outliers(table), *report.outlier_configs(table.label)} if only is not None else set()
        incomparable = report.incomparable_configs(table)
        for group in distinct(table.runs.values()):
            usual = [
                run for run in group if run.config not in outlier_configs and (only is None or hardware(run) == only)
            ]
            timed = [(run, value) for run in usual if (value := speed(run))]
            if timed:
                name = short_name(name_of(tuple(run.config for run in group), table).split(" (")[0])
                is_comparable = only is None or not {run.config for run, _ in timed} & incomparable
                points.append(Point(table, timed[0][0], median(value for _, value in timed), name, is_comparable))
    return points


def scatter(report: Report, points: list[Point], label: str) -> Figure | None:
    """Draws accuracy against a speed for all experiments, with the Pareto fronts of plain decoding and of all."""
    if not points:
        return None
    figure = new_figure(2.9)
    axes = figure.add_subplot()
    for table in report.tables:
        for is_comparable in (True, False):
            of_table = [point for point in points if point.table is table and point.is_comparable == is_comparable]
            if of_table:
                _draw_points(axes, table, of_table, is_comparable)
    _names(axes, points)
    _lines(axes, report, [point for point in points if point.is_comparable])
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, % (95% interval)")
    axes.grid(color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=1.6)
    return figure


def _draw_points(axes, table: ResultTable, points: list[Point], is_comparable: bool) -> None:
    """Draws the points of one table; grey if their speeds cannot be compared."""
    colour, marker = style_of(table.experiment or table.label)
    if not is_comparable:
        colour = INCOMPARABLE
    axes.errorbar(
        [point.place[0] for point in points],
        [point.place[1] for point in points],
        yerr=_errors([point.run for point in points]),
        fmt=marker,
        color=colour,
        markersize=4.5,
        elinewidth=0.7,
        capsize=1.5,
        markeredgecolor="black" if is_comparable else colour,
        markeredgewidth=0.4,
        markerfacecolor="white" if table.is_foreign else colour,
        label=short_name(table.label) if is_comparable else f"{short_name(table.label)}, grey",
    )


def _names(axes, points: list[Point]) -> None:
    """Writes each point's name, if there are at most MOST_NAMES. Columns of one k at the same point get one name."""
    named: dict[tuple[str, str], Point] = {}
    for point in points:
        stem = point.name.split("_")[0] if point.run.config in NINE.configurations else point.name
        named.setdefault((point.table.label, stem), point)
    if len(named) <= MOST_NAMES:
        for (_, stem), point in named.items():
            axes.annotate(stem, point.place, xytext=(4, 3), textcoords="offset points", fontsize=6, color="#333333")


def _lines(axes, report: Report, points: list[Point]) -> None:
    """Draws the Pareto front of plain decoding (the curve to beat), and the one of all results."""
    envelope = _front([point.place for point in points if point.run in report.control])
    if len(envelope) > 1:
        axes.plot(*zip(*envelope, strict=True), "--", color="black", linewidth=1.1, zorder=1, label="plain: envelope")
    front = _front([point.place for point in points])
    if len(front) > 1 and not all(is_plain(point.run, point.table) for point in points):
        axes.plot(*zip(*front, strict=True), ":", color="#777777", linewidth=1.4, zorder=0, label="Pareto front")


def differences(report: Report, contrasts: list[Contrast]) -> Figure | None:
    """Draws each contrast's difference with its interval; filled markers are significant after the correction."""
    if not contrasts:
        return None
    labels = {table.label: table for table in report.tables}
    several = len({c.table for c in contrasts}) > 1
    figure = new_figure(0.8 + 0.2 * len(contrasts))
    axes = figure.add_subplot()
    for y, c in enumerate(contrasts):
        colour, marker = style_of(labels[c.table].experiment or c.table)
        sure = c.outcome in ("loses", "gains")
        middle = 100 * c.difference
        sides = [[middle - 100 * c.interval.low], [100 * c.interval.high - middle]]
        axes.errorbar(
            [middle], [y], xerr=sides, fmt=marker, color=colour, markersize=4.5, elinewidth=1, capsize=2,
            markerfacecolor=colour if sure else "white",
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    names = [short_name(name_of(c.configs, labels[c.table]).split(" (")[0]) for c in contrasts]
    names = [f"{short_name(c.table)}/{n}" if several else n for c, n in zip(contrasts, names, strict=True)]
    axes.set_yticks(range(len(contrasts)), names, fontsize=7 if len(contrasts) < 25 else 5)
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
    # A label of the whole figure: long names make the axes narrow, and an axis label would be cut off.
    figure.supxlabel("difference to the baseline, points (95% interval)\nfilled: significant after Holm", fontsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    return figure


def all_differences(report: Report) -> dict[str, tuple[Figure | None, str]]:
    """Name -> (figure, caption): one picture of all contrasts, or with more than MOST_ROWS, pictures of each table."""
    of_table = {table.label: list(report.contrasts.get(table.label, ())) for table in report.tables}
    every = [contrast for contrasts in of_table.values() for contrast in contrasts]
    text = "difference to the baseline, with 95% intervals."
    if len(every) <= MOST_ROWS:
        return {"differences": (differences(report, every), text.capitalize())}
    pictures = {}
    for label, contrasts in of_table.items():
        for start in range(0, len(contrasts), MOST_ROWS):
            part = f"_{start // MOST_ROWS + 1}" if len(contrasts) > MOST_ROWS else ""
            name = f"differences_{file_name(label)}{part}"
            pictures[name] = differences(report, contrasts[start : start + MOST_ROWS]), f"{label}: {text}"
    return pictures


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Picture name -> (figure, caption), for all pictures of the report."""
    pictures: dict[str, tuple[Figure | None, str]] = {}
    with matplotlib.rc_context(STYLE):
        unit = "tokens per full-depth forward, all forwards counted"
        text = f"Accuracy against {unit}."
        if len(report.front) > 1:
            text += " Dashed: plain decoding's envelope, the curve to beat."
        points = points_of(report, lambda run: run.tokens_per_forward)
        pictures["accuracy_tokens_per_forward"] = scatter(report, points, unit), text
        fast = [point for point in points if point.speed >= CLOSE * max(point.speed for point in points)]
        if 1 < len(fast) < len(points):
            text = f"The same, without the points below {CLOSE:.0%} of the highest number of tokens per forward."
            pictures["accuracy_tokens_per_forward_close"] = scatter(report, fast, unit), text
        where = report.hardware
        points = points_of(report, lambda run: run.tokens_per_second, where) if where else []
        text = f"Accuracy against new tokens per second on {where}."
        if not all(point.is_comparable for point in points):
            text += " Grey: speeds that cannot be compared (see the alarms); no line is drawn through them."
        pictures["accuracy_tokens_per_second"] = scatter(report, points, f"new tokens/s on {where}"), text
        pictures |= all_differences(report)
        for table in report.tables:
            name = f"heat_map_{file_name(table.label)}"
            pictures[name] = heat_map(table), f"{table.label}: accuracy of each configuration, in percent."
    return {name: (figure, text) for name, (figure, text) in pictures.items() if figure is not None}
