"""The report's sections of numbers, as Markdown: the matrices, the comparisons, and AUP."""

from __future__ import annotations

from fast_dllm.report.build import Report
from fast_dllm.report.compare import Contrast, interval_of, name_beside
from fast_dllm.report.markdown import grid, heading, paragraph
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import hardware, is_on_cpu, outliers
from fast_dllm.report.statistics import ALPHA
from fast_dllm.report.words import FORWARD_UNIT, by_value, listed, name_of, percent, points, span

NONE = "–"


def value_text(value: float | None, form: str = ".2f") -> str:
    """The number in this format; a dash where it is not recorded."""
    return NONE if value is None else format(value, form)


MATRIX_HEAD = (
    "configuration", "questions", "accuracy %", "95% interval", "new tokens/s", "tokens per full-depth forward",
    "layer-forwards per token", "row-layer-forwards per token", "speed-up, forwards", "speed-up, seconds", "remarks",
)  # fmt: skip
# the order of the columns is that of decoding.GUESSES
GUESSES_HEAD = ("configuration", "guessed steps accepted", "guessed commits accepted", "guessed openings accepted")
GUESSES_RUN_ROWS = (
    "A forward with guesses runs more rows than one without. At batch 1 on a GPU these are nearly free. On a CPU and "
    "in a large batch they are not, so compare the row-layer-forwards per token there."
)


def _remarks(table: ResultTable, run: RunResult, outlier_configs: set[str]) -> str:
    remarks = [kind.replace("_", " ") for kind, _ in run.faults]
    if run.config in outlier_configs:
        remarks.append("time measured under other conditions")
    if table.is_stale(run):
        remarks.append("stale")
    return ", ".join(dict.fromkeys(remarks))


def _matrix_row(report: Report, table: ResultTable, run: RunResult, outlier_configs: set[str]) -> list[str]:
    base = report.baseline_speed(table, run)
    speed, interval = run.tokens_per_second, interval_of(run)
    comparable = run.config not in outlier_configs and not _other_hardware(table, run)
    return [
        run.config,
        f"{run.num_samples:,}" if run.num_samples else NONE,
        f"{100 * run.accuracy:.2f}",
        span(interval) if interval else NONE,
        value_text(speed, ".1f"),
        value_text(run.tokens_per_forward),
        value_text(run.layers_per_token, ".2f"),
        value_text(run.row_layers_per_token, ",.0f"),
        value_text(report.forward_gain(table, run)),
        value_text(speed / base if speed and base and comparable else None),
        _remarks(table, run, outlier_configs),
    ]


def _other_hardware(table: ResultTable, run: RunResult) -> bool:
    kinds = by_value(table.runs.values(), hardware)
    return len(kinds) > 1 and run not in next(iter(kinds.values()))


def matrix_section(report: Report, table: ResultTable) -> list[str]:
    outlier_configs = {*outliers(table), *report.outlier_configs(table.label)}
    rows = [_matrix_row(report, table, run, outlier_configs) for run in table.runs.values()]
    rows += [[config, *[NONE] * 9, f"left out: {reason}"] for config, reason in table.problems.items()]
    rows += [[config, *[NONE] * 9, "no result"] for config in table.missing]
    blocks: list[str] = [heading(3, table.label)]
    if not rows:
        return [*blocks, paragraph("Nothing has been run.")]
    blocks.append(grid(MATRIX_HEAD, rows, frozenset(range(1, 10))))
    blocks.append(paragraph(f"{_speed_ups(report, table)} Intervals are Wilson's."))
    return blocks + _guesses(table)


def _speed_ups(report: Report, table: ResultTable) -> str:
    """What the table's speed-ups are against, and how they are measured."""
    base = report.against or table.runs.get(table.compare_with or "")
    name = name_beside(base, table.label) if base else "this table's k = 1"
    forwards = (
        f"Speed-ups are against {name}: in tokens per full-depth forward, all forwards counted (layers run / layers "
        "where the summary counts them)"
    )
    timed = [run for run in table.runs.values() if run.tokens_per_second]
    if timed and all(is_on_cpu(run) for run in timed):
        return f"{forwards}. Times on a CPU are not compared, because other programs change them."
    where = f" on {listed(map(str, by_value(timed, hardware)))}" if timed else ""
    time_of_base = (
        ""
        if report.against
        else (
            " against the median of the k = 1 columns (where there are none, the configuration that the others are "
            "compared with),"
        )
    )
    return f"{forwards}, and in new tokens per second{where},{time_of_base} under the same conditions."


def _guesses(table: ResultTable) -> list[str]:
    """How many guesses ran in each configuration, and how many of them were used; nothing where none ran."""
    rows = [
        [run.config, *(f"{accepted:,} of {offered:,}" for accepted, offered in run.guesses.values())]
        for run in table.runs.values()
        if run.guesses
    ]
    return [grid(GUESSES_HEAD, rows, frozenset(range(1, 4)))] if rows else []


