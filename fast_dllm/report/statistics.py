"""The report's statistics: confidence intervals, exact tests, power. docs/report.md names the source of each.

A difference is the configuration's accuracy minus the baseline's, as a fraction: -0.02 is a loss of two points. Paired
counts are (improved, regressed, total): the questions that only the configuration got right, those that only the
baseline got right, and all questions. SciPy computes the distributions. This module adds what SciPy lacks: Tango's
interval, Holm's correction and the power of the exact test. tests/test_report_statistics.py compares these with
statsmodels and with independent formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.80
MAX_QUESTIONS = 10_000_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval at level CONFIDENCE, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Stratum:
    """The paired counts of one subtask. weight: of this subtask in the total difference; all weights add up to 1."""

    improved: int
    regressed: int
    total: int
    weight: float


def _z(tail: float) -> float:
    """The value that a standard normal variable exceeds with probability `tail`."""
    return float(stats.norm.isf(tail))


def wilson(correct: int, total: int) -> Interval:
    """Wilson's score interval of a proportion (1927), without continuity correction."""
    limits = stats.binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(limits.low), float(limits.high))


def newcombe(correct: int, total: int, base_correct: int, base_total: int) -> Interval:
    """Newcombe's hybrid score interval for the difference of two unpaired proportions (1998, method 10)."""
    p, base = correct / total, base_correct / base_total
    limits, base_limits = wilson(correct, total), wilson(base_correct, base_total)
    below = sqrt((p - limits.low) ** 2 + (base_limits.high - base) ** 2)
    above = sqrt((limits.high - p) ** 2 + (base - base_limits.low) ** 2)
    return Interval(p - base - below, p - base + above)


def fisher(correct: int, total: int, base_correct: int, base_total: int) -> float:
    """Two-sided p-value of Fisher's exact test for two unpaired proportions."""
    table = [[correct, total - correct], [base_correct, base_total - base_correct]]
    return float(stats.fisher_exact(table).pvalue)


def homogeneity(counts: Sequence[tuple[int, int]]) -> float:
    """p-value of Pearson's chi-squared test of the hypothesis that all (correct, total) have the same proportion."""
    table = np.array([[correct, total - correct] for correct, total in counts])
    if (table.sum(axis=0) == 0).any():  # all right or all wrong: nothing differs
        return 1.0
    return float(stats.chi2_contingency(table, correction=False).pvalue)


def mcnemar(improved: int, regressed: int) -> float:
    """Two-sided p-value of the exact (binomial) McNemar test; 1 where no question changed."""
    discordant = improved + regressed
    return float(stats.binomtest(improved, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979) for several tests, in the given order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tango(improved: int, regressed: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval for a paired difference of proportions (1998), in [-1, 1].

    It holds the differences that the score test does not reject. At difference 0 this test is McNemar's.
    """
    z2, observed = _z((1 - confidence) / 2) ** 2, (improved - regressed) / total

    def excess(delta: float) -> float:  # squared score minus its critical value, times the variance
        a = 2 * total
        b = -improved - regressed + (2 * total - improved + regressed) * delta
        c = -regressed * delta * (1 - delta)
        other = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # P(only the baseline is right), given delta
        variance = total * max(2 * other + delta * (1 - delta), 0.0)
        return (improved - regressed - total * delta) ** 2 - z2 * variance

    def root(end: float) -> float:
        if observed == end:
            return end
        # If no question improved, or none regressed, the variance can be 0 at the observed difference. Then that is a
        # root too, and the limit is the next root: start a little beyond it.
        start = observed + (1e-9 if end > observed else -1e-9) * (excess(observed) >= 0)
        return float(optimize.brentq(excess, end, start, xtol=1e-14, rtol=1e-14))

    return Interval(root(-1.0), root(1.0))


def stratified_difference(strata: Sequence[Stratum]) -> tuple[float, Interval]:
    """(weighted difference, interval): the Tango intervals of all strata, combined by MOVER (Zou and Donner 2008).

    The distance from the difference to the lower limit is the square root of the sum, over the strata, of (weight times
    the stratum's distance to its lower limit) squared; the upper limit alike. So a stratum without any change adds its
    uncertainty too. With one stratum the result is Tango's interval.
    """
    difference = low = high = 0.0
    for stratum in strata:
        change = (stratum.improved - stratum.regressed) / stratum.total
        limits = tango(stratum.improved, stratum.regressed, stratum.total)
        difference += stratum.weight * change
        low += (stratum.weight * (change - limits.low)) ** 2
        high += (stratum.weight * (limits.high - change)) ** 2
    return difference, Interval(max(-1.0, difference - sqrt(low)), min(1.0, difference + sqrt(high)))


def mcnemar_power(difference: float, discordant_share: float, total: int, alpha: float = ALPHA) -> float:
    """Exact power of the two-sided exact McNemar test at level `alpha`, if the true difference is `difference`.

    discordant_share: the probability that a question changes (improved or regressed); at least |difference|. The number
    of changed questions d is binomial(total, discordant_share). The improved ones among them are
    binomial(d, (1 + difference / discordant_share) / 2).
    """
    if discordant_share <= 0 or total < 1:
        return 0.0
    number = stats.binom(total, discordant_share)
    d = np.arange(max(0, int(number.ppf(1e-12)) - 1), min(total, int(number.isf(1e-12)) + 1) + 1)
    # The test rejects if the rarer kind of change occurs at most `critical` times among d: twice that tail <= alpha.
    critical = stats.binom.ppf(alpha / 2, d, 0.5)
    critical = np.where(2 * stats.binom.cdf(critical, d, 0.5) <= alpha, critical, critical - 1)
    improved = min(max((1 + difference / discordant_share) / 2, 0.0), 1.0)
    rejected = stats.binom.cdf(critical, d, improved) + stats.binom.sf(d - critical - 1, d, improved)
    return float(np.sum(number.pmf(d) * np.where(critical >= 0, rejected, 0.0)))


def smallest_detectable(total: int, discordant_share: float, alpha: float = ALPHA) -> float | None:
    """The smallest true difference that the test detects with probability POWER on `total` questions.

    None if it would not even detect the loss of every answer. discordant_share: the assumed probability that a question
    changes; a difference larger than this share is used in its place.
    """

    def lacking(difference: float) -> float:
        return mcnemar_power(difference, max(discordant_share, difference), total, alpha) - POWER

    if lacking(1.0) < 0:
        return None
    return float(optimize.brentq(lacking, 1e-9, 1.0, xtol=1e-6))


def questions_needed(difference: float, discordant_share: float, alpha: float = ALPHA) -> int | None:
    """The number of questions with which the test detects `difference` with probability POWER.

    None above MAX_QUESTIONS. The search starts at the normal approximation of Connor (1987) and uses the exact power.
    """
    share = max(discordant_share, difference)
    z_alpha, z_beta = _z(alpha / 2), _z(1 - POWER)
    start = ((z_alpha * sqrt(share) + z_beta * sqrt(max(share - difference**2, 0.0))) / difference) ** 2
    low, high = 1, max(2, ceil(start))
    while mcnemar_power(difference, share, high, alpha) < POWER:
        low, high = high, high + max(1, high // 8)
        if high > MAX_QUESTIONS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if mcnemar_power(difference, share, middle, alpha) >= POWER:
            high = middle
        else:
            low = middle
    return high


def tie_probability(correct: int, total: int) -> float:
    """The probability that two independent runs with accuracy correct / total give equally many right answers."""
    probabilities = stats.binom.pmf(np.arange(total + 1), total, correct / total)
    return float(np.sum(probabilities**2))
