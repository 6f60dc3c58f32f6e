"""The report's statistics against SciPy, statsmodels, independent forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables, multitest, proportion

from fast_dllm.report import statistics as ours
from fast_dllm.report.aup import aup, pareto, weight

CLOSE = {"rel": 0, "abs": 1e-9}
Z2 = stats.norm.isf(0.025) ** 2


def tables(seed: int = 0, count: int = 60):
    """(improved, regressed, total): random ones, and the extremes."""
    draw = np.random.default_rng(seed)
    yield from [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1319), (1319, 0, 1319), (0, 1319, 1319), (7, 0, 10), (0, 7, 10)]
    yield from [(5, 5, 10), (1, 2, 14042), (3000, 3100, 14042)]
    for _ in range(count):
        total = int(draw.integers(1, 3000))
        discordant = int(draw.integers(0, total + 1))
        improved = int(draw.integers(0, discordant + 1))
        yield improved, discordant - improved, total


@pytest.mark.parametrize(
    ("correct", "total"), [(0, 1), (1, 1), (0, 1319), (1319, 1319), (1061, 1319), (7, 10), (3, 14042)]
)
def test_wilson_is_statsmodels_wilson(correct, total):
    low, high = proportion.proportion_confint(correct, total, 0.05, method="wilson")
    found = ours.wilson(correct, total)
    assert (found.low, found.high) == pytest.approx((max(low, 0), min(high, 1)), **CLOSE)


def test_mcnemar_is_scipys_and_statsmodels_exact_test():
    for improved, regressed, total in tables():
        found = ours.mcnemar(improved, regressed)
        same = total - improved - regressed
        theirs = contingency_tables.mcnemar([[same, regressed], [improved, 0]], exact=True).pvalue
        assert found == pytest.approx(min(1.0, theirs), **CLOSE)
        assert found == pytest.approx(
            min(1.0, 2 * stats.binom.cdf(min(improved, regressed), improved + regressed, 0.5)), **CLOSE
        )


@pytest.mark.slow
def test_holm_is_statsmodels_holm():
    draw = np.random.default_rng(1)
    for size in (1, 2, 3, 8, 40):
        for _ in range(2):
            p = draw.uniform(size=size) ** 3
            p[draw.integers(size)] = p[0]  # ties
            assert ours.holm(list(p)) == pytest.approx(multitest.multipletests(p, method="holm")[1], **CLOSE)
    assert ours.holm([]) == []


@pytest.mark.parametrize("counts", [(7, 10, 1, 10), (972, 1319, 1061, 1319), (0, 5, 5, 5), (0, 9, 0, 9), (1, 1, 0, 1)])
def test_unpaired_difference_is_scipys_fisher_and_statsmodels_newcombe(counts):
    correct, total, base, base_total = counts
    low, high = proportion.confint_proportions_2indep(*counts, method="newcomb", compare="diff")
    found = ours.newcombe(*counts)
    assert (found.low, found.high) == pytest.approx((low, high), **CLOSE)
    p = stats.fisher_exact([[correct, total - correct], [base, base_total - base]])[1]
    assert ours.fisher(*counts) == pytest.approx(p, **CLOSE)


def quartic(improved: int, regressed: int, total: int) -> tuple[float, float]:
    """Tango's limits without iteration: two roots of a polynomial (Yang, Sun and Hardin 2013)."""
    b, c, n, g = improved, regressed, total, Z2
    m = [
        n**2 * (n / g + 1) ** 2,
        -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
        2 * n * (b - c) ** 2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
        n * (b - c) * (2 * (b + c) / g + 1) - (b - c) ** 3 * (4 * n / g + 1) / g,
        (b - c) ** 2 * ((b - c) ** 2 / g - (b + c)) / g,
    ]
    roots = np.roots(m)
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-6)
    return real[0], real[-1]


