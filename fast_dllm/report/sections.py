"""The whole report as Markdown: the verdict, then every section; and the short form for the terminal.

sections_numbers.py has the sections that are tables of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fast_dllm.report.alarms import ALARM
from fast_dllm.report.build import Report
from fast_dllm.report.compare import interval_of
from fast_dllm.report.details import details
from fast_dllm.report.flips import Flip
from fast_dllm.report.markdown import (
    SECTION_LEVEL,
    Section,
    bullets,
    code,
    contents,
    document,
    flip,
    grid,
    heading,
    paragraph,
    picture,
)
from fast_dllm.report.results import RunResult
from fast_dllm.report.sections_numbers import (
    NONE,
    aup_section,
    comparison_section,
    matrices_section,
    value_text,
)
from fast_dllm.report.verdict import verdict
from fast_dllm.report.words import by_value, fact_of, listed, span, values_with_names

# ---- flips, provenance ----


def flip_section(report: Report, flips: list[Flip], num_changed: Mapping[str, int]) -> list[str]:
    blocks: list[str] = []
    for table in report.tables:
        total = num_changed.get(table.label, 0)
        if total:
            shown = [change for change in flips if change.table == table.label]
            blocks.append(heading(3, table.label))
            blocks.append(
                paragraph(f"{total} questions got another answer in some configuration; {len(shown)} are shown.")
            )
            blocks += [block for change in shown for block in flip(change)]
    return blocks or [paragraph("No question whose answer is known to have changed.")]


PROVENANCE = (
    ("model", "model"),
    ("model revision", "model_revision"),
    ("dtype", "dtype"),
    ("device", "device"),
    ("GPU", "gpu"),
    ("graphs", "graphs"),
    ("host", "host"),
    ("commit", "commit"),
    ("uncommitted changes", "dirty"),
    ("generation code, SHA-256", "generation_code_sha256"),
    ("decoding code, SHA-256", "decoding_sha256"),
    ("task version", "task_version"),
    ("metric", "metric"),
    ("examples in the prompt", "num_fewshot"),
    ("batch size", "batch_size"),
    ("processes", "num_processes"),
    ("shards", "num_shares"),
    ("segments", "num_segments"),
    ("seeds", "seeds"),
    ("generation settings", "gen_kwargs"),
    ("system instruction", "system_instruction"),
    ("chosen questions", "samples"),
    ("Python", "python"),
    ("torch", "torch"),
    ("lm_eval", "lm_eval"),
)


def provenance_section(report: Report) -> list[str]:
    blocks: list[str] = []
    for table in report.tables:
        runs = list(table.runs.values())
        if not runs:
            continue
        rows = []
        for what, fact in PROVENANCE:
            values = by_value(runs, fact_of(fact))
            if not values:
                on_cpu = fact == "gpu" and {run.facts.get("device") for run in runs} == {"cpu"}
                rows.append([what, "none" if on_cpu else "not recorded"])
            elif len(values) == 1 and len(next(iter(values.values()))) == len(runs):
                rows.append([what, str(next(iter(values)))])
            else:
                rows.append([what, values_with_names(values)])
        times = sorted(str(run.facts["time"]) for run in runs if run.facts.get("time"))
        if times:
            rows.append(["ended", times[0] if len(times) == 1 else f"{times[0]} to {times[-1]}"])
        arguments = by_value(runs, lambda run: ", ".join(f"{k}={v}" for k, v in run.arguments.items()))
        blocks += [heading(3, table.label), grid(("fact", "value"), rows)]
        blocks.append(
            grid(
                ("configuration", "model arguments"),
                [[listed(r.config for r in rs), str(v)] for v, rs in arguments.items()],
            )
        )
        blocks.append(
            paragraph(f"Read from {listed(sorted({str(_relative(report, run).parent) for run in runs}), 12)}.")
        )
    return [*blocks, paragraph("This report again:"), code(report.command)]


def _relative(report: Report, run: RunResult):
    path = run.path.parent
    return path.relative_to(report.root) if path.is_relative_to(report.root) else path


# ---- the whole ----


@dataclass(frozen=True)
class Document:
    """The report in Markdown. sections: those that HTML folds."""

    text: str
    sections: tuple[Section, ...]


def document_of(
    report: Report, captions: Mapping[str, str], flips: list[Flip], num_changed: Mapping[str, int]
) -> Document:
    """The whole report: the verdict and a table of contents, then every section.

    captions: of each picture, by its name; num_changed: of each table's label the number of changed answers.
    """
    pictures = [picture(name, caption) for name, caption in captions.items()] or [paragraph("Nothing to draw.")]
    alarms = [f"{a.table}: {a.text} [{a.kind}]" for a in report.alarms if a.level == ALARM]
    notes = [f"{a.table}: {a.text} [{a.kind}]" for a in report.alarms if a.level != ALARM]
    sentences = details(report)
    count = f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}" if alarms else "none"
    bodies = [
        (Section("Alarms", count, is_open=bool(alarms)), _alarm_section(alarms, notes)),
        (Section("Details"), [bullets(sentences) if sentences else paragraph("Nothing has been run.")]),
        (Section("The matrices"), matrices_section(report)),
        (Section("Compared on the same questions"), comparison_section(report)),
        (Section("Pictures"), [*pictures, *aup_section(report)]),
        (Section("Flips"), flip_section(report, flips, num_changed)),
        (Section("Provenance"), provenance_section(report)),
    ]
    sections = tuple(section for section, _ in bodies)
    blocks = [heading(1, f"Report: {report.folder}"), heading(SECTION_LEVEL, "Verdict"), bullets(verdict(report))]
    blocks.append(contents(sections))
    for section, body in bodies:
        blocks += [heading(SECTION_LEVEL, section.title), *body]
    return Document(document(blocks), sections)


def _alarm_section(alarms: list[str], notes: list[str]) -> list[str]:
    blocks = [bullets(alarms) if alarms else paragraph("No alarms.")]
    return blocks + ([heading(3, "Notes"), bullets(notes)] if notes else [])


# ---- the terminal ----

TERMINAL_HEAD = ("", "accuracy", "95% interval", "tokens/s", "tokens/forward", "speed-up, forwards")


def terminal_verdict(report: Report) -> str:
    """The verdict and the alarms, as Markdown."""
    blocks = [heading(SECTION_LEVEL, report.folder), bullets(verdict(report))]
    alarms = [f"{alarm.table}: {alarm.text}" for alarm in report.alarms if alarm.level == ALARM]
    if alarms:
        blocks += [heading(SECTION_LEVEL, "Alarms"), bullets(alarms)]
    return document(blocks)


def terminal_table(report: Report) -> str:
    """The main numbers of every run, as Markdown; empty without any run. That of the nine has 80 columns."""
    rows = []
    several = len(report.tables) > 1
    for table in report.tables:
        for run in table.runs.values():
            interval = interval_of(run)
            rows.append(
                [
                    f"{table.label}/{run.config}" if several else run.config,
                    f"{100 * run.accuracy:.2f}%",
                    span(interval) if interval else NONE,
                    value_text(run.tokens_per_second, ".1f"),
                    value_text(run.tokens_per_forward),
                    value_text(report.forward_gain(table, run)),
                ]
            )
    return document([grid(TERMINAL_HEAD, rows, range(1, len(TERMINAL_HEAD)))]) if rows else ""
