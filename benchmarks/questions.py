"""The questions that benchmarks ask the embedded model: those of its task, in its chat template."""

from __future__ import annotations

import importlib

from fast_dllm.network.tokenizer import load_tokenizer, render


def toy_prompts(count: int) -> list[list[int]]:
    """Token ids of the first `count` questions of toy_math's test split, in the model's chat template."""
    task, tokenizer = importlib.import_module("tasks.toy.problems"), load_tokenizer("tiny")
    questions = [task.math_prompt(problem) for problem in task.math_questions("test", count)]
    texts = [render(tokenizer, [{"role": "user", "content": question}], True) for question in questions]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