def test_tango_is_the_non_iterative_solution_of_the_same_equation():
    for improved, regressed, total in tables():
        if abs(improved - regressed) == total:
            continue  # a double root there, where polynomials lose half their digits; see the next test
        found, expected = ours.tango(improved, regressed, total), quartic(improved, regressed, total)
        assert (found.low, found.high) == pytest.approx(
            expected, rel=0, abs=2e-7 if improved + regressed == 0 else 1e-9
        )


@pytest.mark.parametrize("total", [1, 2, 10, 1319])
def test_tango_at_the_extremes_is_what_its_equation_becomes(total):
    edge = (total - Z2) / (total + Z2)  # total (1 - d) = z^2 (1 + d)
    assert (ours.tango(total, 0, total).low, ours.tango(total, 0, total).high) == pytest.approx((edge, 1), **CLOSE)
    assert (ours.tango(0, total, total).low, ours.tango(0, total, total).high) == pytest.approx((-1, -edge), **CLOSE)
    nothing = ours.tango(0, 0, total)
    assert (nothing.low, nothing.high) == pytest.approx((-Z2 / (total + Z2), Z2 / (total + Z2)), **CLOSE)


def test_one_stratum_is_tango_and_weights_are_the_tasks():
    single, interval = ours.stratified_difference([ours.Stratum(3, 9, 200, 1.0)])
    assert single == pytest.approx(-0.03)
    assert interval.low == pytest.approx(ours.tango(3, 9, 200).low, abs=1e-12)
    assert interval.high == pytest.approx(ours.tango(3, 9, 200).high, abs=1e-12)
    by_size = [ours.Stratum(10, 0, 100, 0.1), ours.Stratum(0, 90, 900, 0.9)]
    assert ours.stratified_difference(by_size)[0] == pytest.approx(-80 / 1000)
    equal = [ours.Stratum(10, 0, 100, 0.5), ours.Stratum(0, 90, 900, 0.5)]
    assert ours.stratified_difference(equal)[0] == pytest.approx(0.0)


def test_the_stratified_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(3)
    sizes, gains, losses = (
        np.array([15, 40, 120, 300]),
        np.array([0.1, 0.03, 0.05, 0.02]),
        np.array([0.02, 0.06, 0.1, 0.04]),
    )
    weights = sizes / sizes.sum()
    truth = float(np.sum(weights * (gains - losses)))
    covered, rounds = 0, 600
    for _ in range(rounds):
        cells = [draw.multinomial(n, [g, b, 1 - g - b]) for n, g, b in zip(sizes, gains, losses, strict=True)]
        strata = [ours.Stratum(int(c[0]), int(c[1]), int(n), w) for c, n, w in zip(cells, sizes, weights, strict=True)]
        interval = ours.stratified_difference(strata)[1]
        covered += interval.low <= truth <= interval.high
    error = 3 * math.sqrt(0.95 * 0.05 / rounds)
    assert 0.95 - error <= covered / rounds <= 0.99


@pytest.mark.parametrize(
    ("difference", "share", "total", "alpha"),
    [(-0.02, 0.06, 1319, 0.05), (0.02, 0.05, 1319, 0.05 / 6), (-0.5, 0.5, 10, 0.05)],
)
def test_the_stated_power_is_how_often_the_test_finds_the_difference(difference, share, total, alpha):
    draw, rounds = np.random.default_rng(4), 8000
    discordant = draw.binomial(total, share, rounds)
    improved = draw.binomial(discordant, (1 + difference / share) / 2)
    cache: dict[tuple[int, int], float] = {}
    found = 0
    for i, d in zip(improved.tolist(), discordant.tolist(), strict=True):
        if (i, d - i) not in cache:
            cache[i, d - i] = ours.mcnemar(i, d - i)
        found += cache[i, d - i] <= alpha
    power = ours.mcnemar_power(difference, share, total, alpha)
    assert found / rounds == pytest.approx(power, abs=3.5 * math.sqrt(max(power * (1 - power), 1e-4) / rounds))


