"""Accuracy under parallelism (AUP), exactly as Qian et al. define it (arXiv 2601.07568), and the Pareto front.

Points (rho, y): tokens per forward, and accuracy in percent; sorted so that rho_1 < ... < rho_m. Points with
y < y_1 - 5 are dropped. With W(y) = min(exp(-3 (1 - y / y_max)), 1) and y_max the best accuracy seen on the task,

    AUP = rho_1 y_1 + sum over i = 2 .. m of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import exp

PENALTY = 3.0
MAX_DROP = 5.0


def weight(accuracy: float, best: float) -> float:
    """W(y): 1 at the best accuracy, smaller below it."""
    return min(exp(-PENALTY * (1 - accuracy / best)), 1.0)


def aup(points: Iterable[tuple[float, float]], best: float) -> float | None:
    """AUP of (tokens per forward, accuracy in percent); best: the highest accuracy achieved on the task, in percent.

    None without points, or where `best` is 0. Of points with equal tokens per forward the most accurate counts.
    """
    by_rho: dict[float, float] = {}
    for rho, accuracy in points:
        by_rho[rho] = max(accuracy, by_rho.get(rho, accuracy))
    curve = sorted(by_rho.items())
    if not curve or best <= 0:
        return None
    counted = [(rho, y) for rho, y in curve if y >= curve[0][1] - MAX_DROP]
    total = counted[0][0] * counted[0][1]
    for (left, y_left), (right, y_right) in pairwise(counted):
        total += (right - left) * (y_right * weight(y_right, best) + y_left * weight(y_left, best)) / 2
    return total


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points, slowest first: no other point is at least as good in both coordinates."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    front, best = [], float("-inf")
    for index in order:
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front[::-1]
