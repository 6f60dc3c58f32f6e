"""Checks options against the loaded tasks, before the model is loaded. Each fault is an error of one line.

lm_eval notices some of these faults in the middle of an evaluation, and others never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import Task

from fast_dllm.errors import UsageError
from fast_dllm.evaluate.generation import generation_settings

Tasks = Mapping[str, Task]


def check_examples(tasks: Tasks, num_fewshot: int) -> None:
    """Raise UsageError where a task has fewer examples than `num_fewshot` to put before a question."""
    for name, task in tasks.items():
        if task.get_config("num_fewshot") == 0:
            continue  # lm_eval ignores the option for such a task
        sampler = getattr(task, "sampler", None)
        num_examples = len(sampler.fewshot_docs()) if sampler else 0
        if num_examples and task.fewshot_cfg.split == task.config.test_split:
            num_examples -= 1  # the question itself is no example
        if num_fewshot > num_examples:
            raise UsageError(f"--num_fewshot {num_fewshot} is more examples than {name} has, which are {num_examples}")


def check_samples(tasks: Tasks, samples: object) -> dict[str, list[int]]:
    """Return `--samples` with each task's question numbers in ascending order.

    In another order lm_eval would label the questions with wrong numbers. Raises UsageError unless every task has some
    of its questions named, each once.
    """
    form = 'a JSON object of question numbers, from 0, for each task, such as {"toy_math": [0, 2]}'
    if not isinstance(samples, dict):
        raise UsageError(f"--samples must be {form}, or a file with one")
    for name in samples:
        if name not in tasks:
            raise UsageError(f"--samples names {name!r}, which is none of this run's tasks: {', '.join(tasks)}")
    for name, task in tasks.items():
        numbers = samples.get(name)
        if not isinstance(numbers, list) or not numbers:
            raise UsageError(f"--samples gives no questions of {name}; it must be {form}")
        num_questions = len(task.eval_docs)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < num_questions:
                raise UsageError(f"--samples: {name} has the questions 0 to {num_questions - 1}, not {number!r}")
        if len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise UsageError(f"--samples names question {twice} of {name} twice")
    return {name: sorted(numbers) for name, numbers in samples.items()}


def check_processes(
    tasks: Tasks, num_processes: int, limit: float | None, samples: Mapping[str, list[int]] | None
) -> None:
    """Raise UsageError if a task has fewer questions than there are processes.

    lm_eval gives each process questions of every task.
    """
    for name, task in tasks.items():
        num_questions = len(samples[name]) if samples else len(task.eval_docs)
        if limit is not None:
            num_questions = min(num_questions, math.ceil(num_questions * limit) if limit < 1 else int(limit))
        if num_processes > num_questions:
            raise UsageError(
                f"{num_processes} processes for {num_questions} question{'s' * (num_questions != 1)} of {name}; each "
                f"needs at least one: start {num_questions or 1}"
            )


def check_generation(tasks: Tasks, changes: Mapping[str, Any], default_max_tokens: int) -> None:
    """Raise UsageError for invalid generation settings of a task. changes: those of --gen_kwargs."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            generation_settings({**(task.config.generation_kwargs or {}), **changes}, default_max_tokens, name)
