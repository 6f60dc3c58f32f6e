"""What a drift map is made of: sums over denoising steps, which add up over runs, as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fast_dllm.errors import UsageError

FORMAT = 3
QUANTITIES = ("output", "residual", "attention", "mlp", "keys", "values")
CLASSES = ("just unmasked", "still masked", "unmasked before")
DISTANCES = ((1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 1000))  # rows to the nearest one just unmasked
SUMS = ("difference", "size", "cosine", "rows")
LAGS = (1, 2)  # steps between what is stored and what is computed
CYCLE = 6  # a step's number modulo 6 says whether layers are skipped on it, for k = 2 and for k = 3
PARTS = 10  # questions are dealt out to so many parts, whose differences give the margins
DIGITS = 7  # significant digits of a sum in the file


@dataclass(frozen=True)
class SkippedSteps:
    """The steps of a block on which the store is `lag` steps old, if all layers run on every `reuse_k`-th step."""

    reuse_k: int
    lag: int

    @property
    def name(self) -> str:
        return f"k = {self.reuse_k}, {self.lag} step{'s' * (self.lag > 1)} old"


SKIPPED_STEPS = (SkippedSteps(2, 1), SkippedSteps(3, 1), SkippedSteps(3, 2))


@dataclass
class DriftSums:
    """Axes: Q QUANTITIES, S SUMS, L layers, T steps of a block, D DISTANCES, P PARTS, G LAGS, C steps modulo CYCLE.

    Over rows: `difference` is sum |now - before|, `size` sum |before| (both over the hidden dimensions), `cosine` the
    sum of cosines, `rows` their number. by_class (Q, S, L, T, CLASSES): against the step before, T is the later step's
    number in its block. by_distance (Q, S, L, D): of rows that were not just unmasked. ranges (P, G, C, L + 1, L + 1):
    over the rows that are read, sum of |(what layers a .. b - 1 add now) - (what they added G steps ago)|; leaving
    (P, G, C, L + 1): sum of |what enters layer b now|; question number n is in part n modulo P. The other fields say
    of what: runs that differ in it do not add up.
    """

    model: str
    task: str
    threshold: float
    small_block_size: int
    by_class: np.ndarray
    by_distance: np.ndarray
    ranges: np.ndarray
    leaving: np.ndarray
    questions: int = 0
    steps: int = 0  # pairs of adjacent steps

    @classmethod
    def empty(
        cls, num_layers: int, block_size: int, *, model: str, task: str, threshold: float, small_block_size: int
    ) -> DriftSums:
        quantities, sums = len(QUANTITIES), len(SUMS)
        return cls(
            model,
            task,
            threshold,
            small_block_size,
            np.zeros((quantities, sums, num_layers, block_size, len(CLASSES))),
            np.zeros((quantities, sums, num_layers, len(DISTANCES))),
            np.zeros((PARTS, len(LAGS), CYCLE, num_layers + 1, num_layers + 1)),
            np.zeros((PARTS, len(LAGS), CYCLE, num_layers + 1)),
        )

    @property
    def num_layers(self) -> int:
        return self.by_class.shape[2]

    def __add__(self, other: DriftSums) -> DriftSums:
        """The sums of both runs. Raises UsageError for runs that are not of the same model, task and settings."""
        merged: dict[str, Any] = {}
        for field in fields(self):
            value, other_value = getattr(self, field.name), getattr(other, field.name)
            if isinstance(value, np.ndarray):
                if value.shape != other_value.shape:
                    raise UsageError(f"drift maps of other sizes do not add up: {value.shape} and {other_value.shape}")
                merged[field.name] = value + other_value
            elif field.name in ("questions", "steps"):
                merged[field.name] = value + other_value
            elif value != other_value:
                raise UsageError(f"drift maps of another {field.name} do not add up: {value} and {other_value}")
            else:
                merged[field.name] = value
        return DriftSums(**merged)

    def write(self, path: Path) -> None:
        content: dict[str, Any] = {"format": FORMAT, "quantities": QUANTITIES, "sums": SUMS, "classes": CLASSES}
        content |= {"distances": DISTANCES, "lags": LAGS}
        for field in fields(self):
            value = getattr(self, field.name)
            content[field.name] = _rounded(value) if isinstance(value, np.ndarray) else value
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> DriftSums:
        """Raises UsageError for a file that is no drift map."""
        try:
            content = json.loads(path.read_text())
            file_format = content["format"] if isinstance(content, dict) else None
            if file_format != FORMAT:
                raise UsageError(f"{path} is no drift map of format {FORMAT}")
            values: dict[str, Any] = {field.name: content[field.name] for field in fields(cls)}
            values = {name: np.array(each) if isinstance(each, list) else each for name, each in values.items()}
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no drift map: {error!r}") from None

    # -- what they say -------------------------------------------------------------------------------------------------
    def relative(self, quantity: str, axes: Sequence[str] = ("layer",), rows: str | None = None) -> np.ndarray:
        """sum |now - before| / sum |before| by what is `kept` ("layer", "step"), of one class of rows or of all; NaN
        where nothing was seen."""
        sums = self.by_class[QUANTITIES.index(quantity)]  # (S, L, T, CLASSES)
        sums = sums.sum(axis=-1) if rows is None else sums[..., CLASSES.index(rows)]
        dropped = tuple(1 + index for index, axis in enumerate(("layer", "step")) if axis not in axes)
        sums = sums.sum(axis=dropped)
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[SUMS.index("difference")] / sums[SUMS.index("size")]

    def cost(self, skipped: SkippedSteps, without: int | None = None) -> np.ndarray:
        """(L, L + 1): [a, b] is the predicted error of skipping layers a .. b - 1 on these steps.

        What the stored residual is wrong by, as a share of what leaves the range (L1, rows that are read). NaN where
        b <= a. It says nothing of how much the layers above mind. without: a part to leave out.
        """
        parts = [part for part in range(PARTS) if part != without]
        steps = range(skipped.lag, CYCLE, skipped.reuse_k)
        changed, leaving = (
            each[parts].sum(axis=0)[skipped.lag - 1, steps].sum(axis=0) for each in (self.ranges, self.leaving)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = (changed / leaving)[:-1]
        first, stop = np.indices(errors.shape)
        return np.where(stop > first, errors, np.nan)

    def costs_without(self, skipped: SkippedSteps) -> np.ndarray:
        """(P, L, L + 1): `cost` without each part in turn, for margins."""
        return np.stack([self.cost(skipped, without=part) for part in range(PARTS)])

    def table(self, width: int | None = None) -> str:
        """The error of each range of `width` layers (default 12, or a third of a shallower model's), in Markdown.

        With 95% margins over questions. "least" is the range of the least error, and "as low" each other one whose
        difference from it is within that difference's own margin.
        """
        width = width or (12 if self.num_layers > 12 else max(self.num_layers // 3, 1))
        if not 0 < width <= self.num_layers:
            raise UsageError(f"a range of {width} layers does not fit in the model's {self.num_layers}")
        head = [f"layers ({width} of {self.num_layers})", *(skipped.name for skipped in SKIPPED_STEPS)]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        firsts = np.arange(self.num_layers - width + 1)
        columns = [self._cells(skipped, firsts, width) for skipped in SKIPPED_STEPS]
        for first, *cells in zip(firsts, *columns, strict=True):
            lines.append(f"| {first}-{first + width - 1} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _cells(self, skipped: SkippedSteps, firsts: np.ndarray, width: int) -> list[str]:
        """A column of the table: the error of each range of `width` layers."""
        costs = self.cost(skipped)[firsts, firsts + width]
        costs_without = self.costs_without(skipped)[:, firsts, firsts + width]  # (P, ranges)
        least = int(np.nanargmin(costs))
        margins = margin(costs_without)
        margins_from_least = margin(costs_without - costs_without[:, [least]])
        cells = []
        for index, cost in enumerate(costs):
            cell = f"{100 * cost:.2f}%"
            if np.isfinite(margins[index]):
                cell += f" ± {100 * margins[index]:.2f}"
            if index == least:
                cell += " (least)"
            elif cost - costs[least] <= margins_from_least[index]:
                cell += " (as low)"
            cells.append(cell)
        return cells


def margin(without: np.ndarray) -> np.ndarray:
    """Half the width of a 95% interval, by the jackknife that leaves out one part at a time (Efron and Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 11), with Student's t.

    without (P, ...): the statistic without each part. NaN where one of them cannot be computed.
    """
    num_parts = len(without)
    variance = (num_parts - 1) * without.var(axis=0)
    return stats.t.ppf(0.975, num_parts - 1) * np.sqrt(variance)


def _rounded(values: np.ndarray) -> list:
    """Nested lists of numbers of DIGITS significant digits, which keep the file short."""
    if values.ndim > 1:
        return [_rounded(each) for each in values]
    return [float(f"{value:.{DIGITS}g}") for value in values]
