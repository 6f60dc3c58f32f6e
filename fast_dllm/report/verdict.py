"""The report in sentences that can be quoted, and only those that its numbers carry."""

from __future__ import annotations

from fast_dllm.report.build import Report, forward_gain
from fast_dllm.report.compare import Contrast, accuracy_of, baseline_of, columns, num_flips
from fast_dllm.report.results import ResultTable
from fast_dllm.report.speeds import hardware, reference_speed
from fast_dllm.report.statistics import ALPHA, Interval
from fast_dllm.report.words import listed, name_of, p_text, percent, points, span, value_range

MOST_SENTENCES = 6  # on the contrasts of one table, before those that cannot be told apart share one
MOST_BETTER = 2  # results of one table that beat the curve, before they share a sentence
BUDGETS = (0.01, 0.02, 0.05)  # losses of accuracy that a reader may accept


def change(c: Contrast) -> str:
    """What one contrast says: its direction only where it is significant after the correction."""
    counts = f"{c.regressed} answers lost, {c.improved} won" if c.paired else "from totals, unpaired"
    size = f"{points(abs(c.difference))} points ({span(c.interval, signed=True)}; {counts}; {p_text(c.p_adjusted)})"
    if c.outcome == "identical":
        return f"gives the very same answers as {c.baseline} on all {c.num_questions} questions"
    if c.outcome == "inconclusive":
        direction = "below" if c.difference < 0 else "above"
        return f"cannot be told from {c.baseline}: {size.replace(' points', f' points {direction}', 1)}"
    return f"{c.outcome} {size} against {c.baseline}"


def same_columns(table: ResultTable) -> list[str]:
    """The columns that are one result, seen in their answers."""
    found = []
    for k, groups in columns(table).items():
        for group in groups:
            if all(num_flips(group[0], run) == 0 for run in group[1:]):
                names, total = listed(run.config for run in group), group[0].num_samples
                which = f"one result for k = {k}, not {len(group)}"
                found.append(f"{names} gave the same answer to each of {total} questions: {which}.")
    return found


def _lead(report: Report) -> list[str]:
    count = report.num_alarms
    if not any(table.runs for table in report.tables):
        names = listed(dict.fromkeys(table.experiment for table in report.tables))
        return [f"No results of {names} on {report.folder} yet: there is nothing to tell."]
    if count:
        return [f"{count} alarm{'s' * (count > 1)} below; a claim that one of them spoils is not made here."]
    return ["No alarms."]


def _accuracies(report: Report, table: ResultTable) -> list[str]:
    """Of one table: why it carries no verdict, or what each configuration lost."""
    label = table.label
    spoiled = report.spoiled(label, "accuracy")
    if table.is_scored:
        run = next(iter(table.runs.values()))
        value = f"{percent(run.accuracy)} {span(accuracy_of(run).interval)}"
        several = " It says nothing about reuse." if len(table.runs) > 1 else ""
        return [f"{label}: {table.task} is scored by log-likelihood: {value}.{several}"]
    few = [a for a in report.alarms if a.kind == "too_few_questions" and a.table == label]
    if spoiled or few:
        kinds = listed(dict.fromkeys(alarm.kind.replace("_", " ") for alarm in (*few, *spoiled)))
        return [f"{label}: no verdict on its accuracies ({kinds})."]
    found = []
    base = baseline_of(table)
    if base:
        n = f"{base.num_samples:,} questions" if base.num_samples else "an unknown number of questions"
        found.append(f"{label}: {base.config} gets {percent(base.accuracy)} {span(accuracy_of(base).interval)} of {n}.")
    found += [f"{label}: {a.text}." for a in report.alarms if a.table == label and a.kind == "columns_alike"]
    contrasts = report.contrasts.get(label, ())
    alike = [c for c in contrasts if c.outcome == "inconclusive"]
    together = alike if len(contrasts) > MOST_SENTENCES and len({c.baseline for c in alike}) == 1 else []
    found += [f"{label}: {name_of(c.configs, table)} {change(c)}." for c in contrasts if c not in together]
    if together:
        names = listed((name_of(c.configs, table) for c in together), len(together))
        size = value_range([100 * c.difference for c in together], "+.1f")
        low, high = min(c.interval.low for c in together), max(c.interval.high for c in together)
        found.append(
            f"{label}: {names} cannot be told from {together[0].baseline}: {size} points, all their 95% intervals "
            f"within {span(Interval(low, high), signed=True)}."
        )
    return found + same_columns(table)


