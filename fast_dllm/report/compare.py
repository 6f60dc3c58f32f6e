"""Compares two runs on the same questions: which answers changed, the difference with its interval, and the power."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from fast_dllm.record.questions import Question
from fast_dllm.report.results import ResultTable, RunResult, is_scored
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
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT

LOSSES = (0.01, 0.02)  # the report says how many questions would show these losses
NOT_AN_ANSWER = ("layer_subset", "experiment_name", "batch_size", "show_speed", "device", "model_path", "dtype")
# the arguments that every experiment's plain decoding has
PLAIN_ARGUMENTS = (
    "threshold", "small_block_size", "bd_size", "use_block_cache", "refresh", "reuse_k", "max_new_tokens",
    "temperature", "top_p",
)  # fmt: skip


@dataclass(frozen=True)
class Contrast:
    """A configuration against its baseline.

    configs: the configurations with this very result (their answers are the same to the last one); paired: on the same
    questions, else from totals; flips: answers that differ (None: not known); improved, regressed: right answers won
    and lost; difference, interval: fractions, configuration minus baseline; p_adjusted: after Holm's correction over
    the table's contrasts; discordant_share: assumed by the power; detectable, needed: see statistics.
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


@dataclass(frozen=True)
class Accuracy:
    """interval is Wilson's; None where the right answers cannot be counted."""

    value: float
    interval: Interval | None


def accuracy_of(run: RunResult) -> Accuracy:
    """The accuracy with Wilson's interval, or the normal one where the metric is no count of right answers."""
    if run.counts is not None:
        return Accuracy(run.accuracy, wilson(*run.counts))
    if run.stderr is not None:
        half = 1.959963984540054 * run.stderr
        return Accuracy(run.accuracy, Interval(max(0.0, run.accuracy - half), min(1.0, run.accuracy + half)))
    return Accuracy(run.accuracy, None)


def _by_place(run: RunResult) -> dict[tuple[str, int], Question]:
    return {(q.task, q.doc_id): q for q in run.questions.questions} if run.questions else {}


def shared_questions(run: RunResult, other: RunResult) -> list[tuple[Question, Question]]:
    """Pairs (this run's, the other's) of the same question: same subtask, same number, same content."""
    others = _by_place(other)
    pairs = ((question, others.get(place)) for place, question in _by_place(run).items())
    return [
        (question, other_question)
        for question, other_question in pairs
        if other_question is not None and other_question.key == question.key
    ]


def can_pair(run: RunResult, other: RunResult) -> bool:
    """Whether both runs recorded the same questions, all of them, and each answer is either right or wrong."""
    if not run.questions or not other.questions:
        return False
    pairs = shared_questions(run, other)
    counts = {len(run.questions.questions), len(other.questions.questions), len(pairs)}
    return len(counts) == 1 and bool(pairs) and all(q.correct in (0, 1) for pair in pairs for q in pair)


def num_flips(run: RunResult, other: RunResult) -> int | None:
    """How many answers differ; None where the two runs did not record answers to the same questions."""
    if not run.questions or not other.questions:
        return None
    pairs = shared_questions(run, other)
    if len(pairs) != len(run.questions.questions) or len(pairs) != len(other.questions.questions):
        return None
    return sum(
        question.answer != other_question.answer or question.correct != other_question.correct
        for question, other_question in pairs
    )


def computation(run: RunResult) -> tuple:
    """The arguments that can change an answer, for comparison. The columns of one k differ in none of them."""
    given = {k: v for k, v in run.arguments.items() if k not in NOT_AN_ANSWER and v is not None}
    given.setdefault("refresh", "rows")  # what a summary without it ran
    return tuple(sorted((key, str(value)) for key, value in given.items()))


def rereads(run: RunResult) -> bool:
    """Whether reuse reads stored logits again, so that the choice of layers makes no difference.

    The forwards show it: some steps were reused, and no forward ran without a layer. A foreign run without recorded
    forwards is the lab's, whose only experiment read stored logits.
    """
    if run.scored or run.reuse_k is None or run.reuse_k < 2:
        return False
    if run.is_foreign and run.forwards is None:
        return (run.arguments.get("experiment_name") or DEFAULT_EXPERIMENT) == DEFAULT_EXPERIMENT
    return bool((run.forwards or {}).get("reused")) and not run.skips_layers


def reuses(run: RunResult) -> bool:
    """Whether logits were read again or layers rested."""
    return (run.reuse_k or 1) != 1 or bool((run.forwards or {}).get("reused")) or run.skips_layers


