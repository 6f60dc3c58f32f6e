"""Compares two runs on the same questions: which answers changed, the difference with its interval, and the power."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fast_dllm.record.questions import Question
from fast_dllm.report.results import ResultTable, RunResult, is_scored
from fast_dllm.report.same_results import computation, distinct, num_flips, shared_questions
from fast_dllm.report.statistics import (
    ALPHA,
    Interval,
    Stratum,
    fisher,
    holm,
    mcnemar,
    newcombe,
    questions_needed,
    smallest_detectable,
    stratified_difference,
    wilson,
)

LOSSES = (0.01, 0.02)  # the report says how many questions would show these losses


@dataclass(frozen=True)
class Contrast:
    """A configuration against its baseline.

    configs: the configurations with this very result (the same answers in as many forwards); paired: on the same
    questions, else from totals; flips: answers that differ (None: not known); improved, regressed: right answers won
    and lost; difference, interval: fractions, configuration minus baseline; p_adjusted: after Holm's correction over
    the table's contrasts; discordant_share: assumed by the power; forward_gain: tokens per full-depth forward / the
    baseline's (None: not recorded); detectable, needed: see statistics.
    """

    table: str
    configs: tuple[str, ...]
    baseline: str
    paired: bool
    num_questions: int
    num_strata: int
    improved: int | None
    regressed: int | None
    flips: int | None
    difference: float
    interval: Interval
    p_value: float
    p_adjusted: float
    discordant_share: float
    forward_gain: float | None = None
    detectable: float | None = None
    needed: tuple[int | None, ...] = ()

    @property
    def same(self) -> int | None:
        if self.improved is None or self.regressed is None:
            return None
        return self.num_questions - self.improved - self.regressed

    @property
    def outcome(self) -> str:
        """identical, loses, gains or inconclusive, at ALPHA after the correction."""
        if self.flips == 0:
            return "identical"
        if self.p_adjusted < ALPHA:
            return "loses" if self.difference < 0 else "gains"
        return "inconclusive"


def interval_of(run: RunResult) -> Interval | None:
    """The 95% interval of the accuracy: Wilson's, or the normal one where the metric is no count of right answers.

    None where neither the right answers nor a standard error are recorded.
    """
    if run.counts is not None:
        return wilson(*run.counts)
    if run.summary.accuracy_stderr is not None:
        half = 1.959963984540054 * run.summary.accuracy_stderr
        return Interval(max(0.0, run.accuracy - half), min(1.0, run.accuracy + half))
    return None


def can_pair(run: RunResult, other: RunResult) -> bool:
    """Whether both runs recorded the same questions, all of them, and each answer is either right or wrong."""
    if not run.questions or not other.questions:
        return False
    pairs = shared_questions(run, other)
    counts = {len(run.questions.questions), len(other.questions.questions), len(pairs)}
    return len(counts) == 1 and bool(pairs) and all(q.correct in (0, 1) for pair in pairs for q in pair)


def baseline_of(table: ResultTable, run: RunResult | None = None) -> RunResult | None:
    """What the table's runs are compared with: as its matrix says, else k = 1 of the same column, else any k = 1."""
    named = table.runs.get(table.compare_with or "")
    if named is not None:
        return named
    ones = [r for name, r in table.runs.items() if r.reuse_k == 1 and "+" not in name and name != "plain"]
    subset = run.arguments.get("layer_subset") if run else None
    same = [r for r in ones if r.arguments.get("layer_subset") == subset]
    return next(iter(same or ones), None)


def forward_gain(run: RunResult, base: RunResult) -> float | None:
    """The run's tokens per full-depth forward / those of `base`; None where one of them is not recorded."""
    if not run.tokens_per_forward or not base.tokens_per_forward:
        return None
    return run.tokens_per_forward / base.tokens_per_forward


def name_beside(run: RunResult, table: str) -> str:
    """The run's name in a text about `table`, a label: with its own table's label if that is another."""
    return run.config if run.table == table else f"{run.table}/{run.config}"


