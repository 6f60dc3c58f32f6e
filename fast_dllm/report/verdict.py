"""The report in sentences that can be quoted: a verdict of three, and the details behind it.

A sentence is written only where the numbers carry it. A claim that an alarm spoils is not made.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast_dllm.report.alarms import ALARM
from fast_dllm.report.build import Report, forward_gain
from fast_dllm.report.compare import Contrast, accuracy_of, baseline_of, columns, num_flips
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import hardware, reference_speed
from fast_dllm.report.statistics import ALPHA, Interval
from fast_dllm.report.words import FORWARD_UNIT, listed, name_of, p_text, percent, points, span, value_range

MOST_SENTENCES = 6  # on the contrasts of one table, before those that cannot be told apart share one
MOST_BETTER = 2  # results of one table that beat the curve, before they share a sentence
BUDGETS = (0.01, 0.02, 0.05)  # losses of accuracy that a reader may accept, the strictest first


@dataclass(frozen=True)
class Best:
    """The setting with the most tokens per forward of those shown to lose no more than `budget`."""

    budget: float
    gain: float
    contrast: Contrast
    table: ResultTable

    @property
    def run(self) -> RunResult:
        return self.table.runs[self.contrast.configs[0]]

    @property
    def name(self) -> str:
        return f"{self.table.label}/{name_of(self.contrast.configs, self.table)}"


def verdict(report: Report) -> list[str]:
    """Three sentences: the best setting and its gain, what it costs, what cannot be told. One where nothing was run."""
    if not any(table.runs for table in report.tables):
        names = listed(dict.fromkeys(table.experiment for table in report.tables))
        return [f"No results of {names} on {report.folder} yet: there is nothing to tell."]
    best = best_setting(report)
    if best is None:
        return [f"No setting can be called the best: {_why_none(report)}.", _baselines(report), _not_told(report)]
    return [_gain(best), _cost(report, best), _not_told(report, best)]


def details(report: Report) -> list[str]:
    """Everything else that can be said, table by table."""
    if not any(table.runs for table in report.tables):
        return []
    sentences = _within_budgets(report) + _against_plain(report)
    for table in report.tables:
        if table.runs:
            sentences += _accuracies(report, table) + _speeds(report, table)
    return sentences + _power(report)


# ---- the three sentences ----


def _candidates(report: Report) -> list[tuple[float, Contrast, ResultTable]]:
    """(gain in tokens per forward, contrast, table) of every paired result that no alarm spoils."""
    candidates = []
    for table in report.local_tables:
        if _unfit(report, table) or report.spoiled(table.label, "reuse"):
            continue
        for contrast in report.contrasts.get(table.label, ()):
            gain = forward_gain(table, table.runs[contrast.configs[0]])
            if contrast.paired and gain is not None:
                candidates.append((gain, contrast, table))
    return candidates


def _best_within(candidates: list[tuple[float, Contrast, ResultTable]], budget: float) -> Best | None:
    shown = [entry for entry in candidates if entry[1].interval.low >= -budget and entry[0] > 1]
    if not shown:
        return None
    gain, contrast, table = max(shown, key=lambda entry: entry[0])
    return Best(budget, gain, contrast, table)


def best_setting(report: Report) -> Best | None:
    """The best setting within the strictest budget that any setting keeps."""
    candidates = _candidates(report)
    return next((best for budget in BUDGETS if (best := _best_within(candidates, budget))), None)


def _unfit(report: Report, table: ResultTable) -> list[str]:
    """The kinds of the alarms that forbid any claim about the table's accuracies."""
    few = [a for a in report.alarms if a.kind == "too_few_questions" and a.table == table.label]
    alarms = (*few, *report.spoiled(table.label, "accuracy"))
    return list(dict.fromkeys(alarm.kind.replace("_", " ") for alarm in alarms))


def _why_none(report: Report) -> str:
    tables = [table for table in report.local_tables if table.runs]
    if not tables:
        return "all results are imported, and imported results are never named as the best"
    if all(table.is_scored for table in tables):
        return f"{report.task} is scored by log-likelihood, where nothing can be reused"
    few = [a for a in report.alarms if a.kind == "too_few_questions"]
    if few and not _candidates(report):
        return few[0].text
    kinds = dict.fromkeys(kind for table in tables for kind in _unfit(report, table))
    kinds |= dict.fromkeys(
        alarm.kind.replace("_", " ") for table in tables for alarm in report.spoiled(table.label, "reuse")
    )
    if not _candidates(report):
        return f"alarms forbid it ({listed(kinds)})" if kinds else "no two results could be compared"
    return f"none is shown to be faster and to lose at most {100 * BUDGETS[-1]:g} points (95% confidence)"


def _baselines(report: Report) -> str:
    """In place of a cost: what the run gets that the others are compared with."""
    table = next(table for table in (*report.local_tables, *report.imported_tables) if table.runs)
    base = baseline_of(table) or next(iter(table.runs.values()))
    on_questions = f" on {base.num_samples:,} questions" if base.num_samples else ""
    accuracy = f"{percent(base.accuracy)} {span(accuracy_of(base).interval)}"
    return f"{table.label}/{base.config} has an accuracy of {accuracy}{on_questions}."


def _gain(best: Best) -> str:
    base = baseline_of(best.table, best.run)
    numbers = ""
    if base and base.tokens_per_forward and best.run.tokens_per_forward:
        numbers = f" ({best.run.tokens_per_forward:.2f} against {base.tokens_per_forward:.2f}, all forwards counted)"
    return (
        f"The best setting is {best.name}: {best.gain:.2f} times the {FORWARD_UNIT} of {best.contrast.baseline}"
        f"{numbers}."
    )


