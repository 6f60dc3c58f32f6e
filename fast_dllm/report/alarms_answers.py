"""Alarms about answers: results that should differ and do not, that should not and do, and too few of them."""

from __future__ import annotations

from itertools import combinations

from fast_dllm.report.alarms import ALARM, NOTE, Alarm, by_value, listed, percent
from fast_dllm.report.compare import (
    CONTROLS,
    columns,
    computation,
    distinct,
    is_plain,
    num_flips,
    plain_settings,
    rereads,
)
from fast_dllm.report.statistics import ALPHA, homogeneity, smallest_detectable, tie_probability
from fast_dllm.report.summaries import Run, Table, is_scored

TOO_FEW = 0.10  # a table that cannot show a loss of ten points can show nothing that is in question here
LONGEST = 2048  # new tokens, where the task sets no limit (the model argument's default)
NEAR_LONGEST = 0.9
FEWEST_SETTINGS = 3  # that all give one result before that is no accident
FEWEST_CELLS = 3  # that two tables must share before equal accuracies are no accident

# what else the answers of plain decoding depend on: where these differ, other answers are no fault of an experiment
CIRCUMSTANCES = ("model", "model_revision", "dtype", "gpu", "device", "graphs", "task_version", "num_fewshot")


def answer_alarms(table: Table) -> list[Alarm]:
    runs = list(table.runs.values())
    if not runs:
        return []
    found = too_few(table)
    if scored(table):
        return found + log_likelihood(table)
    found += column_alarms(table)
    found += without_effect(table)
    found += unexplained(table)
    return found + never_stops(table)


def scored(table: Table) -> bool:
    return bool(table.runs) and (is_scored(table.task) or all(run.scored for run in table.runs.values()))


def log_likelihood(table: Table) -> list[Alarm]:
    """Reuse concerns the steps after the first forward; a log-likelihood is one forward."""
    reused = [run.config for run in table.runs.values() if (run.reuse_k or 1) > 1]
    if not reused:
        return []
    values = {run.accuracy for run in table.runs.values()}
    text = f"{table.task} is scored by log-likelihood, where nothing can be reused: "
    if len(values) == 1:
        text += f"one result ({percent(values.pop())}) shown {len(table.runs)} times"
    else:
        text += "what differs between its configurations is not reuse"
    return [Alarm("loglikelihood_reuse", table.label, tuple(table.runs), "reuse", text)]


def too_few(table: Table) -> list[Alarm]:
    counts = [run.num_samples for run in table.runs.values() if run.num_samples]
    if not counts:
        return []
    total = min(counts)
    mean = sum(run.accuracy for run in table.runs.values()) / len(table.runs)
    # shares of discordant pairs: ten in a hundred is more than reuse changes at most settings
    smallest = smallest_detectable(total, min(0.10, max(2 * mean * (1 - mean), 0.01)))
    if smallest is not None and smallest <= TOO_FEW:
        return []
    shown = "no difference at all" if smallest is None else f"no difference below {100 * smallest:.0f} points"
    text = f"{total} questions are too few for any claim: they can show {shown} (80% power, 10% of answers changing)"
    return [Alarm("too_few_questions", table.label, tuple(table.runs), "accuracy", text)]


# ---- the columns of one k ----


def column_alarms(table: Table) -> list[Alarm]:
    """With stored outputs first, middle and last of one k are one computation; for k = 1 always."""
    found = []
    for k, groups in columns(table).items():
        for group in groups:
            found += equal_tokens(table, k, group)
            found += _differing(table, k, group)
    for k, groups in columns(table, alike=False).items():
        for group in groups:
            found += equal_tokens(table, k, group)
            found += _identical(table, k, group)
    return found


def _identical(table: Table, k: int, group: list[Run]) -> list[Alarm]:
    """Layers that are really skipped: which ones must show in some answer."""
    same = [run for run in group[1:] if _same_result(group[0], run)]
    if not same:
        return []
    names = tuple(run.config for run in (group[0], *same))
    text = f"k = {k}: {listed(names)} gave the same answers with the same work: the choice of layers had no effect"
    level = ALARM if group[0].skips_layers else NOTE
    return [Alarm("identical_answers", table.label, names, "reuse", text, level)]


def _values(group: list[Run]) -> str:
    return ", ".join(f"{run.config} {percent(run.accuracy)}" for run in group)


def _tokens(group: list[Run]) -> str:
    parts = [
        f"{' = '.join(r.config for r in runs)} {n:,}" for n, runs in by_value(group, lambda r: r.new_tokens).items()
    ]
    return f"; tokens: {', '.join(parts)}" if parts else ""


