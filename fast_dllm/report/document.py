"""What a report is made of, before it is Markdown, HTML or text: blocks of plain strings, escaped by each renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fast_dllm.report.flips import Flip


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


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


Block = Heading | Paragraph | Items | Grid | Picture | Code | Change
