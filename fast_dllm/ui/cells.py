"""An answer's tokens as HTML. Every text is escaped: what the model or a visitor wrote is shown, never run."""

from __future__ import annotations

import html
import traceback

from fast_dllm.decoding import STEP_KINDS
from fast_dllm.errors import UsageError
from fast_dllm.ui.chat import AnswerFrame, Cell

EMPTY = "<div class='cells'>{heading}<div class='stats'>The tokens of the next answer appear here.</div></div>"


def confidence_colour(confidence: float) -> str:
    """A CSS colour from red (confidence 0) to green (confidence 1). A confident token may still be wrong."""
    return f"hsl({int(120 * confidence)} 75% 78%)"


LEGEND = f"""<details class='legend' open><summary>What the picture says</summary>
<span><i class='blk'></i> a block begins</span> <span><i class='sub'></i> a sub-block begins</span>
<span><i class='c m'>▒</i> masked</span> <span><i class='c m on'>▒</i> masked, in the sub-block at work</span>
<span>{"".join(f"<i class='c' style='background:{confidence_colour(each)}'>{each:.0%}</i>" for each in (0.2, 0.6, 1))}
how sure the model was, not whether it is right (point at a token, or tap it)</span>
<span><i class='c new' style='background:{confidence_colour(1)}'>7</i> just unmasked</span>
<span><i class='c'>⏎</i> a line break</span> <span><i class='c'>∅</i> no text: an end mark</span></details>"""


def cells_html(frame: AnswerFrame | None, title: str = "", stopped: bool = False, differs: int | None = None) -> str:
    """A frame as HTML. stopped: whether the visitor stopped the answer there. differs: a position to mark."""
    heading = f"<b>{html.escape(title)}</b>" if title else ""
    if frame is None:
        return EMPTY.format(heading=heading)
    parts: list[str] = []
    in_number = False
    for index, cell in enumerate(frame.cells):
        text = cell.text or ""
        goes_on = in_number and text.isdigit()
        if in_number and not goes_on:
            parts.append("</span>")
        if not goes_on and (in_number := text.strip().isdigit()):
            parts.append("<span class='num'>")  # the digits of a number stay on one line, without gaps
        if index == 0 or cell.position % frame.block_size == 0:
            parts.append("<span class='blk'></span>")
        elif cell.position % frame.small_block_size == 0:
            parts.append("<span class='sub'></span>")
        first = not any("data-sure" in part for part in parts)
        parts.append(_cell_html(frame, cell, cell.position == differs, first) + "<br>" * text.count("\n"))
    parts.append("</span>" * in_number)
    state, statistics = "cells", f"{frame.counts()}; {frame.kinds()}"
    if frame.done:
        state = "cells done"
    elif stopped:
        state, statistics = "cells stopped", f"stopped · {statistics}"
    return (
        f"<div class='{state}'>{heading}<div>{''.join(parts)}</div>"
        f"<div class='stats'>{statistics}<br>{times(frame)}</div></div>"
    )


def _cell_html(frame: AnswerFrame, cell: Cell, differs: bool, is_first: bool) -> str:
    if cell.text is None:
        working = not frame.done and frame.kind in STEP_KINDS and cell.position in range(*frame.sub_block)
        return f"<span class='c m{' on' * working}'>▒</span>"
    shown = html.escape(cell.text.replace("\n", "⏎")) or "∅"
    classes = f"c{' new' * frame.is_new(cell)}{' diff' * differs}"
    # With a tab index, a tap focuses the token. The Tab key reaches only the first token; from there the arrow keys go
    # to the others (style.WALK_TOKENS).
    return (
        f"<span class='{classes}' tabindex='{0 if is_first else -1}' "
        f"style='background:{confidence_colour(cell.confidence)}' data-sure='{cell.confidence:.1%} sure'>{shown}</span>"
    )


def times(frame: AnswerFrame) -> str:
    """Tokens/s by the model's time, and by the time that the visitor waited."""
    per_second = frame.num_tokens / frame.seconds if frame.seconds else 0.0
    return (
        f"{frame.tokens_per_second:.1f} tokens/s in the model's time ({frame.model_seconds:.2f} s), "
        f"{per_second:.1f} with the page's ({frame.seconds:.2f} s)"
    )


def error_html(error: Exception) -> str:
    """An error as HTML. If it is not the visitor's fault, its traceback is printed to the server's log."""
    if not isinstance(error, UsageError):
        traceback.print_exception(error)
    return f"<div class='err note' role='alert'>{html.escape(str(error) or type(error).__name__)}</div>"