def equal_tokens(table: Table, k: int, group: list[Run]) -> list[Alarm]:
    """Totals only: the very same number of tokens comes from the same answers, and those have one accuracy."""
    found = []
    for tokens, same in by_value(group, lambda run: None if run.questions else run.new_tokens).items():
        if len(same) > 1 and len({run.accuracy for run in same}) > 1:
            text = (
                f"k = {k}: {tokens:,} tokens each, so the same answers, and yet other accuracies ({_values(same)}): "
                "these numbers cannot be of the same answers"
            )
            found.append(Alarm("equal_tokens", table.label, tuple(r.config for r in same), "accuracy", text))
    return found


def _differing(table: Table, k: int, group: list[Run]) -> list[Alarm]:
    kind, names = ("k1_differs" if k == 1 else "columns_differ"), tuple(run.config for run in group)
    why = "nothing is reused" if k == 1 else "reuse reads stored outputs, whichever layers are named"
    told = [num_flips(a, b) for a, b in combinations(group, 2)]
    flips = [count for count in told if count is not None]
    if len(flips) == len(told):
        if max(flips) == 0:
            return []
        text = f"k = {k}: {listed(names)} are one computation ({why}), but up to {max(flips)} answers differ"
        return [Alarm(kind, table.label, names, "accuracy", text)]
    accuracies, tokens = {run.accuracy for run in group}, {run.new_tokens for run in group} - {None}
    if len(tokens) == 1:
        return []  # the same answers; what is wrong with other accuracies, equal_tokens says
    if len(accuracies) == 1 and not tokens:
        return []
    text = f"k = {k}: {listed(names)} are one computation ({why}), but differ: {_values(group)}{_tokens(group)}"
    if k == 1:
        return [Alarm(kind, table.label, names, "accuracy", text)]
    counts = [run.counts for run in group if run.counts is not None]
    if len(counts) < len(group):
        return []
    p = homogeneity(counts)
    if p < ALPHA:
        return [Alarm(kind, table.label, names, "accuracy", f"{text} (p = {p:.2g} for one accuracy)")]
    text = f"k = {k}: {listed(names)} cannot be told apart: {_values(group)} (totals only, unpaired: p = {p:.2g})"
    return [Alarm("columns_alike", table.label, names, "reuse", text, NOTE)]


# ---- settings without effect, effects without cause ----


def _same_result(run: Run, other: Run) -> bool:
    flips = num_flips(run, other)
    if flips is not None:
        return flips == 0 and run.forwards == other.forwards
    tokens = run.new_tokens is not None and run.new_tokens == other.new_tokens
    return tokens and run.accuracy == other.accuracy and run.forwards == other.forwards


def without_effect(table: Table) -> list[Alarm]:
    """Answers that are the same, with the same forwards, though the setting should change them."""
    groups: dict[tuple, list[Run]] = {}
    for run in table.runs.values():
        groups.setdefault((run.reuse_k or 1, computation(run)), []).append(run)
    alike = [
        (a[0], b[0]) for a, b in combinations(groups.values(), 2) if _same_result(a[0], b[0])
    ]  # one of each computation: its columns are judged elsewhere
    found = []
    count = len(groups)
    if count >= FEWEST_SETTINGS and len(alike) == count * (count - 1) // 2:
        names = tuple(same[0].config for same in groups.values())
        text = f"{listed(names)} gave the same answers with the same work: none of {count} settings had any effect"
        return [Alarm("identical_answers", table.label, names, "reuse", text)]
    for run, other in alike:
        reuse = (run.reuse_k or 1) != (other.reuse_k or 1)
        names = (run.config, other.config)
        what = "reuse had no effect" if reuse else "the setting had no effect, or too few questions show one"
        text = f"{listed(names)} gave the same answers with the same work: {what}"
        found.append(Alarm("identical_answers", table.label, names, "reuse", text, ALARM if reuse else NOTE))
    return found


def unexplained(table: Table) -> list[Alarm]:
    """k > 1 moved the accuracy, but no step reused anything and no forward ran without a layer."""

    def others(run: Run) -> tuple:
        return tuple(pair for pair in computation(run) if pair[0] != "reuse_k")

    plain = {others(run): run for run in table.runs.values() if run.reuse_k == 1}
    found = []
    for run in table.runs.values():
        base = plain.get(others(run))
        if base is None or (run.reuse_k or 1) == 1 or run.forwards is None:
            continue
        if run.forwards.get("reused") or run.skips_layers or rereads(run):
            continue
        known = set(run.forwards) <= {"prefill", "full", "sub", "commit", "reused", "score"} or run.layers_run
        moved = run.accuracy != base.accuracy or num_flips(run, base)
        if known and moved:
            text = (
                f"{run.config} ({percent(run.accuracy)}) differs from {base.config} ({percent(base.accuracy)}), "
                "but reused nothing and skipped no layer: no forward explains it"
            )
            found.append(Alarm("unexplained_difference", table.label, (run.config, base.config), "accuracy", text))
    return found