def test_the_smallest_detectable_difference_and_the_questions_needed_have_the_power_they_promise():
    for total, share, alpha in [(1319, 0.06, 0.05), (200, 0.04, 0.025), (14042, 0.1, 0.01)]:
        smallest = ours.smallest_detectable(total, share, alpha)
        assert ours.mcnemar_power(smallest, max(share, smallest), total, alpha) == pytest.approx(0.8, abs=2e-3)
    for loss, share in [(0.01, 0.06), (0.02, 0.06), (0.01, 0.0), (0.02, 0.35)]:
        needed = ours.questions_needed(loss, share)
        assert ours.mcnemar_power(loss, max(share, loss), needed) >= 0.8
        assert ours.mcnemar_power(loss, max(share, loss), int(needed * 0.97)) < 0.8
    connor = ((1.959964 * math.sqrt(0.06) + 0.841621 * math.sqrt(0.06 - 0.0001)) / 0.01) ** 2
    assert ours.questions_needed(0.01, 0.06) == pytest.approx(connor, rel=0.05)  # the exact test asks for a little more


def test_where_the_null_holds_a_table_raises_a_false_finding_at_most_as_often_as_promised():
    """Eight contrasts against one baseline, all of one accuracy and partly the same answers."""
    draw, rounds, total = np.random.default_rng(5), 400, 400
    false = 0
    for _ in range(rounds):
        base = draw.random(total) < 0.8
        p_values = []
        for _ in range(8):
            redo = draw.random(total) < 0.15
            other = np.where(redo, draw.random(total) < 0.8, base)
            p_values.append(ours.mcnemar(int((other & ~base).sum()), int((base & ~other).sum())))
        false += min(ours.holm(p_values)) < 0.05
    assert false / rounds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / rounds)


def test_columns_of_one_accuracy_are_rarely_called_different():
    draw = np.random.default_rng(6)
    rounds = 1000
    called = sum(
        ours.homogeneity([(int(draw.binomial(300, 0.8)), 300) for _ in range(3)]) < 0.05 for _ in range(rounds)
    )
    assert called / rounds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / rounds)
    assert ours.homogeneity([(0, 10), (0, 10)]) == 1.0
    assert ours.homogeneity([(7, 10), (1, 10), (1, 10)]) == pytest.approx(stats.chi2.sf(11.428571428571427, 2), **CLOSE)


# ---- AUP ----


def test_aup_of_the_worked_example():
    """By hand: 2 x 80, then 2 x (80 W(80) + 78 W(78)) / 2; the point at 6, more than 5 below the first, is dropped."""
    w80, w78 = math.exp(-3 * (1 - 80 / 82)), math.exp(-3 * (1 - 78 / 82))
    assert weight(80, 82) == pytest.approx(0.929442, abs=1e-6)
    assert weight(78, 82) == pytest.approx(0.863863, abs=1e-6)
    expected = 160 + (80 * w80 + 78 * w78)
    assert expected == pytest.approx(301.74, abs=0.01)
    assert aup([(6, 74.9), (2, 80), (4, 78)], best=82) == pytest.approx(expected, **CLOSE)
    assert aup([(2, 80), (4, 78), (6, 75)], best=82) > expected  # exactly 5 below stays


def test_aup_without_a_loss_is_the_area_under_the_curve():
    assert aup([(1, 80), (3, 80), (8, 80)], best=80) == pytest.approx(8 * 80)
    assert aup([(2.5, 70)], best=70) == pytest.approx(175)
    assert aup([(1, 80), (1, 78), (3, 80)], best=80) == pytest.approx(240)  # of equal speeds the better one


def test_the_pareto_front():
    assert pareto([(1, 90), (2, 85), (3, 88), (4, 80), (4, 79)]) == [0, 2, 3]
    assert pareto([]) == []
