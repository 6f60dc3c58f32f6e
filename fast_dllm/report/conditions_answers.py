"""Conditions of alarms about answers and accuracies that cannot all be right.

A condition compares only what should be equal. alarms.py has the rule of each condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from fast_dllm.report.matches import Match, configs_of
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import columns, computation, distinct, is_plain, num_flips, plain_settings, rereads
from fast_dllm.report.statistics import ALPHA, homogeneity, smallest_detectable, tie_probability
from fast_dllm.report.words import by_value, percent

TOO_FEW = 0.10  # a table that cannot show a loss of ten points can answer no question about reuse
ANSWERS_THAT_CHANGE = 0.10  # share of questions, assumed: more than reuse changes at most settings
LONGEST = 2048  # new tokens where the task sets no limit (the default of the model argument)
NEAR_LONGEST = 0.9
FEWEST_SETTINGS = 3  # so many settings with one result are no accident
FEWEST_CELLS = 3  # so many equal accuracies in two tables are no accident
DECODING_KINDS = {"prefill", "full", "sub", "commit", "reused", "guessed", "guessed_commit", "score"}

# facts that plain decoding's answers depend on besides its settings
CIRCUMSTANCES = ("model", "model_revision", "dtype", "gpu", "device", "graphs", "task_version", "num_fewshot")


def too_few_questions(table: ResultTable) -> Iterator[Match]:
    """The table has too few questions to show even a loss of TOO_FEW."""
    counts = [run.num_samples for run in table.runs.values() if run.num_samples]
    if not counts:
        return
    total = min(counts)
    mean = sum(run.accuracy for run in table.runs.values()) / len(table.runs)
    smallest = smallest_detectable(total, min(ANSWERS_THAT_CHANGE, max(2 * mean * (1 - mean), 0.01)))
    if smallest is None or smallest > TOO_FEW:
        shown = "no difference at all" if smallest is None else f"no difference below {100 * smallest:.0f} points"
        yield Match(tuple(table.runs), {"total": total, "shown": shown})


def reuse_of_scored_task(table: ResultTable) -> Iterator[Match]:
    """A task scored by log-likelihood is shown for k > 1. It runs one forward, and reuse concerns later steps only."""
    if not table.is_scored or not any((run.reuse_k or 1) > 1 for run in table.runs.values()):
        return
    values = {run.accuracy for run in table.runs.values()}
    what = "what differs between its configurations is not reuse"
    if len(values) == 1:
        what = f"one result ({percent(values.pop())}) shown {len(table.runs)} times"
    yield Match(tuple(table.runs), {"task": table.task, "what": what})


def _accuracies(group: list[RunResult]) -> str:
    return ", ".join(f"{run.config} {percent(run.accuracy)}" for run in group)


def _token_counts(group: list[RunResult]) -> str:
    counts = by_value(group, lambda run: run.new_tokens)
    parts = [f"{' = '.join(configs_of(runs))} {tokens:,}" for tokens, runs in counts.items()]
    return f"; tokens: {', '.join(parts)}" if parts else ""


def equal_tokens(table: ResultTable) -> Iterator[Match]:
    """From totals: runs have the same number of tokens, so the same answers, but different accuracies."""
    if table.is_scored:
        return
    for alike in (True, False):
        for k, groups in columns(table, alike).items():
            for group in groups:
                counts = by_value(group, lambda run: None if run.questions else run.new_tokens)
                for tokens, runs in counts.items():
                    if len(runs) > 1 and len({run.accuracy for run in runs}) > 1:
                        values = {"k": k, "tokens": f"{tokens:,}", "accuracies": _accuracies(runs)}
                        yield Match(configs_of(runs), values)


def column_differences(table: ResultTable, kind: str) -> Iterator[Match]:
    """Runs that are one computation differ.

    kind: k1_differs, columns_differ, or columns_alike if only totals are known and they show no difference.
    """
    if table.is_scored:
        return
    for k, groups in columns(table).items():
        for group in groups:
            difference = _difference(k, group)
            if difference is not None and difference[0] == kind:
                why = "nothing is reused" if k == 1 else "reuse reads stored outputs, whichever layers are named"
                yield Match(configs_of(group), {"k": k, "why": why, "difference": difference[1]})


def _difference(k: int, group: list[RunResult]) -> tuple[str, str] | None:
    """(kind, what differs) of runs that are one computation; None if no difference is known."""
    kind = "k1_differs" if k == 1 else "columns_differ"
    changes = [num_flips(a, b) for a, b in combinations(group, 2)]
    known = [count for count in changes if count is not None]
    if len(known) == len(changes):
        return (kind, f"but up to {max(known)} answers differ") if max(known) else None
    accuracies, tokens = {run.accuracy for run in group}, {run.new_tokens for run in group} - {None}
    if len(tokens) == 1 or (len(accuracies) == 1 and not tokens):
        return None  # the same answers; where their accuracies differ, the rule equal_tokens says so
    text = f"but differ: {_accuracies(group)}{_token_counts(group)}"
    if k == 1:
        return kind, text
    counts = [run.counts for run in group if run.counts is not None]
    if len(counts) < len(group):
        return None
    p = homogeneity(counts)
    if p < ALPHA:
        return kind, f"{text} (p = {p:.2g} for one accuracy)"
    return "columns_alike", f"{_accuracies(group)} (totals only, unpaired: p = {p:.2g})"


def _same_result(run: RunResult, other: RunResult) -> bool:
    """The same answers with the same forwards; from totals, the same tokens, accuracy and forwards."""
    flips = num_flips(run, other)
    if flips is not None:
        return flips == 0 and run.forwards == other.forwards
    same_tokens = run.new_tokens is not None and run.new_tokens == other.new_tokens
    return same_tokens and run.accuracy == other.accuracy and run.forwards == other.forwards


def layers_without_effect(table: ResultTable, really_skipped: bool) -> Iterator[Match]:
    """Configurations that name different layers gave the same answers with the same work.

    really_skipped: look at the runs whose forwards skipped layers, where the choice must change some answer; else at
    the other runs.
    """
    if table.is_scored:
        return
    for k, groups in columns(table, alike=False).items():
        for group in groups:
            same = [run for run in group[1:] if _same_result(group[0], run)]
            if same and group[0].skips_layers == really_skipped:
                yield Match(configs_of([group[0], *same]), {"k": k})


def _computations(table: ResultTable) -> list[RunResult]:
    """One run of each computation. Other rules compare the runs of one computation with each other."""
    firsts: dict[tuple, RunResult] = {}
    for run in table.runs.values():
        firsts.setdefault((run.reuse_k or 1, computation(run)), run)
    return list(firsts.values())


def _all_alike(runs: list[RunResult]) -> bool:
    return len(runs) >= FEWEST_SETTINGS and all(_same_result(a, b) for a, b in combinations(runs, 2))


def no_setting_has_effect(table: ResultTable) -> Iterator[Match]:
    """All settings of the table, at least FEWEST_SETTINGS, gave the same answers with the same work."""
    runs = _computations(table)
    if not table.is_scored and _all_alike(runs):
        yield Match(configs_of(runs), {"count": len(runs)})


def setting_without_effect(table: ResultTable, differs_in_k: bool) -> Iterator[Match]:
    """Two settings gave the same answers with the same work. differs_in_k: whether the two differ in k."""
    runs = _computations(table)
    if table.is_scored or _all_alike(runs):
        return
    for run, other in combinations(runs, 2):
        if ((run.reuse_k or 1) != (other.reuse_k or 1)) == differs_in_k and _same_result(run, other):
            yield Match(configs_of([run, other]))


def unexplained_difference(table: ResultTable) -> Iterator[Match]:
    """k > 1 changed the accuracy, but no step reused anything and no forward skipped a layer."""
    if table.is_scored:
        return

    def without_k(run: RunResult) -> tuple:
        return tuple(pair for pair in computation(run) if pair[0] != "reuse_k")

    plain = {without_k(run): run for run in table.runs.values() if run.reuse_k == 1}
    for run in table.runs.values():
        base = plain.get(without_k(run))
        if base is None or (run.reuse_k or 1) == 1 or run.forwards is None:
            continue
        if run.forwards.get("reused") or run.skips_layers or rereads(run):
            continue
        work_is_known = set(run.forwards) <= DECODING_KINDS or run.layers_run
        if work_is_known and (run.accuracy != base.accuracy or num_flips(run, base)):
            values = {"base": base.config, "accuracy": percent(run.accuracy), "base_accuracy": percent(base.accuracy)}
            yield Match(configs_of([run, base]), {"config": run.config, **values})


def answers_never_stop(table: ResultTable) -> Iterator[Match]:
    """The mean answer is nearly as long as the limit."""
    if table.is_scored:
        return
    long_runs = []
    for run in table.runs.values():
        longest = run.arguments.get("max_new_tokens") or LONGEST
        mean = run.new_tokens / run.num_samples if run.new_tokens and run.num_samples else 0
        if isinstance(longest, (int, float)) and mean >= NEAR_LONGEST * longest:
            long_runs.append((run, mean, longest))
    if long_runs:
        lengths = ", ".join(
            f"{run.config} {run.new_tokens:,} tokens, {mean:,.0f} per answer" for run, mean, _ in long_runs
        )
        yield Match(configs_of(run for run, *_ in long_runs), {"longest": f"{long_runs[0][2]:,}", "lengths": lengths})


def plain_differs(tables: list[ResultTable]) -> Iterator[Match]:
    """Plain decoding with the same settings and the same model gave other answers in one experiment than in others.

    It is not known which experiment is wrong. The alarm names those that agree with fewer others; of two, the one that
    is no control.
    """
    groups: dict[tuple, list[RunResult]] = {}
    for table in tables:
        for run in table.runs.values():
            if table.is_foreign or table.is_scored or not is_plain(run, table) or _rounding_depends_on_batch(run):
                continue
            settings, facts = plain_settings(run), tuple(str(run.facts.get(name)) for name in CIRCUMSTANCES)
            if settings is not None:
                groups.setdefault((table.task, table.limit, settings, facts), []).append(run)
    controls = {table.label for table in tables if table.is_control}
    for group in groups.values():
        results = distinct(group, by_answers_alone=True)
        results.sort(
            key=lambda runs: (-len({run.table for run in runs}), not any(run.table in controls for run in runs))
        )
        trusted = results[0][0]
        agreeing = {run.table for run in results[0]}  # where their own columns differ, another rule says so
        for result in results[1:]:
            for label, runs in by_value(result, lambda run: run.table).items():
                flips = num_flips(runs[0], trusted)
                if flips and label not in agreeing:
                    yield Match(configs_of(runs), {"other": f"{trusted.table}/{trusted.config}", "flips": flips}, label)


def _rounding_depends_on_batch(run: RunResult) -> bool:
    """Whether other rows of the batch can change an answer: in 16 bits they change how a product is rounded."""
    return run.facts.get("dtype") != "float32" and str(run.facts.get("batch_size")) != "1"


def accuracies_of_another_table(tables: list[ResultTable]) -> Iterator[Match]:
    """From totals: all accuracies of two tables are equal to the digit, although their answers differ."""
    for first, second in combinations([table for table in tables if not table.is_scored], 2):
        if (first.task, first.limit, first.is_foreign) != (second.task, second.limit, second.is_foreign):
            continue  # two runners may count tokens in two ways
        common = [(first.runs[name], second.runs[name]) for name in first.runs if name in second.runs]
        common = [pair for pair in common if not (pair[0].questions and pair[1].questions)]
        changed = [(a, b) for a, b in common if a.new_tokens and b.new_tokens and a.new_tokens != b.new_tokens]
        if len(common) < FEWEST_CELLS or not changed or any(a.accuracy != b.accuracy for a, b in common):
            continue
        counts = [a.counts for a, _ in changed]
        if None in counts:
            continue
        chance = 1.0
        for pair in counts:
            chance *= tie_probability(*pair) if pair else 1.0
        if chance >= ALPHA:
            continue
        older, newer = sorted((first, second), key=_last_time)
        values = {"total": len(common), "older": older.label, "changed": len(changed), "chance": f"{chance:.1g}"}
        yield Match(configs_of(a for a, _ in common), values, newer.label)


def _last_time(table: ResultTable) -> str:
    return max(str(run.facts.get("time", "")) for run in table.runs.values())