def never_stops(table: Table) -> list[Alarm]:
    found = []
    for run in table.runs.values():
        longest = run.arguments.get("max_new_tokens") or LONGEST
        mean = run.new_tokens / run.num_samples if run.new_tokens and run.num_samples else 0
        if isinstance(longest, (int, float)) and mean >= NEAR_LONGEST * longest:
            found.append((run, mean, longest))
    if not found:
        return []
    parts = ", ".join(f"{run.config} {run.new_tokens:,} tokens, {mean:,.0f} an answer" for run, mean, _ in found)
    text = f"answers ran on to the limit of {found[0][2]:,} tokens instead of ending: {parts}"
    return [Alarm("answers_never_stop", table.label, tuple(run.config for run, *_ in found), "accuracy", text)]


# ---- two tables ----


def plain_differs(tables: list[Table]) -> list[Alarm]:
    """Plain decoding of the same settings by the same model, and other answers in one experiment than in the others.

    Which one is wrong is not known: it is told of those that agree with fewer others, and between two of the one that
    is no control.
    """
    alike: dict[tuple, list[Run]] = {}
    for table in tables:
        for run in table.runs.values():
            if table.is_foreign or scored(table) or not is_plain(run, table) or _rounds_by_neighbours(run):
                continue
            settings, about = plain_settings(run), tuple(str(run.facts.get(name)) for name in CIRCUMSTANCES)
            if settings is not None:
                alike.setdefault((table.task, table.limit, settings, about), []).append(run)
    found = []
    for group in alike.values():
        results = distinct(group, whatever_k=True)
        results.sort(key=lambda runs: (-len({run.table for run in runs}), not _has_control(runs)))
        trusted = results[0][0]
        judged_themselves = {run.table for run in results[0]}  # tables whose columns differ
        for result in results[1:]:
            for label, runs in by_value(result, lambda run: run.table).items():
                flips = num_flips(runs[0], trusted)
                if not flips or label in judged_themselves:  # not flips: answers that are not on record
                    continue
                names = tuple(run.config for run in runs)
                text = (
                    f"{listed(names)} and {trusted.table}/{trusted.config} are plain decoding with the same settings, "
                    f"but {flips} answers differ"
                )
                found.append(Alarm("plain_differs", label, names, "accuracy", text))
    return found


def _rounds_by_neighbours(run: Run) -> bool:
    """In 16 bits a product's rounding depends on who shares the batch, and with that some answers do."""
    return run.facts.get("dtype") != "float32" and str(run.facts.get("batch_size")) != "1"


def _has_control(runs: list[Run]) -> bool:
    return any(run.experiment.startswith(CONTROLS) for run in runs)


def repeated_tables(tables: list[Table]) -> list[Alarm]:
    """Totals only: every accuracy of one table is another's to the digit, though its answers are not the same."""
    found = []
    for first, second in combinations([table for table in tables if not scored(table)], 2):
        if (first.task, first.limit) != (second.task, second.limit):
            continue
        common = [(first.runs[name], second.runs[name]) for name in first.runs if name in second.runs]
        common = [pair for pair in common if not (pair[0].questions and pair[1].questions)]
        changed = [
            (a, b) for a, b in common if None not in (a.new_tokens, b.new_tokens) and a.new_tokens != b.new_tokens
        ]
        if len(common) < FEWEST_CELLS or not changed or any(a.accuracy != b.accuracy for a, b in common):
            continue
        if first.is_foreign != second.is_foreign or any(a.counts is None for a, _ in changed):
            continue  # two runners may count tokens in two ways
        chance = 1.0
        for run, _ in changed:
            chance *= tie_probability(*run.counts) if run.counts else 1.0
        if chance >= ALPHA:
            continue
        old, new = sorted((first, second), key=lambda t: max(str(r.facts.get("time", "")) for r in t.runs.values()))
        text = (
            f"all {len(common)} accuracies are those of {old.label} to the digit, though {len(changed)} of its "
            f"configurations wrote other answers (other token counts; by chance: {chance:.1g}): "
            "probably an older results file was found and read again"
        )
        found.append(
            Alarm("accuracies_of_another_table", new.label, tuple(a.config for a, _ in common), "accuracy", text)
        )
    return found