def is_plain(run: RunResult, table: ResultTable) -> bool:
    """Whether the run is plain decoding, at some threshold and sub-block size.

    Nothing is reused or skipped, and the experiment's knobs are those of the run that its table is compared with.
    """
    if reuses(run):
        return False
    base = table.runs.get(table.compare_with or "")
    if base is None:
        return True
    return all(
        base.arguments.get(name) == run.arguments.get(name)
        for name in {*base.arguments, *run.arguments} - {*PLAIN_ARGUMENTS, *NOT_AN_ANSWER}
    )


def plain_settings(run: RunResult) -> tuple | None:
    """The settings of plain decoding that can change an answer, in a form that is equal for all experiments.

    `refresh` of an experiment without this knob is seen from its forwards; None if they are not recorded.
    """
    given = {name: str(run.arguments[name]) for name in PLAIN_ARGUMENTS if run.arguments.get(name) is not None}
    if "refresh" not in given:
        if run.forwards is None:
            return None
        given["refresh"] = "rows" if run.forwards.get("sub") else "block"
    return tuple(sorted((name, value) for name, value in given.items() if name != "reuse_k"))


def columns(table: ResultTable, alike: bool = True) -> dict[int, list[list[RunResult]]]:
    """k -> groups of runs that differ only in the layers that they name.

    alike: True: groups whose runs are one computation, because nothing is skipped (k = 1, or stored logits are read
    again); False: groups whose runs skip different layers.
    """
    groups_of_k: dict[int, dict[tuple, list[RunResult]]] = {}
    for run in table.runs.values():
        if run.reuse_k is None or not run.arguments.get("layer_subset"):
            continue
        if (run.reuse_k == 1 or rereads(run)) == alike:
            groups_of_k.setdefault(run.reuse_k, {}).setdefault(computation(run), []).append(run)
    return {k: [group for group in groups.values() if len(group) > 1] for k, groups in sorted(groups_of_k.items())}


def distinct(runs: Iterable[RunResult], whatever_k: bool = False) -> list[list[RunResult]]:
    """Runs grouped by result: one group where all answers are known to be the same, and k is (or `whatever_k`)."""
    groups: list[list[RunResult]] = []
    for run in runs:
        for group in groups:
            same_k = whatever_k or run.arguments.get("reuse_k") == group[0].arguments.get("reuse_k")
            if same_k and num_flips(run, group[0]) == 0:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def baseline_of(table: ResultTable, run: RunResult | None = None) -> RunResult | None:
    """What the table's runs are compared with: as its matrix says, else k = 1 of the same column, else any k = 1."""
    named = table.runs.get(table.compare_with or "")
    if named is not None:
        return named
    ones = [r for name, r in table.runs.items() if r.reuse_k == 1 and "+" not in name and name != "plain"]
    subset = run.arguments.get("layer_subset") if run else None
    same = [r for r in ones if r.arguments.get("layer_subset") == subset]
    return next(iter(same or ones), None)


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
    """The group's first run against `base`; None where neither questions nor counts are known."""
    run = group[0]
    names, against = (
        tuple(r.config for r in group),
        f"{base.table}/{base.config}" if base.table != table else base.config,
    )
    if run.questions is not None and can_pair(run, base):
        pairs = shared_questions(run, base)
        strata = _strata(pairs, run.questions.groups.get(run.task, "size"))
        improved, regressed = sum(s.improved for s in strata), sum(s.regressed for s in strata)
        difference, interval = stratified_difference(strata)
        p, share = mcnemar(improved, regressed), (improved + regressed) / len(pairs)
        return Contrast(
            table, names, against, True, len(pairs), len(strata), improved, regressed, num_flips(run, base),
            difference, interval, p, p, share,
        )  # fmt: skip
    if run.counts is None or base.counts is None:
        return None
    counts = *run.counts, *base.counts
    accuracy, base_accuracy = run.accuracy, base.accuracy
    p, share = fisher(*counts), accuracy * (1 - base_accuracy) + base_accuracy * (1 - accuracy)
    size = min(run.counts[1], base.counts[1])
    return Contrast(
        table,
        names,
        against,
        False,
        size,
        1,
        None,
        None,
        None,
        accuracy - base_accuracy,
        newcombe(*counts),
        p,
        p,
        share,
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


def by_task(runs: Iterable[RunResult]) -> Mapping[str, int]:
    """Subtask -> questions, of the first run that has them on record."""
    for run in runs:
        if run.questions:
            sizes: dict[str, int] = {}
            for question in run.questions.questions:
                sizes[question.task] = sizes.get(question.task, 0) + 1
            return sizes
    return {}
