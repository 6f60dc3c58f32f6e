"""Markdown as lines for a terminal, laid out by rich."""

from __future__ import annotations

import io
import shutil
import sys

from rich.console import Console
from rich.markdown import Markdown

UNLIMITED = 10_000  # columns; nothing is as long


def terminal_width() -> int:
    """The terminal's columns; UNLIMITED where the output goes to a file or a pipe, whose lines are not broken."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def laid_out(text: str, width: int) -> str:
    """The lines of a Markdown text, at most `width` columns wide, without colours and without trailing spaces."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(Markdown(text, hyperlinks=False))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")
