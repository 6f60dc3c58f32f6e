"""The drift map's pictures, in the report's style. Each function returns a Matplotlib Figure."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from fast_dllm.drift.sums import CLASSES, DISTANCES, QUANTITIES, SKIPPED_STEPS, SUMS, DriftSums
from fast_dllm.report.drawing import COLOURS, COLUMN, MARKERS, new_figure


def _heat_map(figure: Figure, axes, values: np.ndarray, title: str, most: float) -> None:
    """values (L, T) in percent: layers upwards, steps to the right."""
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=most)
    axes.set(title=title, xlabel="denoising step of the block", ylabel="layer")
    figure.colorbar(image, ax=axes, label="relative L1 change, %")


def _recorded_steps(sums: DriftSums) -> slice:
    recorded = np.flatnonzero(sums.by_class[0, SUMS.index("rows")].sum(axis=(0, 2)))
    return slice(1, int(recorded[-1]) + 1 if len(recorded) else 2)


def layer_step(sums: DriftSums) -> Figure:
    """What each layer adds, against the step before: layer by step."""
    figure = new_figure(2.6)
    values = 100 * sums.relative("residual", ("layer", "step"))
    steps = _recorded_steps(sums)
    values[:, : steps.start] = np.nan
    _heat_map(figure, figure.subplots(), values[:, : steps.stop], "what each layer adds, all rows", np.nanmax(values))
    return figure


def row_class(sums: DriftSums) -> Figure:
    """The same for rows just unmasked, still masked, and unmasked before."""
    figure = new_figure(2.4, 2 * COLUMN)
    steps = _recorded_steps(sums)
    maps = [100 * sums.relative("residual", ("layer", "step"), rows) for rows in CLASSES]
    most = max(np.nanmax(each) if np.isfinite(each).any() else 0.0 for each in maps)
    for axes, values, rows in zip(figure.subplots(1, len(CLASSES)), maps, CLASSES, strict=True):
        _heat_map(figure, axes, values[:, : steps.stop], rows, most)
    return figure


def depth(sums: DriftSums) -> Figure:
    """Each quantity against depth, and the residual by distance to the nearest row just unmasked."""
    figure = new_figure(3.2, 2 * COLUMN)
    left, right = figure.subplots(1, 2)
    layers = np.arange(sums.num_layers)
    every = max(sums.num_layers // 6, 1)
    for index, quantity in enumerate(QUANTITIES):
        style = {"color": COLOURS[index], "marker": MARKERS[index], "markevery": every, "markersize": 3, "lw": 1}
        left.plot(layers, 100 * sums.relative(quantity), label=quantity, **style)
    left.set(xlabel="layer", ylabel="relative L1 change, %", title="all rows", yscale="log")
    _legend_below(left, "quantity")
    sums_by_distance = sums.by_distance[QUANTITIES.index("residual")]
    for index, (least, most) in enumerate(DISTANCES):
        size = sums_by_distance[SUMS.index("size"), :, index]
        if size.any():
            name = str(least) if least == most else f"{least}-{most}" if most < 1000 else f"{least} and more"
            style = {"color": COLOURS[index], "marker": MARKERS[index], "markevery": every, "markersize": 3, "lw": 1}
            right.plot(layers, 100 * sums_by_distance[SUMS.index("difference"), :, index] / size, label=name, **style)
    right.set(xlabel="layer", title="what a layer adds, by distance", yscale="log")
    _legend_below(right, "rows to the nearest new token")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(_plain_number)  # the style writes no mathematics: 10^1 would be raw LaTeX
        axes.yaxis.set_minor_formatter(_plain_number)
        axes.tick_params(axis="y", which="minor", labelsize=7)
    return figure


def _plain_number(value: float, _position: object = None) -> str:
    """1, 2, 5 and their tens are labelled, the other ticks of a logarithmic axis are not."""
    return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""


def _legend_below(axes, title: str) -> None:
    axes.legend(title=title, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False)


def ranges(sums: DriftSums) -> Figure:
    """The predicted error of skipping each range of layers, for each k and age of what is stored."""
    figure = new_figure(2.8, 2 * COLUMN)
    costs = [100 * sums.cost(skipped) for skipped in SKIPPED_STEPS]
    most = max(np.nanmax(cost) for cost in costs)
    for axes, cost, skipped in zip(figure.subplots(1, len(SKIPPED_STEPS)), costs, SKIPPED_STEPS, strict=True):
        last = cost[:, 1:]  # [a, b] is layers a .. b
        image = axes.imshow(last, origin="lower", cmap="viridis", vmin=0, vmax=most)
        axes.set(title=skipped.name, xlabel="last skipped layer", ylabel="first skipped layer")
        figure.colorbar(image, ax=axes, label="predicted error, %")
    return figure


PICTURES = {"layer_step": layer_step, "row_class": row_class, "depth": depth, "ranges": ranges}
