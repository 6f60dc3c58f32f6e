"""The blocks of a report, before they are Markdown or HTML. They hold plain strings; each renderer escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fast_dllm.report.flips import Flip


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Section:
    """Starts a section: a heading of level 2. In HTML it is folded unless `is_open`; note stands behind the title."""

    title: str
    note: str = ""
    is_open: bool = False

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Contents:
    """A table of contents: links to the sections."""

    sections: Sequence[Section]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    """kind: verdict, alarm, note or plain; each item is one line."""

    kind: str
    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table. numbers: the columns that are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """name: of the files <name>.png and <name>.svg; text: what it shows, for those who do not see it."""

    name: str
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Change:
    """A question whose answer changed."""

    flip: Flip


Block = Heading | Section | Contents | Paragraph | Items | Grid | Picture | Code | Change