def _cost(report: Report, best: Best) -> str:
    c = best.contrast
    size = f"{100 * c.difference:+.1f} points {span(c.interval, signed=True)} on {c.num_questions:,} questions"
    lost = f"a loss above {100 * best.budget:g} point{'s' * (best.budget > 0.01)} is excluded (95% confidence)"
    return f"What it costs: its accuracy changes by {size} ({_significance(c)}); {lost}; {_seconds(report, best)}."


def _significance(c: Contrast) -> str:
    if c.outcome == "identical":
        return "the same answers"
    return {"loses": "a loss", "gains": "a gain"}.get(c.outcome, "no difference is shown")


def _seconds(report: Report, best: Best) -> str:
    """What the best setting saves in time, where that can be said."""
    if report.spoiled(best.table.label, "speed"):
        return "its time cannot be compared (see the alarms)"
    run, odd = best.run, report.odd_speeds(best.table.label)
    base = reference_speed(best.table, run, odd)
    if not base or not run.tokens_per_second or run.config in odd:
        return "its time was not measured beside the baseline's"
    return f"it runs at {run.tokens_per_second / base:.2f} times the tokens/s on {hardware(run)}"


def _not_told(report: Report, best: Best | None = None) -> str:
    """What these results cannot show."""
    parts = []
    tables = [best.table] if best else [table for table in report.tables if table.runs]
    for table in tables[:1]:
        known = [c for c in report.contrasts.get(table.label, ()) if c.detectable is not None]
        if known and not _unfit(report, table):
            sizes = value_range([100 * c.detectable for c in known if c.detectable is not None], ".1f")
            num_questions = max(c.num_questions for c in known)
            parts.append(f"a difference below {sizes} points (80% power, {num_questions:,} questions)")
    contrasts = [c for table in report.local_tables for c in report.contrasts.get(table.label, ())]
    unsure = sum(c.outcome == "inconclusive" for c in contrasts)
    if unsure:
        parts.append(f"whether {unsure} of {len(contrasts)} results differ from their baseline at all")
    kinds = dict.fromkeys(alarm.kind.replace("_", " ") for alarm in report.alarms if alarm.level == ALARM)
    if kinds:
        count = f"{report.num_alarms} alarm{'s' * (report.num_alarms > 1)}"
        parts.append(f"what {count} below spoil{'s' * (report.num_alarms == 1)} ({listed(kinds)})")
    if not parts:
        return "What cannot be told: how other tasks, models and machines behave; there are no alarms."
    return f"What cannot be told: {listed(parts)}{'' if kinds else '; there are no alarms'}."


# ---- details ----


def change(c: Contrast) -> str:
    """One contrast in words. It names a direction as a finding only where that is significant after the correction."""
    counts = f"{c.regressed} answers lost, {c.improved} won" if c.paired else "from totals, unpaired"
    size = f"{points(abs(c.difference))} points ({span(c.interval, signed=True)}; {counts}; {p_text(c.p_adjusted)})"
    if c.outcome == "identical":
        return f"gives the very same answers as {c.baseline} on all {c.num_questions} questions"
    if c.outcome == "inconclusive":
        direction = "below" if c.difference < 0 else "above"
        return f"cannot be told from {c.baseline}: {size.replace(' points', f' points {direction}', 1)}"
    return f"{c.outcome} {size} against {c.baseline}"


def _within_budgets(report: Report) -> list[str]:
    """For each budget, the fastest result that is shown to keep it."""
    candidates = _candidates(report)
    sentences = []
    for budget in BUDGETS if candidates else ():
        lead = f"Losing at most {100 * budget:g} point{'s' * (budget > 0.01)} (95% confidence)"
        best = _best_within(candidates, budget)
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
        if not any(report.spoiled(label, claim) for label in (c.table, best.table) for claim in ("accuracy", "reuse"))
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
        value = f"{percent(run.accuracy)} {span(accuracy_of(run).interval)}"
        several = " It says nothing about reuse." if len(table.runs) > 1 else ""
        return [f"{label}: {table.task} is scored by log-likelihood: {value}.{several}"]
    kinds = _unfit(report, table)
    if kinds:
        return [f"{label}: no verdict on its accuracies ({listed(kinds)})."]
    sentences = []
    base = baseline_of(table)
    if base:
        n = f"{base.num_samples:,} questions" if base.num_samples else "an unknown number of questions"
        value = f"{percent(base.accuracy)} {span(accuracy_of(base).interval)}"
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
    """Tokens per second of each k > 1, as a multiple of k = 1, on the named hardware."""
    # where the code or the answers are mixed, the times are too
    if report.spoiled(table.label, "speed") or report.spoiled(table.label, "accuracy") or table.is_scored:
        slow = [a.text for a in report.alarms if a.table == table.label and a.kind == "reuse_slower"]
        return [f"{table.label}: {text}." for text in slow]
    sentences = []
    ks = sorted({run.reuse_k for run in table.runs.values() if run.reuse_k is not None and run.reuse_k > 1})
    for k in ks:
        runs = [run for run in table.runs.values() if run.reuse_k == k and "+" not in run.config]
        gains = [
            run.tokens_per_second / base
            for run in runs
            if (base := reference_speed(table, run, report.odd_speeds(table.label))) and run.tokens_per_second
        ]
        if gains:
            low, high = min(gains), max(gains)
            size = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
            sentences.append(
                f"{table.label}: k = {k} runs at {size} times the tokens/s of k = 1 on {hardware(runs[0])}."
            )
    return sentences


def _power(report: Report) -> list[str]:
    """Which differences each table could show."""
    sentences = []
    for table in report.tables:
        known = [(c.detectable, c) for c in report.contrasts.get(table.label, ()) if c.detectable is not None]
        if not known or report.spoiled(table.label, "accuracy"):
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
