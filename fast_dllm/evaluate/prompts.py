"""Rewrites a task's prompt before the model reads it, and cuts the answer: pure functions on strings."""

from __future__ import annotations

from collections.abc import Iterable

from fast_dllm.spec.tasks import task_of


def rewrite_prompt(prompt: str, task_name: str | None) -> str:
    """Rewrite a task's prompt as for the published scores: an answer cue becomes an instruction to reason.

    tasks/tasks.json has the rewrites. The doubled braces in them are as in the published measurement.
    """
    task = task_of(task_name)
    return prompt.replace(*task.rewrite) if task and task.rewrite else prompt


def cut_at_stop_strings(text: str, until: Iterable[str]) -> str:
    """The text before the earliest of the `until` strings (empty ones are ignored)."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
