"""The report's pictures: a paper's column wide, told apart by shape as well as colour, the same in every report.

An experiment's colour and marker follow from the number that its name starts with, so they never change. Each function
returns a Matplotlib Figure, or None where there is nothing to draw; `png` and `svg` make the same bytes each time.
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

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that vanishes on white.
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
CLOSE = 0.5  # of the most tokens per forward: threshold 1 is far to the left of all that is compared


def style_of(experiment: str) -> tuple[str, str]:
    """(colour, marker) of an experiment: by the number in front of its name, else by the name itself."""
    digits = re.match(r"\d+", experiment)
    number = int(digits[0]) if digits else zlib.crc32(experiment.encode())
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]


def _figure(height: float, width: float = COLUMN) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _errors(runs: list[RunResult]) -> list[list[float]]:
    intervals = [accuracy_of(run).interval for run in runs]
    low = [100 * (run.accuracy - i.low) if i else 0 for run, i in zip(runs, intervals, strict=True)]
    high = [100 * (i.high - run.accuracy) if i else 0 for run, i in zip(runs, intervals, strict=True)]
    return [[max(0, v) for v in low], [max(0, v) for v in high]]


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [points[index] for index in pareto(points)]


@dataclass(frozen=True)
class Point:
    """One result in a picture: its speed (the median of several columns), one of its runs, a short name.

    is_comparable: no alarm says that its speed cannot be compared.
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
    """Every distinct result with a speed; columns whose time is another kind of run's do not count.

    only: the runs of this hardware alone.
    """
    found = []
    for table in report.own if any(table.runs for table in report.own) else report.foreign:
        odd = {*outliers(table), *report.odd_speeds(table.label)} if only is not None else set()
        spoiled = report.spoiled_speeds(table)
        for group in distinct(table.runs.values()):
            usual = [run for run in group if run.config not in odd and (only is None or hardware(run) == only)]
            timed = [(run, value) for run in usual if (value := speed(run))]
            if timed:
                name = _short(name_of(tuple(run.config for run in group), table).split(" (")[0])
                is_comparable = only is None or not {run.config for run, _ in timed} & spoiled
                found.append(Point(table, timed[0][0], median(value for _, value in timed), name, is_comparable))
    return found


def scatter(report: Report, found: list[Point], label: str) -> Figure | None:
    """Accuracy against a speed, over all experiments, with plain decoding's envelope and the Pareto front."""
    if not found:
        return None
    figure = _figure(2.9)
    axes = figure.add_subplot()
    for table in report.tables:
        for is_comparable in (True, False):
            of_table = [point for point in found if point.table is table and point.is_comparable == is_comparable]
            if of_table:
                _draw_points(axes, table, of_table, is_comparable)
    _names(axes, found)
    _lines(axes, report, [point for point in found if point.is_comparable])
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, % (95% interval)")
    axes.grid(color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=1.6)
    return figure


def _draw_points(axes, table: ResultTable, points: list[Point], is_comparable: bool) -> None:
    """The points of one table; in grey where their speeds cannot be compared."""
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


def _names(axes, found: list[Point]) -> None:
    """Write each point's name where the points are few. Columns of one k that share a point get one name."""
    named: dict[tuple[str, str], Point] = {}
    for point in found:
        stem = point.name.split("_")[0] if point.run.config in NINE.configurations else point.name
        named.setdefault((point.table.label, stem), point)
    if len(named) <= MOST_NAMES:
        for (_, stem), point in named.items():
            axes.annotate(stem, point.place, xytext=(4, 3), textcoords="offset points", fontsize=6, color="#333333")


def _lines(axes, report: Report, found: list[Point]) -> None:
    """The curve to beat, and the front of all that was measured."""
    envelope = _front([point.place for point in found if point.run in report.control])
    if len(envelope) > 1:
        axes.plot(*zip(*envelope, strict=True), "--", color="black", linewidth=1.1, zorder=1, label="plain: envelope")
    front = _front([point.place for point in found])
    if len(front) > 1 and not all(is_plain(point.run, point.table) for point in found):
        axes.plot(*zip(*front, strict=True), ":", color="#777777", linewidth=1.4, zorder=0, label="Pareto front")


@dataclass(frozen=True)
class Axes:
    """The cell of each configuration of a matrix. row: one argument; column: one or several, a line of each."""

    row: str
    column: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[str, tuple[str, str]]


def _in_order(values: Iterable[tuple]) -> list[tuple]:
    """Distinct tuples: by number in the places that hold numbers alone, else as they first come."""
    seen = list(dict.fromkeys(values))
    ranks = []
    for place in zip(*seen, strict=True):
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in place)
        first = {value: index for index, value in reversed(list(enumerate(place)))}
        ranks.append(place if numbers else [first[value] for value in place])
    order = sorted(range(len(seen)), key=lambda index: tuple(rank[index] for rank in ranks))
    return [seen[index] for index in order]


