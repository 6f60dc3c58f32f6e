"""Scores programs that a model wrote, in a sandbox: what lm_eval's humaneval and mbpp get for the hub's `code_eval`.

lm_eval's tasks ask `evaluate.load("code_eval")` for their scorer. That program of the hub executes each answer in a
child of the evaluation, with the user's rights. `use_sandbox` gives them a `CodeScorer`, which executes the same
programs under the same rules in a sandbox (sandbox.py), and needs no hub.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import evaluate

from fast_dllm.evaluate.sandbox import find_sandbox

METRIC = "code_eval"


class CodeScorer:
    """Has the one method of evaluate's metrics that lm_eval calls."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[str]]]:
        """({"pass@1": the estimate, ...}, {number of the question: a verdict for each program}).

        references: the tests of each question. predictions: its programs. k: those above a question's number of
        programs are left out.
        """
        sandbox = find_sandbox()
        verdicts = {
            number: [sandbox.verdict(f"{program}\n{tests}") for program in programs]
            for number, (programs, tests) in enumerate(zip(predictions, references, strict=True))
        }
        counts = [(len(each), each.count("passed")) for each in verdicts.values()]
        rates = {
            f"pass@{size}": math.fsum(pass_at_k(total, passed, size) for total, passed in counts) / len(counts)
            for size in k
            if counts and all(total >= size for total, _ in counts)
        }
        return rates, verdicts


def pass_at_k(total: int, passed: int, k: int) -> float:
    """The chance that one of k programs passes, drawn from `total` of which `passed` do (arXiv 2107.03374, 2.1)."""
    return 1.0 - math.comb(total - passed, k) / math.comb(total, k)


def use_sandbox() -> None:
    """From now on `evaluate.load("code_eval")` gives a CodeScorer."""
    load = evaluate.load
    if getattr(load, "gives_the_sandbox", False):
        return

    @functools.wraps(load)
    def load_other(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeScorer() if path == METRIC else load(path, *arguments, **options)

    load_other.gives_the_sandbox = True  # type: ignore[attr-defined]
    evaluate.load = load_other
