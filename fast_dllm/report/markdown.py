"""Blocks as Markdown, and as the lines of a terminal. Names and answers are data: nothing in them is markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fast_dllm.report.document import Block, Change, Code, Contents, Grid, Heading, Items, Paragraph, Picture, Section
from fast_dllm.report.flips import LONGEST, Flip, Side

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~!$&])")
OPEN, CLOSE = "⟦", "⟧"  # around the first differing token


def escape(text: str) -> str:
    """One line in which no character starts markup or HTML; an address becomes no link."""
    line = " ".join(str(text).split())
    return SPECIAL.sub(r"\\\1", line).replace("://", ":\\//")


def fence(text: str) -> str:
    """A code block that nothing in `text` can end."""
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    ticks = max(ticks, "```", key=len)
    return f"{ticks}text\n{text}\n{ticks}"


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def marked(side: Side) -> str:
    return shortened(f"{side.same}{OPEN}{side.token}{CLOSE}{side.rest}")


def _grid(grid: Grid) -> str:
    rule = ["---:" if column in grid.numbers else "---" for column in range(len(grid.head))]
    rows = [[escape(cell) for cell in row] for row in (grid.head, *grid.rows)]
    rows.insert(1, rule)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def flip_title(flip: Flip) -> str:
    also = f", also in {', '.join(flip.others)}" if flip.others else ""
    return f"{flip.task}, question {flip.doc_id}: {flip.kind} in {flip.config}{also}"


def _flip(flip: Flip) -> str:
    parts = [f"**{escape(flip_title(flip))}**"]
    if flip.before is None or flip.after is None:
        return f"{parts[0]}\n\nThe texts are not on this machine (they are kept under results/ only)."
    parts.append(fence(shortened(flip.prompt)))
    parts.append(f"Target: {escape(shortened(flip.target))}")
    parts.append(f"{escape(flip.baseline)}:\n\n{fence(marked(flip.before))}")
    parts.append(f"{escape(flip.config)}:\n\n{fence(marked(flip.after))}")
    return "\n\n".join(parts)


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Section(title, note):
            return f"## {escape(title)}" + (f"\n\n{escape(note)}" if note else "")
        case Contents(sections):
            return "\n".join(f"- [{escape(s.title)}](#{s.anchor})" for s in sections)
        case Paragraph(text):
            return escape(text)
        case Items(_, items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Grid():
            return _grid(block)
        case Picture(name, text):
            return f"![{escape(text)}]({name}.png)"
        case Code(text):
            return fence(text)
        case Change(flip):
            return _flip(flip)


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def visible(text: str) -> str:
    """For a terminal: control characters, which could move its cursor or colour it, are shown as what they are."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; numbers flush right."""
    cells = [[visible(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, cells[1:])])
