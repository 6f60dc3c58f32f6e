"""Conditions of alarms about code, model, task or settings that differ where they should be the same.

A difference that the matrix or a configuration's name announces is no match: a sweep of thresholds is not "mixed
thresholds". alarms.py has the rule of each condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fast_dllm.report.matches import ALL_TABLES, Match, configs_of
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.words import by_value, fact_of, short_value, values_with_names

# arguments that have a rule of their own, or that change no answer
NOT_MIXED_ARGUMENTS = (
    "reuse_k", "layer_subset", "experiment_name", "model_path", "batch_size", "dtype", "device", "show_speed",
)  # fmt: skip


def several_values(table: ResultTable, facts: tuple[str, ...]) -> Iterator[Match]:
    """A fact has several values in the table; only the first such fact is named."""
    runs = list(table.runs.values())
    for fact in facts:
        values = by_value(runs, fact_of(fact))
        if len(values) > 1:
            yield Match(configs_of(runs), {"fact": fact, "values": values_with_names(values, short_value)})
            return


def _limits(table: ResultTable) -> Mapping[object, list[RunResult]]:
    return by_value(table.runs.values(), lambda run: "none" if run.limit is None else f"{run.limit:g}")


def several_limits(table: ResultTable) -> Iterator[Match]:
    limits = _limits(table)
    if len(limits) > 1:
        yield Match(tuple(table.runs), {"values": values_with_names(limits)})


def several_question_counts(table: ResultTable) -> Iterator[Match]:
    counts = by_value(table.runs.values(), lambda run: run.num_samples)
    if len(counts) > 1 and len(_limits(table)) == 1:
        yield Match(tuple(table.runs), {"values": values_with_names(counts)})


def several_tasks(table: ResultTable) -> Iterator[Match]:
    tasks = by_value(table.runs.values(), lambda run: run.task)
    if len(tasks) > 1:
        yield Match(tuple(table.runs), {"values": values_with_names(tasks)})


def mixed_code(table: ResultTable) -> Iterator[Match]:
    """Several policies or engines by their hashes. The commit counts only where no hash is recorded.

    Engines whose transcript replay is recorded for this experiment give the same tokens and count as one.
    """
    runs = list(table.runs.values())
    policies = by_value(runs, lambda run: run.facts.get("generation_code_sha256"))
    engines = by_value(runs, lambda run: run.facts.get("decoding_sha256"))
    unhashed_policy = [run for run in runs if "generation_code_sha256" not in run.facts]
    commits = by_value(unhashed_policy, lambda run: run.facts.get("commit"))
    for what, values in (
        ("generation codes", policies),
        ("engines, not all with a recorded replay", {} if engines.keys() <= table.replayed else engines),
        ("commits", commits),
    ):
        if len(values) > 1:
            shown = values_with_names(values, lambda value: str(value)[:10])
            yield Match(configs_of(runs), {"count": len(values), "what": what, "values": shown})
            return


def _same_value(value: object, expected: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return float(value) == float(expected)
    return str(value) == str(expected)


def contradicting_names(table: ResultTable) -> Iterator[Match]:
    """A configuration ran with other arguments than its name announces."""
    for config, run in table.runs.items():
        for name, expected in table.announced(config).items():
            if name in run.arguments and not _same_value(run.arguments[name], expected):
                yield Match((config,), {"argument": name, "value": run.arguments[name], "expected": expected})


def mixed_arguments(table: ResultTable) -> Iterator[Match]:
    """An argument differs between configurations, but neither the matrix nor a name announces that."""
    values: dict[str, dict[object, list[RunResult]]] = {}
    keys = {key for run in table.runs.values() for key in run.arguments if key not in NOT_MIXED_ARGUMENTS}
    for run in table.runs.values():
        if run.config.split("+")[0] not in table.matrix.configurations and not table.is_foreign:
            continue  # `plain` and other configurations outside the matrix are not compared with it
        for key in keys - table.announced(run.config).keys():
            value = run.arguments.get(key, "rows" if key == "refresh" else None)
            if value is not None:
                values.setdefault(key, {}).setdefault(str(value), []).append(run)
    for key, runs_of in sorted(values.items()):
        if len(runs_of) > 1:
            configs = configs_of(run for runs in runs_of.values() for run in runs)
            yield Match(configs, {"argument": key, "values": values_with_names(runs_of)})


def experiments_differ(tables: list[ResultTable], facts: tuple[str, ...]) -> Iterator[Match]:
    """Experiments that share a picture differ in a fact; only the first such fact is named."""
    runs = [run for table in tables if not table.is_foreign for run in table.runs.values()]
    if len({run.table for run in runs}) < 2:
        return
    for fact in facts:
        labels: dict[object, dict[str, None]] = {}
        for run in runs:
            if run.facts.get(fact) is not None:
                labels.setdefault(str(run.facts[fact]), {})[run.table] = None
        if len(labels) > 1 and len({tuple(names) for names in labels.values()}) > 1:
            values = "; ".join(f"{short_value(value)} ({', '.join(names)})" for value, names in labels.items())
            yield Match((), {"fact": fact, "values": values}, ALL_TABLES)
            return