def _strata(pairs: list[tuple[Question, Question]], weighting: str) -> list[Stratum]:
    counts: dict[str, list[int]] = {}
    for question, base_question in pairs:
        row = counts.setdefault(question.task, [0, 0, 0])
        row[0] += question.correct > base_question.correct
        row[1] += question.correct < base_question.correct
        row[2] += 1
    equal = weighting == "equal"
    return [
        Stratum(improved, regressed, total, 1 / len(counts) if equal else total / len(pairs))
        for improved, regressed, total in counts.values()
    ]


def contrast(table: str, group: list[RunResult], base: RunResult) -> Contrast | None:
    """The group's first run against `base`, before Holm's correction; None without shared questions and counts.

    table: the label of the group's table. group: runs with the same result, as `distinct` groups them.
    """
    run = group[0]
    values: dict[str, Any]
    if run.questions is not None and can_pair(run, base):
        pairs = shared_questions(run, base)
        strata = _strata(pairs, run.questions.groups.get(run.task, "size"))
        improved, regressed = sum(s.improved for s in strata), sum(s.regressed for s in strata)
        difference, interval = stratified_difference(strata)
        values = {
            "paired": True,
            "num_questions": len(pairs),
            "num_strata": len(strata),
            "improved": improved,
            "regressed": regressed,
            "flips": num_flips(run, base),
            "p_value": mcnemar(improved, regressed),
            "discordant_share": (improved + regressed) / len(pairs),
        }
    elif run.counts is not None and base.counts is not None:
        counts = *run.counts, *base.counts
        difference, interval = run.accuracy - base.accuracy, newcombe(*counts)
        values = {
            "paired": False,
            "num_questions": min(run.counts[1], base.counts[1]),
            "num_strata": 1,
            **dict.fromkeys(("improved", "regressed", "flips")),
            "p_value": fisher(*counts),
            "discordant_share": run.accuracy * (1 - base.accuracy) + base.accuracy * (1 - run.accuracy),
        }
    else:
        return None
    return Contrast(
        table=table,
        configs=tuple(each.config for each in group),
        baseline=name_beside(base, table),
        difference=difference,
        interval=interval,
        p_adjusted=values["p_value"],
        forward_gain=forward_gain(run, base),
        **values,
    )


def corrected(uncorrected: list[Contrast]) -> list[Contrast]:
    """Holm over the contrasts, and the power at the level that its first step asks for."""
    adjusted = holm([c.p_value for c in uncorrected])
    alpha = ALPHA / max(1, len(uncorrected))
    return [
        replace(
            c,
            p_adjusted=p,
            detectable=smallest_detectable(c.num_questions, c.discordant_share, alpha),
            needed=tuple(questions_needed(loss, c.discordant_share, alpha) for loss in LOSSES),
        )
        for c, p in zip(uncorrected, adjusted, strict=True)
    ]


def contrasts(table: ResultTable, against: RunResult | None = None) -> list[Contrast]:
    """Every distinct result of the table against its baseline (or `against`), corrected as one family.

    Results that are the baseline's own computation (k = 1 in other columns) are left out: the alarms judge them.
    """
    if is_scored(table.task):
        return []
    comparisons = []
    for group in distinct(table.runs.values()):
        base = against or baseline_of(table, group[0])
        if base is None or base in group:
            continue
        if against is None and group[0].reuse_k == 1 and computation(group[0]) == computation(base):
            continue
        comparison = contrast(table.label, group, base)
        if comparison:
            comparisons.append(comparison)
    return corrected(comparisons)


def at_equal_speed(
    groups: list[list[RunResult]], control: list[RunResult], speed: Callable[[RunResult], float | None]
) -> list[tuple[Contrast, RunResult]]:
    """Each result against the most accurate control run that is at least as fast; those beyond all are left out."""
    compared = []
    for group in groups:
        group_speed = speed(group[0])
        as_fast = [c for c in control if group_speed and (speed(c) or 0) >= group_speed and c not in group]
        if as_fast:
            best = max(as_fast, key=lambda c: c.accuracy)
            comparison = contrast(group[0].table, group, best)
            if comparison:
                compared.append((comparison, best))
    comparisons = corrected([comparison for comparison, _ in compared])
    return list(zip(comparisons, (best for _, best in compared), strict=True))
