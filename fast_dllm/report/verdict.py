"""The verdict: three sentences that can be quoted. details.py has the sentences behind it.

A sentence is written only where the numbers carry it. A claim that an alarm spoils is not made.
"""

from __future__ import annotations

from fast_dllm.report.alarms import ALARM, Alarm
from fast_dllm.report.best_setting import BUDGETS, Best, best_setting, candidates_of, unfit_kinds
from fast_dllm.report.build import LOCAL, Report
from fast_dllm.report.compare import Contrast, interval_of
from fast_dllm.report.speeds import hardware, is_on_cpu
from fast_dllm.report.words import FORWARD_UNIT, listed, percent, span, value_range


def verdict(report: Report) -> list[str]:
    """Three sentences: the best setting and its gain, its cost, what cannot be shown. One if nothing was run."""
    if not any(table.runs for table in report.tables):
        names = listed(dict.fromkeys(table.experiment for table in report.tables))
        return [f"No results of {names} on {report.folder} yet: there is nothing to tell."]
    best = best_setting(report)
    if best is None:
        return [f"No setting can be called the best: {_why_none(report)}.", _baselines(report), _open_questions(report)]
    return [_gain(report, best), _cost(report, best), _open_questions(report, best)]


def _why_none(report: Report) -> str:
    """Why no setting is called the best."""
    tables = [table for table in report.local_tables if table.runs]
    if not tables:
        return "all results are imported, and imported results are never named as the best"
    if all(table.is_scored for table in tables):
        return f"{report.task} is scored by log-likelihood, where nothing can be reused"
    few = [a for a in report.alarms if a.kind == "too_few_questions"]
    if few and not candidates_of(report):
        return few[0].text
    kinds = dict.fromkeys(kind for table in tables for kind in unfit_kinds(report, table))
    kinds |= dict.fromkeys(
        alarm.kind.replace("_", " ") for table in tables for alarm in report.alarms_against("reuse", table.label)
    )
    if not candidates_of(report):
        return f"alarms forbid it ({listed(kinds)})" if kinds else "no two results could be compared"
    return f"none is shown to be faster and to lose at most {100 * BUDGETS[-1]:g} points (95% confidence)"


def _baselines(report: Report) -> str:
    """The accuracy of the run that the others are compared with, where no setting is the best."""
    table = next(table for table in (*report.local_tables, *report.imported_tables) if table.runs)
    base = report.baseline(table) or next(iter(table.runs.values()))
    on_questions = f" on {base.num_samples:,} questions" if base.num_samples else ""
    accuracy = f"{percent(base.accuracy)} {span(interval_of(base))}"
    return f"{base.table}/{base.config} has an accuracy of {accuracy}{on_questions}."


def _gain(report: Report, best: Best) -> str:
    base = report.baseline(best.table, best.run)
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
    run, base = best.run, report.baseline(best.table, best.run)
    labels = {run.table, base.table if base else run.table}
    if any(report.alarms_against("speed", label) for label in labels):
        return "its time cannot be compared (see the alarms)"
    if is_on_cpu(run):
        return "its time on a CPU is not compared, because other programs change it: count forwards"
    base_speed = report.baseline_speed(best.table, run)
    if not base_speed or not run.tokens_per_second or run.config in report.outlier_configs(run.table):
        return "its time was not measured beside the baseline's"
    return f"it runs at {run.tokens_per_second / base_speed:.2f} times the tokens/s on {hardware(run)}"


def _open_questions(report: Report, best: Best | None = None) -> str:
    """What these results cannot show, and why."""
    parts = []
    tables = [best.table] if best else [table for table in report.tables if table.runs]
    for table in tables[:1]:
        contrasts = [c for c in report.contrasts.get(table.label, ()) if c.outcome != "identical"]
        sizes = [100 * c.detectable for c in contrasts if c.detectable is not None]
        if sizes and not unfit_kinds(report, table):
            size, num_questions = value_range(sizes, ".1f"), max(c.num_questions for c in contrasts)
            parts.append(f"a difference below {size} points (80% power, {num_questions:,} questions)")
    contrasts = [c for table in report.local_tables for c in report.contrasts.get(table.label, ())]
    num_unsure = sum(c.outcome == "inconclusive" for c in contrasts)
    if num_unsure:
        parts.append(_unsure(num_unsure, len(contrasts)))
    parts += _forbidden(report)
    if not parts:
        return "What cannot be told: how other tasks, models and machines behave; there are no alarms."
    return f"What cannot be told: {'; '.join(parts)}{'' if report.num_alarms else '; there are no alarms'}."


def _unsure(num_unsure: int, total: int) -> str:
    """The results whose difference is not shown."""
    if total == 1:
        return "whether the result is more or less accurate than its baseline (too few answers changed to show it)"
    which = f"{num_unsure} of the {total} results {'is' if num_unsure == 1 else 'are'}"
    return f"whether {which} more or less accurate than the baseline (too few answers changed to show it)"


FORBIDDEN = {
    "accuracy": "the accuracy of {}",
    "speed": "the speed of {}",
    "reuse": "what reuse does in {}",
    "provenance": "which code made {}",
}


def _forbidden(report: Report) -> list[str]:
    """For each kind of claim, what the alarms forbid to tell."""
    parts = []
    for claim, words in FORBIDDEN.items():
        alarms = [alarm for alarm in report.alarms if alarm.level == ALARM and alarm.spoils == claim]
        if alarms:
            subjects = listed(dict.fromkeys(name for alarm in alarms for name in _subjects(alarm)), 3)
            kinds = listed(dict.fromkeys(alarm.kind.replace("_", " ") for alarm in alarms))
            count = "an alarm" if len(alarms) == 1 else f"{len(alarms)} alarms"
            parts.append(f"{words.format(subjects)}, because of {count} below ({kinds})")
    return parts


def _subjects(alarm: Alarm) -> list[str]:
    """What the alarm is about: some configurations, or a whole table."""
    return [f"{alarm.table}/{config}" for config in alarm.configs] if alarm.kind in LOCAL else [alarm.table]
