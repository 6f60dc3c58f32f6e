"""Compares two answers to one prompt: what each cost, and the first token in which they differ."""

from __future__ import annotations

import html

from fast_dllm.ui.chat import AnswerFrame

# The comparisons that the page offers: name -> (changed settings of A, changed settings of B).
PAIRS = {
    "k = 1 against k = 3, middle layers reused": (
        "experiment_name=02_residual_reuse,reuse_k=1,threshold=0.9",
        "experiment_name=02_residual_reuse,reuse_k=3,layer_subset=middle,threshold=0.9",
    ),
    "k = 1 against k = 3, last logits read again": (
        "experiment_name=00_baseline,reuse_k=1,threshold=0.9",
        "experiment_name=00_baseline,reuse_k=3,layer_subset=middle,threshold=0.9",
    ),
    # The embedded model nearly always gives the same tokens here, at a different cost.
    "threshold 1 against 0.9": ("threshold=1", "threshold=0.9"),
}
ONE_RUN = "Time and tokens/s are of one run, not a measurement: other work on this machine changes them."
# With this prompt the answers of the pairs with k = 3 differ on the embedded model.
PROMPT = "Ivan fills 5 baskets with 5 lemons each. He makes 15 more. How many lemons does he have?"


def first_difference(first: AnswerFrame, second: AnswerFrame) -> int | None:
    """The first position where the two answers have different tokens or only one has ended; None if there is none."""
    for a, b in zip(first.cells, second.cells, strict=False):
        if a.token is not None and b.token is not None and a.token != b.token:
            return a.position
    shorter, longer = sorted((first, second), key=lambda frame: len(frame.cells))
    if shorter.done and longer.done and len(shorter.cells) < len(longer.cells):
        return longer.cells[len(shorter.cells)].position
    return None


def comparison_html(first: AnswerFrame, second: AnswerFrame | None) -> str:
    """HTML: a table of what each answer cost, and a sentence about the first token that differs."""
    rows = []
    for side, frame in zip("AB", (first, second), strict=True):
        if frame is not None:
            values = (
                f"{frame.num_tokens}",
                f"{frame.steps}",
                f"{frame.num_forwards}",
                f"{frame.layer_forwards:,.0f}",
                f"{frame.model_seconds:.2f} s",
                f"{frame.tokens_per_second:.1f}",
            )
            rows.append(f"<tr><th>{side}</th>{''.join(f'<td>{each}</td>' for each in values)}</tr>")
    names = ("", "tokens", "steps", "forwards", "layer-forwards", "time", "tokens/s")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f"<table class='both'><tr>{head}</tr>{''.join(rows)}</table>"
    return f"{table}<div class='stats'>{ONE_RUN}</div>{_difference_html(first, second)}"


def _difference_html(first: AnswerFrame, second: AnswerFrame | None) -> str:
    """HTML: the first token that differs, or that all are the same; empty while that is not known."""
    if second is None:
        return ""
    position = first_difference(first, second)
    if position is None:
        if first.done and second.done:
            return f"<div class='stats part'>All {len(first.cells)} tokens are the same.</div>"
        return ""
    number = position - first.cells[0].position
    shown = (
        f"“{html.escape(frame.cells[number].text or '∅')}”" if number < len(frame.cells) else "the end"
        for frame in (first, second)
    )
    return f"<div class='stats part'>Token {number + 1} is the first that differs: {' against '.join(shown)}.</div>"
