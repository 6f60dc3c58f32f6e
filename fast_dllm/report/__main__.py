"""What the results say, and whether they can be believed.

    python -m fast_dllm.report                                   # every task that has results
    python -m fast_dllm.report --task gsm8k --experiment 00_baseline,04_threshold
    python -m fast_dllm.report --import ../their/artifacts       # summaries of an earlier runner, judged by themselves

Reads artifacts/ and results/, needs no GPU and no model, and writes results/report/<task>[_limit_<N>]/: report.html
(one file), report.md, report.json, the pictures as PNG and SVG. Exit status: 0; 2 after one line for bad input, with
nothing written; 3 with --fail-on alarm where there is an alarm.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from fast_dllm.errors import OneLineParser, UsageError, line_of
from fast_dllm.guard import one_line
from fast_dllm.report.folders import (
    experiments_with_results,
    read_import,
    read_tables,
    task_folders,
    task_of_folder,
)
from fast_dllm.report.results import TASK_SIZE, ResultTable, RunResult
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT
from fast_dllm.spec.tasks import ROOT, task_folder

FOLDER = Path("results") / "report"
SILENT_SECONDS = 2.0  # after these, the names of the tasks are shown as progress


def parser() -> argparse.ArgumentParser:
    options = OneLineParser(
        prog="python -m fast_dllm.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--experiment", metavar="E[,E]", help="only these experiments (default: all with results)")
    options.add_argument("--task", metavar="T", help="only this task (default: all with results)")
    options.add_argument("--limit", metavar="N", help="of runs on the first N questions; without it, of whole runs")
    options.add_argument("--against", metavar="E/CONFIG", help="compare everything with this run instead of each k = 1")
    options.add_argument("--import", metavar="DIR", dest="imported", help="read the summary.json files below DIR too")
    options.add_argument(
        "--flips", metavar="N", default="10", help="changed answers to show of each experiment (default 10)"
    )
    options.add_argument("--brief", action="store_true", help="print verdict, alarms and path, without the table")
    options.add_argument("--csv", action="store_true", help="write runs.csv and questions.csv beside the report too")
    options.add_argument("--fail-on", choices=["alarm"], help="exit status 3 where there is an alarm")
    return options


def _names(text: str, root: Path) -> list[str]:
    valid = sorted({p.name for p in (root / "experiments").glob("*/") if p.is_dir() and p.name[0] not in "._"})
    valid = sorted({*valid, *experiments_with_results(root)})
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in valid:
            raise UsageError(f"unknown experiment {name!r}; there are: {', '.join(valid) or 'none'}")
    return names


def _whole(option: str, text: str, minimum: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= minimum):
        raise UsageError(f"{option} must be a whole number of at least {minimum}, not {text!r}")
    return int(text)


def _chosen(available: list[str], task: str | None, limit: int | None) -> list[str]:
    """The task folders to report on. Raises UsageError, which lists the valid ones."""
    if task is None:
        chosen = [name for name in available if limit is None or task_of_folder(name)[1] == limit]
        if not chosen:
            valid = f"there are: {', '.join(available)}" if available else "nothing has been run"
            raise UsageError(f"no results{'' if limit is None else f' with --limit {limit}'}; {valid}")
        return chosen
    tasks = sorted({task_of_folder(name)[0] for name in available} | set(TASK_SIZE))
    if task not in tasks:
        raise UsageError(f"unknown task {task!r}; valid: {', '.join(tasks)}")
    folder = task_folder(task, limit)
    others = [name for name in available if task_of_folder(name)[0] == task]
    if folder not in available and others:
        raise UsageError(f"no results of {folder}; there are: {', '.join(others)}")
    return [folder]


def _imports(text: str | None) -> list[ResultTable]:
    if text is None:
        return []
    if not Path(text).is_dir():
        raise UsageError(f"--import: no folder {text!r}")
    tables = read_import(Path(text))
    if not tables:
        raise UsageError(f"--import: no summary.json below {text!r}")
    return tables


def _against(text: str | None, tables: list[ResultTable], root: Path, folder: str) -> RunResult | None:
    """The run that --against names, of one of the tables. Raises UsageError."""
    if text is None:
        return None
    runs = {f"{table.experiment}/{run.config}": run for table in tables for run in table.runs.values()}
    runs |= {f"{table.label}/{run.config}": run for table in tables for run in table.runs.values()}
    experiment, _, config = text.partition("/")
    if text not in runs and experiment in experiments_with_results(root):
        left_out = read_tables(root, experiment, folder)
        if any(config in table.runs for table in left_out):
            names = dict.fromkeys([*(table.experiment for table in tables if not table.is_foreign), experiment])
            raise UsageError(f"--against: --experiment leaves out {text}; add it: --experiment {','.join(names)}")
    if text not in runs:
        raise UsageError(f"--against: no result {text!r}; there are: {', '.join(sorted(runs)) or 'none'}")
    return runs[text]


def command_of(words: list[str], folder: str) -> str:
    """The command that makes the report of this task folder again, from the words of this call."""
    task, limit = task_of_folder(folder)
    other_words, skip = [], False
    for word in words:
        if skip or word.startswith(("--task=", "--limit=")):
            skip = False
            continue
        skip = word in ("--task", "--limit")
        if not skip:
            other_words.append(word)
    other_words += ["--task", task, *(["--limit", f"{limit:g}"] if limit is not None else [])]
    return shlex.join(["python", "-m", "fast_dllm.report", *other_words])


def collect(words: list[str], root: Path) -> tuple[argparse.Namespace, dict[str, list[ResultTable]]]:
    """(options, task's folder -> tables); reads everything, writes nothing. Raises UsageError."""
    options = parser().parse_args(words)
    limit = None if options.limit is None else _whole("--limit", options.limit, 1)
    options.flips = _whole("--flips", options.flips, 0)
    names = _names(options.experiment, root) if options.experiment else None
    imported = _imports(options.imported)
    # with an import alone, the results of this checkout are not asked for
    local_names = names if names is not None else [] if imported else experiments_with_results(root)
    if not local_names and not imported and options.task:
        local_names = _names(DEFAULT_EXPERIMENT, root)
    folders = set(task_folders(root, local_names))
    chosen = _chosen(sorted(folders | {task_folder(t.task, t.limit) for t in imported}), options.task, limit)
    tables = {
        folder: [
            *(table for name in local_names for table in read_tables(root, name, folder)),
            *(table for table in imported if task_folder(table.task, table.limit) == folder),
        ]
        for folder in chosen
    }
    if names is None:  # experiments that were not asked for and have nothing here need no empty table
        for folder, of_task in tables.items():
            with_results = [table for table in of_task if table.runs or table.problems]
            tables[folder] = with_results or of_task
    return options, tables


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    words = sys.argv[1:] if words is None else words
    began = time.monotonic()
    try:
        options, tables = collect(words, root)
        against = {folder: _against(options.against, of_task, root, folder) for folder, of_task in tables.items()}
    except UsageError as error:
        print(f"fast_dllm.report: error: {line_of(error)}", file=sys.stderr)
        return 2
    # SciPy and Matplotlib are loaded once the input is known to be good
    from fast_dllm.report.build import build_report
    from fast_dllm.report.write import terminal, write

    num_alarms = 0
    tables_written = ", and beside it runs.csv and questions.csv" if options.csv else ""
    for number, (folder, of_task) in enumerate(tables.items(), 1):
        if len(tables) > 1 and time.monotonic() - began > SILENT_SECONDS:
            print(f"fast_dllm.report: {folder} ({number} of {len(tables)})", file=sys.stderr, flush=True)
        task, limit = task_of_folder(folder)
        report = build_report(folder, task, limit, of_task, root, command_of(words, folder), against[folder])
        path = write(report, root / FOLDER / folder, options.flips, options.csv)
        print(terminal(report, options.brief))
        if any(report.contrasts.values()):
            place = path.with_suffix(".md").relative_to(root)
            print(f"every difference with its 95% interval: {place}, under 'Compared on the same questions'")
        print(f"wrote {path.relative_to(root)}{tables_written}\n")
        num_alarms += report.num_alarms
    return 3 if options.fail_on == "alarm" and num_alarms else 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
