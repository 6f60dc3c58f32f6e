"""Two settings on several sets of questions: right answers and tokens per forward of one against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fast_dllm.decoding import STEP_KINDS
from fast_dllm.record.questions import Question
from fast_dllm.report.compare import Contrast, contrast, corrected
from fast_dllm.report.folders import experiments_with_results, read_tables
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.same_results import shared_questions
from fast_dllm.report.statistics import Interval, mcnemar, tango

DRAWS = 2000  # of the bootstrap
KEPT = ("artifacts",)


@dataclass(frozen=True)
class Ratio:
    """Tokens per forward of a setting / those of another. interval: of the paired bootstrap over the questions, None
    where the forwards of single questions were not recorded."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """One setting against another on one set of questions. ratio: all forwards; step_ratio: denoising steps alone."""

    setting: str
    base: str
    task: str
    contrast: Contrast
    ratio: Ratio
    step_ratio: Ratio


def tables_of_task(root: Path, task: str, bases: Sequence[str] = KEPT) -> list[ResultTable]:
    """The kept results of every experiment on a task. bases: folders under `root` that have the experiments'."""
    names = experiments_with_results(root, bases)
    return [table for name in names for table in read_tables(root, name, task, bases) if not table.is_foreign]


def runs_of_task(root: Path, task: str, bases: Sequence[str] = KEPT) -> dict[str, RunResult]:
    """`experiment/configuration` -> its kept run."""
    return {f"{t.experiment}/{run.config}": run for t in tables_of_task(root, task, bases) for run in t.runs.values()}


def speed_ratio(run: RunResult, base: RunResult, steps_only: bool = False) -> Ratio:
    """How many times as many tokens per forward `run` has; steps_only: prefills and commits are not counted."""
    pairs = shared_questions(run, base)
    columns = [[*_costs(of_run, steps_only), *_costs(of_base, steps_only)] for of_run, of_base in pairs]
    if not pairs or any(amount is None for row in columns for amount in row):
        speeds = [_tokens_per_layer(each, steps_only) for each in (run, base)]
        return Ratio(speeds[0] / speeds[1], None)
    amounts = np.array(columns, dtype=float)  # (questions, 4)
    low, high = np.quantile(_ratio_of(_draws(len(pairs)) @ amounts), (0.025, 0.975))
    return Ratio(float(_ratio_of(amounts.sum(axis=0))), Interval(float(low), float(high)))


@lru_cache(maxsize=4)
def _draws(num_questions: int) -> np.ndarray:
    """(DRAWS, questions): how often each question is in each sample of the bootstrap. Equal for equal arguments."""
    shares = np.full(num_questions, 1 / num_questions)
    return np.random.default_rng(0).multinomial(num_questions, shares, size=DRAWS).astype(float)


def _costs(question: Question, steps_only: bool) -> tuple[float | None, float | None]:
    return question.new_tokens, question.step_layers if steps_only else question.layers


def _ratio_of(sums: np.ndarray) -> np.ndarray:
    """(..., 4) tokens and layers of a setting, tokens and layers of the other -> (...)."""
    return sums[..., 0] / sums[..., 1] * sums[..., 3] / sums[..., 2]


def _tokens_per_layer(run: RunResult, steps_only: bool) -> float:
    costs = run.summary.throughput
    counts = [count for kind, count in costs.layer_forwards.items() if not steps_only or kind in STEP_KINDS]
    return (run.new_tokens or 0) / sum(counts)


def compare(pairs: Sequence[tuple[str, str]], tasks: Mapping[str, Mapping[str, RunResult]]) -> list[Comparison]:
    """Each pair (setting, base) on each task that has both. tasks: name -> its runs. p is corrected after Holm over
    everything that is returned."""
    comparisons = []
    for setting, base in pairs:
        for task, runs in tasks.items():
            if setting in runs and base in runs:
                difference = contrast("claims", [runs[setting]], runs[base])
                if difference is not None:
                    ratios = [speed_ratio(runs[setting], runs[base], steps_only) for steps_only in (False, True)]
                    comparisons.append(Comparison(setting, base, task, difference, *ratios))
    adjusted = corrected([each.contrast for each in comparisons])
    return [replace(each, contrast=difference) for each, difference in zip(comparisons, adjusted, strict=True)]


def pooled(contrasts: Sequence[Contrast]) -> tuple[float, Interval, float]:
    """(difference, its interval, p) of paired comparisons on different questions, taken as one set."""
    improved = sum(each.improved or 0 for each in contrasts)
    regressed = sum(each.regressed or 0 for each in contrasts)
    total = sum(each.num_questions for each in contrasts)
    return (improved - regressed) / total, tango(improved, regressed, total), mcnemar(improved, regressed)


def largest_loss(difference: Contrast, num_settings: int) -> float:
    """The largest loss, as a fraction, that is not excluded at 95% over `num_settings` settings together (Bonferroni);
    negative where a gain is sure."""
    level = 1 - 0.05 / num_settings
    return -tango(difference.improved or 0, difference.regressed or 0, difference.num_questions, level).low
