"""The details behind the verdict: sentences on each table's accuracies, speeds and power, which can be quoted."""

from __future__ import annotations

from fast_dllm.report.best_setting import BUDGETS, best_within, candidates_of, unfit_kinds
from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast, interval_of, name_beside
from fast_dllm.report.results import ResultTable
from fast_dllm.report.same_results import columns, num_flips
from fast_dllm.report.speeds import hardware, is_on_cpu
from fast_dllm.report.statistics import ALPHA, Interval
from fast_dllm.report.words import FORWARD_UNIT, listed, name_of, p_text, percent, points, span, value_range

MOST_SENTENCES = 6  # on the contrasts of one table, before those that cannot be told apart share one
MOST_BETTER = 2  # results of one table that beat the curve, before they share a sentence


def details(report: Report) -> list[str]:
    """Everything else that can be said, table by table."""
    if not any(table.runs for table in report.tables):
        return []
    sentences = _within_budgets(report) + _against_plain(report)
    for table in report.tables:
        if table.runs:
            sentences += _accuracies(report, table) + _speeds(report, table)
    return sentences + _power(report)


def change(c: Contrast) -> str:
    """One contrast in words. It names a direction as a finding only where that is significant after the correction."""
    counts = f"{c.regressed} answers lost, {c.improved} won" if c.paired else "from totals, unpaired"
    size = f"{points(abs(c.difference))} points ({span(c.interval, signed=True)}; {counts}; {p_text(c.p_adjusted)})"
    if c.outcome == "identical":
        gain = f", at {c.forward_gain:.2f} times its {FORWARD_UNIT}" if c.forward_gain is not None else ""
        return f"gives the very same answers as {c.baseline} on all {c.num_questions} questions{gain}"
    if c.outcome == "inconclusive":
        direction = "below" if c.difference < 0 else "above"
        return f"cannot be told from {c.baseline}: {size.replace(' points', f' points {direction}', 1)}"
    return f"{c.outcome} {size} against {c.baseline}"


def _within_budgets(report: Report) -> list[str]:
    """For each budget, the fastest result that is shown to keep it."""
    candidates = candidates_of(report)
    sentences = []
    for budget in BUDGETS if candidates else ():
        lead = f"Losing at most {100 * budget:g} point{'s' * (budget > 0.01)} (95% confidence)"
        best = best_within(candidates, budget)
        if best is None:
            sentences.append(f"{lead}, nothing faster than the baseline is shown.")
        else:
            gain = f"{best.gain:.2f} times the {FORWARD_UNIT} of {best.contrast.baseline}"
            sentences.append(f"{lead}, the best is {best.name}: {gain}.")
    return sentences


def _against_plain(report: Report) -> list[str]:
    """Reuse against plain decoding that is at least as fast."""
    if len(report.front) < 2 or not report.equal_speed:
        return []
    sound = [
        (c, best)
        for c, best in report.equal_speed
        if not any(
            report.alarms_against(claim, label) for label in (c.table, best.table) for claim in ("accuracy", "reuse")
        )
    ]
    sentences = []
    for table in report.local_tables:
        compared = [(c, best) for c, best in sound if c.table == table.label]
        better = [(c, best) for c, best in compared if c.p_adjusted < ALPHA and c.difference > 0]
        if len(better) <= MOST_BETTER:
            for c, best in better:
                name = f"{c.table}/{name_of(c.configs, table)}"
                sentences.append(f"{name} beats plain decoding ({best.config}) at equal speed: {change(c)}.")
        else:
            size = value_range([100 * c.difference for c, _ in better], ".1f")
            names = listed((name_of(c.configs, table) for c, _ in better), len(better))
            p = p_text(max(c.p_adjusted for c, _ in better)).replace("=", "at most")
            sentences.append(
                f"{table.label}: {len(better)} of {len(compared)} results beat plain decoding that is at least as "
                f"fast, by {size} points ({p}): {names}."
            )
    if sound and not sentences:
        worse = sum(c.p_adjusted < ALPHA and c.difference < 0 for c, _ in sound)
        sentences.append(
            f"Of {len(sound)} results with reuse none is shown to beat plain decoding that is at least as "
            f"fast{f'; {worse} are worse' if worse else ''}."
        )
    return sentences


