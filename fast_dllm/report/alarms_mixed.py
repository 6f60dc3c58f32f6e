"""Alarms about what must be one in one table: code, model, dtype, task, limit, arguments that no name announces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fast_dllm.report.alarms import NOTE, Alarm, by_value, fact_of, told
from fast_dllm.report.matrix import expected_arguments
from fast_dllm.report.summaries import Run, Table

# arguments with an alarm of their own, or that change no answer
ELSEWHERE = ("reuse_k", "layer_subset", "experiment_name", "model_path", "batch_size", "dtype", "device", "show_speed")
ONE_OF = (
    ("mixed_model", "accuracy", "models", ("model", "model_revision")),
    ("mixed_dtype", "accuracy", "dtypes", ("dtype",)),
    ("mixed_device", "accuracy", "devices", ("device",)),
    ("mixed_seeds", "accuracy", "seeds", ("seeds",)),
    ("mixed_task_version", "accuracy", "versions of the task", ("task_version", "prompts", "metric")),
    (
        "mixed_prompting",
        "accuracy",
        "ways to prompt",
        ("num_fewshot", "chat_template", "fewshot_as_multiturn", "system_instruction"),
    ),
    ("mixed_generation", "accuracy", "generation settings", ("gen_kwargs",)),
    ("mixed_samples", "accuracy", "choices of questions", ("samples",)),
)


def replays(root: Path) -> Mapping[str, list[str]]:
    """Decoding hash -> experiments whose transcript it was seen to reproduce (experiments/replays.json)."""
    try:
        content = json.loads((root / "experiments" / "replays.json").read_text())
        return {str(key): list(names) for key, names in content["replayed"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 or "/" in text or " " in text else f"{text[:10]}…"


def mixed_alarms(table: Table, recorded: Mapping[str, list[str]]) -> list[Alarm]:
    runs = list(table.runs.values())
    names = tuple(run.config for run in runs)
    found = mixed_code(table, recorded) + contradicting_names(table) + mixed_arguments(table)
    limits = by_value(runs, lambda run: "none" if run.limit is None else f"{run.limit:g}")
    if len(limits) > 1:
        found.append(
            Alarm("mixed_limit", table.label, names, "accuracy", f"different limits in one table: {told(limits)}")
        )
    counts = by_value(runs, lambda run: run.num_samples)
    if len(counts) > 1 and len(limits) == 1:
        text = f"different numbers of questions in one table: {told(counts)}"
        found.append(Alarm("mixed_questions", table.label, names, "accuracy", text))
    tasks = by_value(runs, lambda run: run.task)
    if len(tasks) > 1:
        found.append(
            Alarm("mixed_task", table.label, names, "accuracy", f"different tasks in one table: {told(tasks)}")
        )
    for kind, spoils, what, facts in ONE_OF:
        for fact in facts:
            values = by_value(runs, fact_of(fact))
            if len(values) > 1:
                text = f"different {what} in one table ({fact}): {told(values, _short)}"
                found.append(Alarm(kind, table.label, names, spoils, text))
                break
    for fact in ("torch", "lm_eval"):
        values = by_value(runs, fact_of(fact))
        if len(values) > 1:
            text = f"different versions of {fact}: {told(values)}"
            found.append(Alarm("mixed_versions", table.label, names, "provenance", text, NOTE))
    return found


def mixed_code(table: Table, recorded: Mapping[str, list[str]]) -> list[Alarm]:
    """Policy and engine by their hashes; the commit only where there is no hash."""
    runs = list(table.runs.values())
    names = tuple(run.config for run in runs)

    def alarm(what: str, values: Mapping[object, list[Run]]) -> list[Alarm]:
        text = f"mixed code in one table, {len(values)} {what}: {told(values, lambda v: str(v)[:10])}"
        return [Alarm("mixed_code", table.label, names, "accuracy", text)]

    policies = by_value(runs, lambda run: run.facts.get("generation_code_sha256"))
    if len(policies) > 1:
        return alarm("generation codes", policies)
    engines = by_value(runs, lambda run: run.facts.get("decoding_sha256"))
    unproven = [value for value in engines if table.experiment not in recorded.get(str(value), [])]
    if len(engines) > 1 and unproven:
        return alarm("engines, not all with a recorded replay", engines)
    packages = by_value(
        (run for run in runs if "decoding_sha256" not in run.facts), lambda run: run.facts.get("fast_dllm_sha256")
    )
    if len(packages) > 1:
        return alarm("versions of fast_dllm/", packages)
    commits = by_value(
        (run for run in runs if "generation_code_sha256" not in run.facts), lambda run: run.facts.get("commit")
    )
    return alarm("commits", commits) if len(commits) > 1 else []


def _same(value: object, expected: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return float(value) == float(expected)
    return str(value) == str(expected)


def contradicting_names(table: Table) -> list[Alarm]:
    """A configuration whose arguments are not those that its name promises."""
    found = []
    for config, run in table.runs.items():
        for name, expected in expected_arguments(table.matrix, config).items():
            if name in run.arguments and not _same(run.arguments[name], expected):
                text = f"{config} ran with {name} = {run.arguments[name]}, its name says {expected}"
                found.append(Alarm("name_contradicts", table.label, (config,), "accuracy", text))
    return found


def mixed_arguments(table: Table) -> list[Alarm]:
    """An argument that differs between configurations, though neither the matrix nor a name says that it should."""
    values: dict[str, dict[object, list[Run]]] = {}
    keys = {key for run in table.runs.values() for key in run.arguments if key not in ELSEWHERE}
    for run in table.runs.values():
        announced = expected_arguments(table.matrix, run.config)
        if run.config.split("+")[0] not in table.matrix.configurations and not table.is_foreign:
            continue  # `plain` and others outside the matrix stand for themselves
        for key in keys - announced.keys():
            value = run.arguments.get(key, "rows" if key == "refresh" else None)
            if value is not None:
                values.setdefault(key, {}).setdefault(str(value), []).append(run)
    found = []
    for key, kinds in sorted(values.items()):
        if len(kinds) > 1:
            names = tuple(run.config for runs in kinds.values() for run in runs)
            text = f"mixed {key} in one table: {told(kinds)}"
            found.append(Alarm("mixed_arguments", table.label, names, "accuracy", text))
    return found


def across_tables(tables: list[Table]) -> list[Alarm]:
    """Experiments that one picture shows must share model, dtype and task; speeds are drawn for one GPU at a time."""
    runs = [run for table in tables if not table.is_foreign for run in table.runs.values()]
    if len({run.table for run in runs}) < 2:
        return []
    found = []
    for kind, spoils, what, facts in ONE_OF:
        if kind == "mixed_seeds":
            continue
        for fact in facts:
            values: dict[object, list[str]] = {}
            for run in runs:
                if run.facts.get(fact) is not None:
                    tables_of = values.setdefault(str(run.facts[fact]), [])
                    tables_of += [run.table] if run.table not in tables_of else []
            if len(values) > 1 and len({tuple(names) for names in values.values()}) > 1:
                text = f"the experiments differ in {what} ({fact}): " + "; ".join(
                    f"{_short(value)} ({', '.join(names)})" for value, names in values.items()
                )
                found.append(Alarm(kind, "all experiments", (), spoils, text))
                break
    return found
