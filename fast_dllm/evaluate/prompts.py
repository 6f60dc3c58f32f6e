"""What happens to a task's text before and after the model: pure functions on strings."""

from __future__ import annotations

from collections.abc import Iterable

from fast_dllm.spec.tasks import task_of


def rewrite_prompt(prompt: str, task_name: str | None) -> str:
    """The prompt as the published scores saw it: some tasks' answer cue becomes an instruction to reason.

    Which, stands in tasks/tasks.json; the doubled braces there are what the published scores were measured with.
    """
    task = task_of(task_name)
    return prompt.replace(*task.rewrite) if task and task.rewrite else prompt


def cut_at_stop_strings(text: str, until: Iterable[str]) -> str:
    """The text before the earliest of the `until` strings (empty ones are ignored)."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
