"""The report's sections of numbers, as Markdown: the matrices, the comparisons, and AUP."""

from __future__ import annotations

from fast_dllm.report.build import Report, forward_gain
from fast_dllm.report.compare import Contrast, interval_of
from fast_dllm.report.markdown import grid, heading, paragraph
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import hardware, outliers, reference_speed
from fast_dllm.report.statistics import ALPHA
from fast_dllm.report.words import by_value, listed, name_of, percent, points, span

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


def _remarks(table: ResultTable, run: RunResult, odd: set[str]) -> str:
    remarks = [kind.replace("_", " ") for kind, _ in run.faults]
    if run.config in odd:
        remarks.append("time measured under other conditions")
    if table.is_stale(run):
        remarks.append("stale")
    return ", ".join(dict.fromkeys(remarks))


def _matrix_row(report: Report, table: ResultTable, run: RunResult, odd: set[str]) -> list[str]:
    base = reference_speed(table, run, odd)
    speed, interval = run.tokens_per_second, interval_of(run)
    comparable = run.config not in odd and not _other_hardware(table, run)
    return [
        run.config,
        f"{run.num_samples:,}" if run.num_samples else NONE,
        f"{100 * run.accuracy:.2f}",
        span(interval) if interval else NONE,
        value_text(speed, ".1f"),
        value_text(run.tokens_per_forward),
        value_text(run.layers_per_token, ".2f"),
        value_text(run.row_layers_per_token, ",.0f"),
        value_text(forward_gain(table, run)),
        value_text(speed / base if speed and base and comparable else None),
        _remarks(table, run, odd),
    ]


def _other_hardware(table: ResultTable, run: RunResult) -> bool:
    kinds = by_value(table.runs.values(), hardware)
    return len(kinds) > 1 and run not in next(iter(kinds.values()))


def matrix_section(report: Report, table: ResultTable) -> list[str]:
    odd = {*outliers(table), *report.odd_speeds(table.label)}
    rows = [_matrix_row(report, table, run, odd) for run in table.runs.values()]
    rows += [[config, *[NONE] * 9, f"left out: {reason}"] for config, reason in table.problems.items()]
    rows += [[config, *[NONE] * 9, "no result"] for config in table.missing]
    blocks: list[str] = [heading(3, table.label)]
    if not rows:
        return [*blocks, paragraph("Nothing has been run.")]
    kinds = by_value((run for run in table.runs.values() if run.tokens_per_second), hardware)
    where = f" on {listed(map(str, kinds))}" if kinds else ""
    blocks.append(grid(MATRIX_HEAD, rows, frozenset(range(1, 10))))
    blocks.append(
        paragraph(
            "Speed-ups are against this table's k = 1: in tokens per full-depth forward, all forwards counted "
            f"(layers run / layers where the summary counts them), and in new tokens per second{where}, against the "
            "median of the k = 1 columns (where there are none, the configuration that the others are compared with) "
            "under the same conditions. "
            "Intervals are Wilson's."
        )
    )
    return blocks + _guesses(table)


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
READING = {"identical": "identical answers", "loses": "worse", "gains": "better", "inconclusive": "inconclusive"}


def _count(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _contrast_row(c: Contrast, table: ResultTable) -> list[str]:
    reading = READING[c.outcome]
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


def parallelism_section(report: Report) -> list[str]:
    if not report.parallelism:
        return []
    rows = [
        [p.name, value_text(p.value, ".1f"), str(p.num_points), str(p.num_dropped)]
        for p in sorted(report.parallelism, key=lambda p: -(p.value or 0))
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
