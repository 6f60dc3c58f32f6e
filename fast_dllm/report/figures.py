"""Draws the report's pictures, as wide as one column of a paper.

The number at the start of an experiment's name fixes its colour and its marker, so they are the same in every report.
Each function returns a Matplotlib Figure, or None if there is nothing to draw. `png` and `svg` give the same bytes for
the same figure.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fast_dllm.report.aup import pareto
from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast, accuracy_of, distinct, is_plain
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import hardware, outliers
from fast_dllm.report.words import name_of
from fast_dllm.spec.matrix import NINE

# Okabe and Ito's colours, which colour-blind readers can distinguish. Their yellow is left out: too weak on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B")
MARKERS = "os^DvPX"
COLUMN = 3.5  # inches
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fast_dllm",
    "svg.fonttype": "path",
    "text.usetex": False,
    "text.parse_math": False,  # a `$` in a name is a dollar
}
INCOMPARABLE = "#b0b0b0"  # points whose speeds cannot be compared
MOST_NAMES = 14  # points that are still labelled with their names
MOST_ROWS = 40  # contrasts in one picture of differences
MOST_COLUMNS = 8  # of a heat map
CLOSE = 0.5  # the second picture leaves out speeds below this fraction of the highest one (threshold 1 is far below)


def style_of(experiment: str) -> tuple[str, str]:
    """(colour, marker) of an experiment: by the number in front of its name, else by the name itself."""
    digits = re.match(r"\d+", experiment)
    number = int(digits[0]) if digits else zlib.crc32(experiment.encode())
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]


def _figure(height: float, width: float = COLUMN) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _errors(runs: list[RunResult]) -> list[list[float]]:
    """Error bars of the runs' accuracies, in points: the lengths below, and those above."""
    intervals = [accuracy_of(run).interval for run in runs]
    low = [100 * (run.accuracy - i.low) if i else 0 for run, i in zip(runs, intervals, strict=True)]
    high = [100 * (i.high - run.accuracy) if i else 0 for run, i in zip(runs, intervals, strict=True)]
    return [[max(0, v) for v in low], [max(0, v) for v in high]]


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto-optimal points, by speed."""
    return [points[index] for index in pareto(points)]


@dataclass(frozen=True)
class Point:
    """One result in a picture. Several runs with the same answers are one result.

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
    for table in report.local_tables if any(table.runs for table in report.local_tables) else report.imported_tables:
        odd = {*outliers(table), *report.odd_speeds(table.label)} if only is not None else set()
        spoiled = report.spoiled_speeds(table)
        for group in distinct(table.runs.values()):
            usual = [run for run in group if run.config not in odd and (only is None or hardware(run) == only)]
            timed = [(run, value) for run in usual if (value := speed(run))]
            if timed:
                name = _short(name_of(tuple(run.config for run in group), table).split(" (")[0])
                is_comparable = only is None or not {run.config for run, _ in timed} & spoiled
                points.append(Point(table, timed[0][0], median(value for _, value in timed), name, is_comparable))
    return points


def scatter(report: Report, points: list[Point], label: str) -> Figure | None:
    """Draws accuracy against a speed for all experiments, with the Pareto fronts of plain decoding and of all."""
    if not points:
        return None
    figure = _figure(2.9)
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
        label=_short(table.label) if is_comparable else f"{_short(table.label)}, grey",
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


@dataclass(frozen=True)
class Axes:
    """The heat map's axes. row: the argument of the rows; column: those of the columns, one line each.

    rows, columns: their labels, in order. cells: configuration -> (row label, column label).
    """

    row: str
    column: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, tuple[str, str]]


def _in_order(values: Iterable[tuple]) -> list[tuple]:
    """The distinct tuples, sorted by their first elements, then the second, and so on.

    An element is compared as a number if all its values are numbers, else by which value came first.
    """
    distinct_values = list(dict.fromkeys(values))
    ranks = []
    for place in zip(*distinct_values, strict=True):
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in place)
        first = {value: index for index, value in reversed(list(enumerate(place)))}
        ranks.append(place if numbers else [first[value] for value in place])
    order = sorted(range(len(distinct_values)), key=lambda index: tuple(rank[index] for rank in ranks))
    return [distinct_values[index] for index in order]


