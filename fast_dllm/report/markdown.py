"""The report's only renderer: it writes Markdown. page.py turns that into HTML, terminal.py into lines for a terminal.

Names and answers come from files and are data. Every function here escapes what it is given, so no text from a file
becomes markup, and the other two modules need no rule of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fast_dllm.report.flips import LONGEST, Flip, Side
from fast_dllm.spec.files import printable

MARKUP = re.compile(r"([\\`*_\[\]<>|#~!$&])")
LIST_START = re.compile(r"^(\d+(?=[.)])|(?=[-+=]))")  # at the start of a line: a list, or the line below a heading
MARK_OPEN, MARK_CLOSE = "⟦", "⟧"  # around the first token that differs in an answer
SECTION_LEVEL = 2  # of the headings that start a section; page.py folds them
FLIP_LEVEL = 4  # of the headings that start a changed answer; page.py folds them too


def escape(text: str) -> str:
    """One line in which no character starts markup or HTML, no address becomes a link, nothing moves a cursor."""
    line = printable(" ".join(str(text).split()))
    return MARKUP.sub(r"\\\1", line).replace("://", ":\\//")


def _line(text: str) -> str:
    """The escaped text as the start of a line."""
    return LIST_START.sub(r"\1\\", escape(text))


@dataclass(frozen=True)
class Section:
    """A section of the report, which a heading starts. In HTML it is folded unless `is_open`; note: HTML shows it
    beside the title."""

    title: str
    note: str = ""
    is_open: bool = False

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().split())


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {_line(text)}"


def paragraph(text: str) -> str:
    return _line(text)


def bullets(items: Iterable[str]) -> str:
    """A list; each item is one line."""
    return "\n".join(f"- {_line(item)}" for item in items)


def contents(sections: Sequence[Section]) -> str:
    """Links to the sections. The other bullet sign separates this list from one directly above it."""
    return "\n".join(f"* [{escape(section.title)}](#{section.anchor})" for section in sections)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table. numbers: the columns that are set flush right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    lines = [[escape(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, caption: str) -> str:
    """The picture in the file <name>.png."""
    return f"![{escape(caption)}]({name}.png)"


def code(text: str) -> str:
    """A code block that nothing in `text` can end."""
    text = printable(text, keep="\n\t")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def flip(change: Flip) -> list[str]:
    """A question whose answer changed: title, prompt, target, and both answers with their first difference marked."""
    also = f", also in {', '.join(change.others)}" if change.others else ""
    title = f"{change.task}, question {change.doc_id}: {change.kind} in {change.config}{also}"
    if change.before is None or change.after is None:
        text = "The texts are not on this machine (they are kept under results/ only)."
        return [heading(FLIP_LEVEL, title), paragraph(text)]
    return [
        heading(FLIP_LEVEL, title),
        code(_shortened(change.prompt)),
        paragraph(f"Target: {_shortened(change.target)}"),
        paragraph(f"{change.baseline}:"),
        code(_marked(change.before)),
        paragraph(f"{change.config}:"),
        code(_marked(change.after)),
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _marked(side: Side) -> str:
    """An answer with its first differing token in the mark's brackets; the answer's own such brackets become [ ]."""
    same, token, rest = (
        text.replace(MARK_OPEN, "[").replace(MARK_CLOSE, "]") for text in (side.same, side.token, side.rest)
    )
    return f"{same}{MARK_OPEN}{token or '(ends here)'}{MARK_CLOSE}{_shortened(rest)}"


def document(blocks: Iterable[str]) -> str:
    """The blocks as one Markdown text."""
    return "\n\n".join(blocks) + "\n"