def _limits(report: Report) -> list[str]:
    """What could not be seen."""
    found = []
    for table in report.tables:
        contrasts = report.contrasts.get(table.label, ())
        known = [(c.detectable, c) for c in contrasts if c.detectable is not None]
        if not known or report.spoiled(table.label, "accuracy"):
            continue
        sizes = [detectable for detectable, _ in known]
        needed = [c.needed[0] for _, c in known if c.needed and c.needed[0]]
        more = f"; a loss of 1 point would take {value_range(needed, ',')}" if needed else ""
        asked = max(c.num_questions for _, c in known)
        found.append(
            f"{table.label}: with 80% power {asked:,} questions show a difference of "
            f"{value_range([100 * size for size in sizes], '.1f')} points, by how many answers a configuration "
            f"changes{more}."
        )
    return found


def _speeds(report: Report, table: ResultTable) -> list[str]:
    """Seconds saved or not, on named hardware."""
    # where code or answers are mixed, so are the times
    if report.spoiled(table.label, "speed") or report.spoiled(table.label, "accuracy") or table.is_scored:
        slow = [a.text for a in report.alarms if a.table == table.label and a.kind == "reuse_slower"]
        return [f"{table.label}: {text}." for text in slow]
    found = []
    for k in (2, 3):
        runs = [run for run in table.runs.values() if run.reuse_k == k and "+" not in run.config]
        gains = [
            run.tokens_per_second / base
            for run in runs
            if (base := reference_speed(table, run, report.odd_speeds(table.label))) and run.tokens_per_second
        ]
        if gains:
            low, high = min(gains), max(gains)
            size = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            found.append(f"{table.label}: k = {k} runs at {size} times the tokens/s of k = 1 on {hardware(runs[0])}.")
    return found


def _best(report: Report) -> list[str]:
    """Which result is fastest among those shown to lose no more than a budget."""
    candidates: list[tuple[float, Contrast, ResultTable]] = []
    for table in report.own:
        if report.spoiled(table.label, "accuracy") or report.spoiled(table.label, "reuse"):
            continue
        for c in report.contrasts.get(table.label, ()):
            gain = forward_gain(table, table.runs[c.configs[0]])
            if c.paired and gain is not None:
                candidates.append((gain, c, table))
    if not candidates:
        return []
    found = []
    for budget in BUDGETS:
        shown = [entry for entry in candidates if entry[1].interval.low >= -budget and entry[0] > 1]
        lead = f"Losing at most {100 * budget:g} point{'s' * (budget > 0.01)} (95% confidence)"
        if shown:
            gain, c, table = max(shown, key=lambda entry: entry[0])
            name = f"{table.label}/{name_of(c.configs, table)}"
            found.append(
                f"{lead}, the best is {name}: {gain:.2f} times the tokens a full-depth forward of {c.baseline}."
            )
        else:
            found.append(f"{lead}, nothing faster than the baseline is shown.")
    return found


def _curve(report: Report) -> list[str]:
    """Reuse against plain decoding that is at least as fast."""
    if len(report.front) < 2 or not report.equal_speed:
        return []
    # two tables, so what spoils either of them
    sound = [
        (c, best)
        for c, best in report.equal_speed
        if not any(report.spoiled(label, claim) for label in (c.table, best.table) for claim in ("accuracy", "reuse"))
    ]
    found = []
    for table in report.own:
        held = [(c, best) for c, best in sound if c.table == table.label]
        better = [(c, best) for c, best in held if c.p_adjusted < ALPHA and c.difference > 0]
        if len(better) <= MOST_BETTER:
            for c, best in better:
                name = f"{c.table}/{name_of(c.configs, table)}"
                found.append(f"{name} beats plain decoding ({best.config}) at equal speed: {change(c)}.")
        else:
            size = value_range([100 * c.difference for c, _ in better], ".1f")
            names = listed((name_of(c.configs, table) for c, _ in better), len(better))
            found.append(
                f"{table.label}: {len(better)} of {len(held)} results beat plain decoding that is at least as fast, by "
                f"{size} points ({p_text(max(c.p_adjusted for c, _ in better)).replace('=', 'at most')}): {names}."
            )
    if sound and not found:
        worse = sum(c.p_adjusted < ALPHA and c.difference < 0 for c, _ in sound)
        found.append(
            f"Of {len(sound)} results with reuse none is shown to beat plain decoding that is at least as "
            f"fast{f'; {worse} are worse' if worse else ''}."
        )
    return found


def verdict(report: Report) -> list[str]:
    """The sentences, most important first."""
    found = _lead(report)
    if not any(table.runs for table in report.tables):
        return found
    found += _best(report) + _curve(report)
    for table in report.tables:
        if table.runs:
            found += _accuracies(report, table) + _speeds(report, table)
    return found + _limits(report)
