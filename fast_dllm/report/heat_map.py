"""Draws the accuracy of each configuration as a heat map, whose axes are the arguments that vary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.figure import Figure

from fast_dllm.report.drawing import new_figure, short_name
from fast_dllm.report.results import ResultTable

MOST_COLUMNS = 8  # of a heat map


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
    announced = {config: table.announced(config) for config in table.matrix.configurations}
    names = list(dict.fromkeys(key for arguments in announced.values() for key in arguments))
    recorded = {
        key: next(
            (
                run.arguments.get(key)
                for config, run in table.runs.items()
                if config in announced and key not in announced[config]
            ),
            None,
        )
        for key in names
    }
    full = {config: {**recorded, **arguments} for config, arguments in announced.items()}
    varied = [key for key in names if len({str(arguments[key]) for arguments in full.values()}) > 1]
    if not varied:
        return None
    row = max(varied, key=lambda key: len({str(arguments[key]) for arguments in full.values()}))
    column = tuple(key for key in varied if key != row)
    if len({tuple(arguments[key] for key in column) for arguments in full.values()}) > MOST_COLUMNS:
        row, column, full = "configuration", (), {config: {"configuration": config} for config in announced}
    places = {
        config: ((arguments[row],), tuple(arguments[key] for key in column)) for config, arguments in full.items()
    }
    return Axes(
        row,
        column,
        tuple(_cell(value) for value in _in_order(row for row, _ in places.values())),
        tuple(_cell(value) for value in _in_order(column for _, column in places.values())),
        {config: (_cell(row), _cell(column)) for config, (row, column) in places.items()},
    )


def _cell(values: tuple) -> str:
    """The label of a row or column: one line for each value."""
    return "\n".join(short_name(str(value)) for value in values)


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
    accuracies = [value for row in grid for value in row if value == value]
    most_lines = max(1, len(place.column))
    figure = new_figure(min(0.9 + (0.36 if len(rows) < 9 else 0.24) * len(rows) + 0.24 * (most_lines - 1), 9.0))
    axes = figure.add_subplot()
    low, high = min(accuracies), max(accuracies)
    image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=low - 0.5, vmax=high + 0.5)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            text, middle = ("–", True) if value != value else (f"{value:.1f}", value > (low + high) / 2)
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if middle else "white")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("\n".join(place.column).replace("_", " "))
    axes.set_ylabel(place.row.replace("_", " "))
    axes.set_title(short_name(table.label))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label="accuracy, %")
    return figure