def axes_of(table: ResultTable) -> Axes | None:
    """Axes in which no two configurations of the table's matrix fall into one cell.

    The rows are the argument with the most values, the columns all others that vary. Where that takes more than
    MOST_COLUMNS, each configuration is a row by its name. What a configuration leaves as it is has the value that such
    a run recorded.
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
    return "\n".join(_short(str(value)) for value in values)


def heat_map(table: ResultTable) -> Figure | None:
    """Accuracy over the two arguments that the matrix varies; each cell says its number."""
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


def differences(report: Report, found: list[Contrast]) -> Figure | None:
    """Each contrast's difference with its interval; filled where it is significant after the correction."""
    if not found:
        return None
    labels = {table.label: table for table in report.tables}
    several = len({c.table for c in found}) > 1
    figure = _figure(0.8 + 0.2 * len(found))
    axes = figure.add_subplot()
    for y, c in enumerate(found):
        colour, marker = style_of(labels[c.table].experiment or c.table)
        sure = c.outcome in ("loses", "gains")
        middle = 100 * c.difference
        sides = [[middle - 100 * c.interval.low], [100 * c.interval.high - middle]]
        axes.errorbar(
            [middle], [y], xerr=sides, fmt=marker, color=colour, markersize=4.5, elinewidth=1, capsize=2,
            markerfacecolor=colour if sure else "white",
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    names = [_short(name_of(c.configs, labels[c.table]).split(" (")[0]) for c in found]
    names = [f"{_short(c.table)}/{n}" if several else n for c, n in zip(found, names, strict=True)]
    axes.set_yticks(range(len(found)), names, fontsize=7 if len(found) < 25 else 5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    # below the whole figure: under axes that long names have made narrow it would be cut off
    figure.supxlabel("difference to the baseline, points (95% interval)\nfilled: significant after Holm", fontsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    return figure


def all_differences(report: Report) -> dict[str, tuple[Figure | None, str]]:
    """One picture of every contrast; where they are more than MOST_ROWS, one for each table, in parts if need be."""
    of_table = {table.label: list(report.contrasts.get(table.label, ())) for table in report.tables}
    every = [contrast for found in of_table.values() for contrast in found]
    text = "difference to the baseline, with 95% intervals."
    if len(every) <= MOST_ROWS:
        return {"differences": (differences(report, every), text.capitalize())}
    made = {}
    for label, found in of_table.items():
        for start in range(0, len(found), MOST_ROWS):
            part = f"_{start // MOST_ROWS + 1}" if len(found) > MOST_ROWS else ""
            name = f"differences_{file_name(label)}{part}"
            made[name] = differences(report, found[start : start + MOST_ROWS]), f"{label}: {text}"
    return made


def file_name(text: str) -> str:
    """Letters, digits, `_`, `-` and `.` of a name; two names that become one are told apart by a hash."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "x"
    return safe if safe == text else f"{safe}_{zlib.crc32(text.encode()):08x}"


def draw(report: Report) -> dict[str, tuple[Figure, str]]:
    """Picture name -> (figure, what it shows)."""
    made: dict[str, tuple[Figure | None, str]] = {}
    with matplotlib.rc_context(STYLE):
        unit = "tokens per full-depth forward, all forwards counted"
        text = f"Accuracy against {unit}."
        if len(report.front) > 1:
            text += " Dashed: plain decoding's envelope, the curve to beat."
        found = points_of(report, lambda run: run.tokens_per_forward)
        made["accuracy_tokens_per_forward"] = scatter(report, found, unit), text
        fast = [point for point in found if point.speed >= CLOSE * max(point.speed for point in found)]
        if 1 < len(fast) < len(found):
            text = f"The same, without what gives less than {CLOSE:.0%} of the most tokens per forward."
            made["accuracy_tokens_per_forward_close"] = scatter(report, fast, unit), text
        where = report.hardware
        found = points_of(report, lambda run: run.tokens_per_second, where) if where else []
        text = f"Accuracy against new tokens per second on {where}."
        if not all(point.is_comparable for point in found):
            text += " Grey: speeds that cannot be compared (see the alarms); no line is drawn through them."
        made["accuracy_tokens_per_second"] = scatter(report, found, f"new tokens/s on {where}"), text
        made |= all_differences(report)
        for table in report.tables:
            name = f"heat_map_{file_name(table.label)}"
            made[name] = heat_map(table), f"{table.label}: accuracy of each configuration, in percent."
    return {name: (figure, text) for name, (figure, text) in made.items() if figure is not None}


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
