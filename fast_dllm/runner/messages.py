"""What the scripts say while they work: lines on stderr, and words of a command quoted for a shell."""

from __future__ import annotations

import shlex
import sys
from typing import Iterable


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quoted(words: Iterable[str]) -> str:
    return " ".join(map(shlex.quote, words))
