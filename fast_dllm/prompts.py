"""What happens to a task's text before and after the model: pure functions on strings."""

from __future__ import annotations

from collections.abc import Iterable

BOXED = r"Please reason step by step, and put your final answer within \boxed{{}}."
# Task name prefix -> (what the rendered prompt says, what it says instead). The doubled braces are what the published
# scores were measured with.
PROMPT_REWRITES = {
    "gsm8k": ("Answer:", BOXED),
    "toy_math": ("Answer:", BOXED),
    "minerva_math": ("Solution:", BOXED),
}


def rewrite_prompt(prompt: str, task_name: str | None) -> str:
    """The prompt as the published scores saw it: some tasks' answer cue becomes an instruction to reason."""
    for prefix, (cue, instruction) in PROMPT_REWRITES.items():
        if (task_name or "").startswith(prefix):
            return prompt.replace(cue, instruction)
    return prompt


def cut_at_stop_strings(text: str, until: Iterable[str]) -> str:
    """The text before the earliest of the `until` strings (empty ones are ignored)."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
