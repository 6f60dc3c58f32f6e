"""Writes a Report (report.md, report.html, report.json, pictures), and makes the text for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fast_dllm.report.build import Report, run_numbers
from fast_dllm.report.compare import interval_of
from fast_dllm.report.details import details
from fast_dllm.report.drawing import png, svg
from fast_dllm.report.drift_maps import drift_maps
from fast_dllm.report.figures import draw
from fast_dllm.report.flips import Flip, count_changes, flips_of
from fast_dllm.report.page import page
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.sections import document_of, terminal_table, terminal_verdict
from fast_dllm.report.spreadsheets import FILES, spreadsheets
from fast_dllm.report.terminal import UNLIMITED, laid_out, terminal_width
from fast_dllm.report.verdict import verdict
from fast_dllm.spec.files import check_writable, write_whole

SCHEMA_VERSION = 1


def _run_facts(report: Report, table: ResultTable, run: RunResult) -> dict[str, object]:
    interval = interval_of(run)
    path = run.path
    return {
        "config": run.config,
        "summary": str(path.relative_to(report.root) if path.is_relative_to(report.root) else path),
        "num_samples": run.num_samples,
        "accuracy": run.accuracy,
        "interval": None if interval is None else [interval.low, interval.high],
        **run_numbers(report, table, run),
        "reference_tokens_per_second": report.baseline_speed(table, run),
        "model_args": dict(run.arguments),
        "facts": dict(run.facts),
        "faults": [list(fault) for fault in run.faults],
    }


def as_json(report: Report, flips: list[Flip], num_changed: Mapping[str, int]) -> dict[str, object]:
    """report.json's content."""
    tables = [
        {
            "label": table.label,
            "experiment": table.experiment,
            "imported": table.is_foreign,
            "runs": [_run_facts(report, table, run) for run in table.runs.values()],
            "left_out": dict(table.problems),
            "missing": table.missing,
            "contrasts": [asdict(c) | {"outcome": c.outcome} for c in report.contrasts.get(table.label, ())],
            "num_changed_questions": num_changed.get(table.label, 0),
        }
        for table in report.tables
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "task": report.task,
        "limit": report.limit,
        "verdict": verdict(report),
        "details": details(report),
        "num_alarms": report.num_alarms,
        "alarms": [asdict(alarm) for alarm in report.alarms],
        "tables": tables,
        "envelope": [f"{run.table}/{run.config}" for run in report.front],
        "equal_speed": [asdict(c) | {"outcome": c.outcome} for c, _ in report.equal_speed],
        "aup": [asdict(entry) for entry in report.aup_entries],
        "flips": [{key: value for key, value in asdict(flip).items() if key != "prompt"} for flip in flips],
        "command": report.command,
    }


def write(report: Report, folder: Path, most_flips: int, with_csv: bool = False) -> Path:
    """Write all files into `folder`; returns report.html's path. Old pictures and CSV files in it are removed.

    with_csv: write runs.csv and questions.csv too.
    """
    check_writable(folder)
    flips = [flip for table in report.tables for flip in flips_of(report, table, most_flips)]
    num_changed = {table.label: count_changes(report, table) for table in report.tables}
    drawn = draw(report)
    maps = drift_maps(report.root, report.task, {run.facts.get("model") for run in report.runs()})
    captions = {name: caption for pictures in (drawn, maps) for name, (_, caption) in pictures.items()}
    document = document_of(report, captions, flips, num_changed)
    images = {f"{name}.png": png(figure) for name, (figure, _) in drawn.items()}
    images |= {f"{name}.png": path.read_bytes() for name, (path, _) in maps.items()}
    vectors = {f"{name}.svg": svg(figure) for name, (figure, _) in drawn.items()}
    facts = as_json(report, flips, num_changed)
    texts = {
        "report.json": json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n",
        "report.md": document.text,
        "report.html": page(f"Report: {report.folder}", document.text, images, document.sections),
        **(spreadsheets(report) if with_csv else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg"), *map(folder.joinpath, FILES)):
        old.unlink(missing_ok=True)
    for name, content in (images | vectors).items():
        write_whole(folder / name, content)
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    return folder / "report.html"


def terminal(report: Report, brief: bool = False) -> str:
    """The verdict, the alarms and the table of numbers, as lines. brief: without the table."""
    verdict_lines = laid_out(terminal_verdict(report), terminal_width())
    # a name that is cut says nothing: the terminal itself breaks the lines of a table that is too wide
    table_lines = "" if brief else laid_out(terminal_table(report), UNLIMITED)
    return f"{verdict_lines}\n\n{table_lines}" if table_lines else verdict_lines