def axes_of(table: ResultTable) -> Axes | None:
    """Axes that give each configuration of the table's matrix a cell of its own; None if no argument varies.

    The rows are the values of the argument that has the most. The columns are the combinations of the other arguments
    that vary. If there would be more than MOST_COLUMNS columns, each configuration is a row with its name. A
    configuration that does not set an argument has the value that such a run recorded.
    """
    known = {config: table.announced(config) for config in table.matrix.configurations}
    names = list(dict.fromkeys(key for given in known.values() for key in given))
    usual = {
        key: next((run.arguments.get(key) for c, run in table.runs.items() if c in known and key not in known[c]), None)
        for key in names
    }
    full = {config: {key: given.get(key, usual[key]) for key in names} for config, given in known.items()}
    varied = [key for key in names if len({str(given[key]) for given in full.values()}) > 1]
    if not varied:
        return None
    row = max(varied, key=lambda key: len({str(given[key]) for given in full.values()}))
    column = tuple(key for key in varied if key != row)
    if len({tuple(given[key] for key in column) for given in full.values()}) > MOST_COLUMNS:
        row, column, full = "configuration", (), {config: {"configuration": config} for config in known}
    places = {config: ((given[row],), tuple(given[key] for key in column)) for config, given in full.items()}
    return Axes(
        row,
        column,
        tuple(_cell(value) for value in _in_order(row for row, _ in places.values())),
        tuple(_cell(value) for value in _in_order(column for _, column in places.values())),
        {config: (_cell(row), _cell(column)) for config, (row, column) in places.items()},
    )


def _cell(values: tuple) -> str:
    """The label of a row or column: one line for each value."""
    return "\n".join(_short(str(value)) for value in values)


def heat_map(table: ResultTable) -> Figure | None:
    """Draws the accuracy of each configuration as a coloured cell with its number; see `axes_of`."""
    place = axes_of(table)
    if place is None:
        return None
    shown = {cell: table.runs[config] for config, cell in place.cells.items() if config in table.runs}
    if not shown:
        return None
    rows, columns = place.rows, place.columns
    grid = [[shown[r, c].accuracy * 100 if (r, c) in shown else float("nan") for c in columns] for r in rows]
    known = [value for row in grid for value in row if value == value]
    most_lines = max(1, len(place.column))
    figure = _figure(min(0.9 + (0.36 if len(rows) < 9 else 0.24) * len(rows) + 0.24 * (most_lines - 1), 9.0))
    axes = figure.add_subplot()
    low, high = min(known), max(known)
    image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=low - 0.5, vmax=high + 0.5)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            text, middle = ("–", True) if value != value else (f"{value:.1f}", value > (low + high) / 2)
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if middle else "white")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("\n".join(place.column).replace("_", " "))
    axes.set_ylabel(place.row.replace("_", " "))
    axes.set_title(_short(table.label))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label="accuracy, %")
    return figure


def differences(report: Report, contrasts: list[Contrast]) -> Figure | None:
    """Draws each contrast's difference with its interval; filled markers are significant after the correction."""
    if not contrasts:
        return None
    labels = {table.label: table for table in report.tables}
    several = len({c.table for c in contrasts}) > 1
    figure = _figure(0.8 + 0.2 * len(contrasts))
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
    names = [_short(name_of(c.configs, labels[c.table]).split(" (")[0]) for c in contrasts]
    names = [f"{_short(c.table)}/{n}" if several else n for c, n in zip(contrasts, names, strict=True)]
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


def file_name(text: str) -> str:
    """A file name made of letters, digits, `_`, `-` and `.`. If that changes the name, a hash keeps it unique."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "x"
    return safe if safe == text else f"{safe}_{zlib.crc32(text.encode()):08x}"


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


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=220, metadata={"Software": None})
    return file.getvalue()


def svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