def matrices_section(report: Report) -> list[str]:
    blocks = [block for table in report.tables for block in matrix_section(report, table)]
    if any(run.guesses for table in report.tables for run in table.runs.values()):
        blocks.append(paragraph(GUESSES_RUN_ROWS))
    return blocks


CONTRAST_HEAD = (
    "configuration", "against", "questions", "regressed", "improved", "same", "difference, points", "95% interval", "p",
    "p, Holm", "smallest at 80% power", "needed for 1 / 2 points", "reading",
)  # fmt: skip
READING = {"identical": "the same answers", "loses": "worse", "gains": "better", "inconclusive": "inconclusive"}


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _contrast_row(c: Contrast, table: ResultTable) -> list[str]:
    reading = READING[c.outcome]
    if c.outcome == "identical" and c.forward_gain is not None:
        reading = f"the same answers, {c.forward_gain:.2f} times the {FORWARD_UNIT}"
    if c.outcome == "inconclusive" and c.interval.low >= -0.01:
        reading = "inconclusive; a loss above 1 point is excluded"
    return [
        name_of(c.configs, table),
        c.baseline,
        f"{c.num_questions:,}",
        _count(c.regressed),
        _count(c.improved),
        _count(c.same),
        f"{100 * c.difference:+.2f}",
        span(c.interval, signed=True),
        _p(c.p_value),
        _p(c.p_adjusted),
        NONE if c.detectable is None else points(c.detectable),
        " / ".join(_count(n) for n in c.needed),
        reading,
    ]


def _methods(contrasts: list[Contrast]) -> str:
    shares = [c.discordant_share for c in contrasts]
    assumed = f"{percent(min(shares))}" + (f" to {percent(max(shares))}" if max(shares) - min(shares) > 5e-4 else "")
    level = f"{ALPHA / len(contrasts):.2g}"
    strata = max(c.num_strata for c in contrasts)
    paired = (
        "Paired on the same questions: exact two-sided McNemar test; Tango's score interval"
        + (f", stratified over {strata} subtasks, weighted as the task weights them (MOVER)" if strata > 1 else "")
        + "; share of changing answers assumed by the power: the observed one, "
    )
    totals = (
        "From totals, so unpaired and weaker: Fisher's exact test; Newcombe's interval; share of changing answers "
        "assumed by the power: that of independent answers, "
    )
    mixed = {c.paired for c in contrasts}
    text = (paired if True in mixed else "") + (totals if False in mixed else "")
    return paragraph(
        f"{text}{assumed}, and never less than the difference itself. Holm's correction is over these {len(contrasts)} "
        f"contrasts; power is that of the exact test at its first step's level, {level}. Each interval is for one "
        "contrast by itself."
    )


def comparison_section(report: Report) -> list[str]:
    blocks: list[str] = []
    for table in report.tables:
        contrasts = list(report.contrasts.get(table.label, ()))
        if contrasts:
            blocks.append(heading(3, table.label))
            blocks.append(grid(CONTRAST_HEAD, [_contrast_row(c, table) for c in contrasts], frozenset(range(2, 12))))
            blocks.append(_methods(contrasts))
    if report.equal_speed and len(report.front) > 1:
        labels = {table.label: table for table in report.tables}
        contrasts = [c for c, _ in report.equal_speed]
        rows = [[f"{c.table}/{row[0]}", *row[1:]] for c in contrasts for row in [_contrast_row(c, labels[c.table])]]
        blocks.append(heading(3, "Against plain decoding at equal speed"))
        blocks.append(
            paragraph(
                "Each result with reuse against the most accurate plain setting (threshold, sub-block size) with at "
                "least as many tokens per full-depth forward; results faster than every plain setting are left out."
            )
        )
        blocks.append(grid(CONTRAST_HEAD, rows, frozenset(range(2, 12))))
        blocks.append(_methods(contrasts))
    return blocks or [paragraph("No two configurations that could be compared.")]


def aup_section(report: Report) -> list[str]:
    if not report.aup_entries:
        return []
    rows = [
        [entry.name, value_text(entry.value, ".1f"), str(entry.num_points), str(entry.num_dropped)]
        for entry in sorted(report.aup_entries, key=lambda entry: -(entry.value or 0))
    ]
    return [
        heading(3, "AUP"),
        grid(("experiment", "AUP", "points", "of them dropped"), rows, frozenset((1, 2, 3))),
        paragraph(
            "Accuracy under parallelism as arXiv 2601.07568 defines it: the area under accuracy (%) against tokens per "
            "full-depth forward, each accuracy weighted by min(exp(-3 (1 - y / best)), 1), points more than 5 points "
            "below the slowest one dropped. It depends on which settings were run: compare sweeps that are alike."
        ),
    ]
