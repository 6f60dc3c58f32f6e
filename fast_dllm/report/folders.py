"""Finds summary.json files in results/, artifacts/ and imported folders, and reads them into tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fast_dllm.record.summary import SummaryError
from fast_dllm.report.read_run import read_run
from fast_dllm.report.results import TASK_SIZE, ResultTable, RunResult
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT
from fast_dllm.spec.hashes import file_sha256, replays
from fast_dllm.spec.matrix import GENERATION_FILE, NINE, Matrix, matrix_of

BASES = ("results", "artifacts")  # of a summary that is in both, the first is read
LIMITED = re.compile(r"(.+?)_limit_([0-9.eE+-]+)")


def task_of_folder(name: str) -> tuple[str, float | None]:
    """`gsm8k_limit_10` -> ("gsm8k", 10.0)."""
    match = LIMITED.fullmatch(name)
    try:
        return (match[1], float(match[2])) if match else (name, None)
    except ValueError:
        return name, None


def _places(root: Path, experiment: str, folder: str, bases: Sequence[str]) -> dict[str, list[Path]]:
    """Configuration -> its summary.json files, in the order of the bases."""
    paths: dict[str, list[Path]] = {}
    for base in bases:
        for path in sorted((root / base / experiment / folder).glob("*/summary.json")):
            paths.setdefault(path.parent.name, []).append(path)
    return paths


def task_folders(root: Path, experiments: list[str]) -> list[str]:
    """Folder names of tasks with a summary of one of the experiments, as `gsm8k_limit_10`."""
    names = set()
    for base in BASES:
        for experiment in experiments:
            names |= {path.parent.parent.name for path in (root / base / experiment).glob("*/*/summary.json")}
    return sorted(names)


def experiments_with_results(root: Path, bases: Sequence[str] = BASES) -> list[str]:
    names = {path.parents[2].name for base in bases for path in (root / base).glob("*/*/*/summary.json")}
    return sorted(names - {"report"})


def read_tables(root: Path, experiment: str, folder: str, bases: Sequence[str] = BASES) -> list[ResultTable]:
    """The experiment's table on a task, and one of its foreign runs where there are any."""
    task, limit = task_of_folder(folder)
    runs: dict[bool, dict[str, RunResult]] = {False: {}, True: {}}
    problems: dict[str, str] = {}
    for config, paths in _places(root, experiment, folder, bases).items():
        try:
            run = read_run(paths[0], experiment, task, limit, imported=False)
        except SummaryError as error:
            problems[config] = str(error)
            continue
        if len(paths) > 1 and paths[0].read_bytes() != paths[1].read_bytes():
            note = ("copies_differ", f"{paths[0].relative_to(root)} and {paths[1].relative_to(root)} differ")
            run = replace(run, faults=(*run.faults, note))
        runs[run.is_foreign][config] = run
    code = root / "experiments" / experiment / GENERATION_FILE
    matrix = matrix_of(experiment, root)
    tables = []
    if runs[False] or problems or not runs[True]:
        table = ResultTable(
            label=experiment,
            experiment=experiment,
            task=task,
            limit=limit,
            is_foreign=False,
            matrix=matrix,
            compare_with=matrix.compare_with,
            runs=_ordered(runs[False], matrix),
            problems=problems,
            code_sha256=file_sha256(code) if code.is_file() else None,
            is_control=matrix.is_control or experiment == DEFAULT_EXPERIMENT,
            replayed=frozenset(code for code, names in replays(root).items() if experiment in names),
        )
        tables.append(table)
    if runs[True]:
        label = f"{experiment} (earlier runner)"
        moved = {config: replace(run, table=label) for config, run in runs[True].items()}
        tables.append(_foreign_table(label, experiment, task, limit, moved, matrix))
    return tables


def _foreign_table(
    label: str,
    experiment: str,
    task: str,
    limit: float | None,
    runs: Mapping[str, RunResult],
    order: Matrix,
    problems: Mapping[str, str] | None = None,
) -> ResultTable:
    """A table of imported runs, or of the lab's first runner. order: the matrix whose order its rows follow."""
    return ResultTable(
        label=label,
        experiment=experiment,
        task=task,
        limit=limit,
        is_foreign=True,
        matrix=_spanned(runs),
        compare_with=None,
        runs=_ordered(runs, order),
        problems=problems or {},
    )


def _ordered(runs: Mapping[str, RunResult], matrix: Matrix) -> dict[str, RunResult]:
    """In the matrix's order; variants (`k2_last+threshold=0.8`) behind their configuration, others at the end."""
    names = list(matrix.configurations)

    def place(config: str) -> tuple[int, str]:
        name = config.split("+")[0]
        return (names.index(name) if name in names else len(names), config)

    return {config: runs[config] for config in sorted(runs, key=place)}


def _spanned(runs: Mapping[str, RunResult]) -> Matrix:
    """The matrix of imported runs: the nine configurations if one has such a name, else the imported ones alone."""
    if any(config in NINE.configurations for config in runs):
        return NINE
    configurations = {config: dict(run.arguments) for config, run in runs.items()}
    return Matrix(configurations, compare_with="")  # which one the others are compared with is not known


def read_import(folder: Path) -> list[ResultTable]:
    """Tables of all summary.json below `folder`: one for each folder of configurations."""
    paths_of: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("summary.json")):
        paths_of.setdefault(path.parent.parent, []).append(path)
    tables = {parent: _imported_table(folder, parent, paths) for parent, paths in paths_of.items()}
    keys = [(table.label, table.task, table.limit) for table in tables.values()]
    for parent, table in tables.items():
        if keys.count((table.label, table.task, table.limit)) > 1:
            label = f"{parent.relative_to(folder)} (imported)"
            runs = {config: replace(run, table=label, experiment=label) for config, run in table.runs.items()}
            tables[parent] = replace(table, label=label, runs=runs)
    return list(tables.values())


def _import_label(folder: Path, parent: Path, tasks: set[str]) -> str:
    """The table's folder below `folder`, without a last part that only repeats the task."""
    parts = list(parent.resolve().relative_to(folder.resolve()).parts)
    if task_of_folder(parent.name)[0] in tasks:
        parts = parts[:-1] if parts else [folder.resolve().parent.name]
    return "/".join(parts or [folder.resolve().name]) + " (imported)"


def _imported_table(folder: Path, parent: Path, paths: list[Path]) -> ResultTable:
    task, limit = task_of_folder(parent.name)
    label = _import_label(folder, parent, {task} if task in TASK_SIZE else set())
    runs, problems = {}, {}
    for path in paths:
        try:
            runs[path.parent.name] = read_run(path, label, task, limit, imported=True)
        except SummaryError as error:
            problems[path.parent.name] = str(error)
    places = {(run.task, run.limit) for run in runs.values()}
    if len(places) == 1:
        task, limit = places.pop()
    experiments = {str(run.arguments.get("experiment_name") or "") for run in runs.values()}
    experiment = experiments.pop() if len(experiments) == 1 else ""
    return _foreign_table(label, experiment, task, limit, runs, NINE, problems)