def _accuracies(report: Report, table: ResultTable) -> list[str]:
    """What each configuration of the table lost, or why that is not said."""
    label = table.label
    if table.is_scored:
        run = next(iter(table.runs.values()))
        value = f"{percent(run.accuracy)} {span(interval_of(run))}"
        several = " It says nothing about reuse." if len(table.runs) > 1 else ""
        return [f"{label}: {table.task} is scored by log-likelihood: {value}.{several}"]
    kinds = unfit_kinds(report, table)
    if kinds:
        return [f"{label}: no verdict on its accuracies ({listed(kinds)})."]
    sentences = []
    base = report.baseline(table)
    if base and base.table == label:
        n = f"{base.num_samples:,} questions" if base.num_samples else "an unknown number of questions"
        value = f"{percent(base.accuracy)} {span(interval_of(base))}"
        sentences.append(f"{label}: {base.config} gets {value} of {n}.")
    sentences += [f"{label}: {a.text}." for a in report.alarms if a.table == label and a.kind == "columns_alike"]
    contrasts = report.contrasts.get(label, ())
    alike = [c for c in contrasts if c.outcome == "inconclusive"]
    together = alike if len(contrasts) > MOST_SENTENCES and len({c.baseline for c in alike}) == 1 else []
    sentences += [f"{label}: {name_of(c.configs, table)} {change(c)}." for c in contrasts if c not in together]
    if together:
        names = listed((name_of(c.configs, table) for c in together), len(together))
        size = value_range([100 * c.difference for c in together], "+.1f")
        low, high = min(c.interval.low for c in together), max(c.interval.high for c in together)
        sentences.append(
            f"{label}: {names} cannot be told from {together[0].baseline}: {size} points, all their 95% intervals "
            f"within {span(Interval(low, high), signed=True)}."
        )
    return sentences + _same_columns(table)


def _same_columns(table: ResultTable) -> list[str]:
    """The columns of one k whose answers are all the same."""
    sentences = []
    for k, groups in columns(table).items():
        for group in groups:
            if all(num_flips(group[0], run) == 0 for run in group[1:]):
                names, total = listed(run.config for run in group), group[0].num_samples
                which = f"one result for k = {k}, not {len(group)}"
                sentences.append(f"{names} gave the same answer to each of {total} questions: {which}.")
    return sentences


def _speeds(report: Report, table: ResultTable) -> list[str]:
    """Tokens per second of each k > 1, as a multiple of the baseline's, on the named GPU."""
    # where the code or the answers are mixed, the times are too
    if report.alarms_against("speed", table.label) or report.alarms_against("accuracy", table.label) or table.is_scored:
        slow = [a.text for a in report.alarms if a.table == table.label and a.kind == "reuse_slower"]
        return [f"{table.label}: {text}." for text in slow]
    sentences = []
    ks = sorted({run.reuse_k for run in table.runs.values() if run.reuse_k is not None and run.reuse_k > 1})
    for k in ks:
        # The times of separate runs on a CPU depend on what else runs there.
        runs = [run for run in table.runs.values() if run.reuse_k == k and "+" not in run.config and not is_on_cpu(run)]
        gains = [
            run.tokens_per_second / base
            for run in runs
            if run is not report.against and (base := report.baseline_speed(table, run)) and run.tokens_per_second
        ]
        if gains:
            baseline = name_beside(report.against, table.label) if report.against else "k = 1"
            low, high = min(gains), max(gains)
            size = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            sentences.append(
                f"{table.label}: k = {k} runs at {size} times the tokens/s of {baseline} on {hardware(runs[0])}."
            )
    return sentences


def _power(report: Report) -> list[str]:
    """Which differences each table could show."""
    sentences = []
    for table in report.tables:
        contrasts = [c for c in report.contrasts.get(table.label, ()) if c.outcome != "identical"]
        known = [(c.detectable, c) for c in contrasts if c.detectable is not None]
        if not known or report.alarms_against("accuracy", table.label):
            continue
        sizes = value_range([100 * detectable for detectable, _ in known], ".1f")
        needed = [c.needed[0] for _, c in known if c.needed and c.needed[0]]
        more = f"; a loss of 1 point would take {value_range(needed, ',')}" if needed else ""
        asked = max(c.num_questions for _, c in known)
        sentences.append(
            f"{table.label}: with 80% power {asked:,} questions show a difference of {sizes} points, by how many "
            f"answers a configuration changes{more}."
        )
    return sentences
