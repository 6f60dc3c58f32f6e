"""Accuracies out of lm_eval's results. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from fast_dllm.spec.tasks import task_of

# The number called "accuracy" of a task that tasks/tasks.json does not describe: the first of these that it reports.
FALLBACK_METRICS = (
    "acc,none",
    "exact_match,none",
    "exact_match,flexible-extract",
    "pass@1,create_test",  # humaneval
    "pass_at_1,none",  # mbpp
)


@dataclass(frozen=True)
class Score:
    """The accuracy of one task or group: a fraction, its standard error, the metric's name, the questions scored."""

    accuracy: float | None
    stderr: float | None
    metric: str
    num_samples: int


def score(results: Mapping[str, Mapping], name: str, num_samples: int) -> Score | None:
    """The primary metric of `name` in lm_eval's results or groups; None where it reports no number."""
    reported = {key: value for key, value in results[name].items() if "," in key and not isinstance(value, str)}
    described = task_of(name)
    preferred = [described.metric] if described else []
    numbers = [key for key in reported if "_stderr," not in key]
    for metric in (*preferred, *FALLBACK_METRICS, *numbers):
        if metric in reported:
            stderr = results[name].get(metric.replace(",", "_stderr,", 1))
            return Score(
                float(reported[metric]),
                None if isinstance(stderr, (str, type(None))) else float(stderr),
                metric,
                num_samples,
            )
    return None


def scores(lm_eval_results: Mapping, samples_scored: Mapping[str, int]) -> dict[str, Score]:
    """Scores of every task and group. `samples_scored`: task name -> number of questions that have a metric."""
    subtasks = lm_eval_results.get("group_subtasks", {})

    def leaves(name: str) -> set[str]:
        return set().union(*(leaves(child) for child in subtasks[name])) if subtasks.get(name) else {name}

    by_name = {}
    for table in ("results", "groups"):
        for name in lm_eval_results.get(table, {}):
            count = sum(samples_scored.get(leaf, 0) for leaf in leaves(name))
            value = score(lm_eval_results[table], name, count)
            if value is not None:
                by_name[name] = value
    return by_name
