"""Files that other processes read at any moment: read strictly, written whole, never thrown away."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Callable

from fast_dllm.errors import line_of


def read_json(path: Path) -> tuple[dict | None, str]:
    """(the object in a JSON file, "") or (None, why it is not one); (None, "") where there is no file."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, UnicodeDecodeError) as error:
        return None, line_of(error)
    if not text.strip():
        return None, "it is empty"
    try:
        content = json.loads(text, parse_constant=_no_number, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        end = len(text.rstrip())
        if error.pos >= end or error.msg.startswith("Unterminated string"):
            return None, "it ends in the middle"
        return None, f"unexpected {text[error.pos : error.pos + 1]!r} in line {error.lineno}"
    except (ValueError, RecursionError) as error:
        return None, str(error)
    if not isinstance(content, dict):
        return None, f"unexpected {text.strip()[:1]}"
    return content, ""


def _no_number(constant: str) -> object:
    raise ValueError(f"unexpected {constant[:1]}")


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} stands twice")
    return found


def as_object(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def is_same(path: Path, other: Path) -> bool:
    """Both are there and hold the same."""
    return path.is_file() and other.is_file() and path.read_bytes() == other.read_bytes()


def copy_whole(source: Path, target: Path) -> None:
    """As write_whole; what holds the same already is left alone."""
    if not is_same(source, target):
        write_whole(target, source.read_bytes())


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by a file with this content: whole or not at all, and on the disk before this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        if new.exists():
            new.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the file's name must survive too
    finally:
        os.close(folder)


def write_json(path: Path, content: dict, default: Callable[[object], object] | None = None) -> None:
    text = json.dumps(content, indent=2, default=default, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "replace"))


def is_newer(path: Path, other: Path) -> bool:
    """Whether both are there and `path` was written later."""
    try:
        return path.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


def set_aside(path: Path, word: str) -> None:
    """Keep a file beside: summary.json becomes summary.<word>.json, or summary.<word>.2.json where that is taken."""
    path, number = Path(path), 1
    if not path.is_file():
        return
    while True:
        kept = path.with_name(f"{path.stem}.{word}{'' if number == 1 else f'.{number}'}{path.suffix}")
        if not kept.exists():
            path.replace(kept)
            return
        number += 1


def remove(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            path.unlink()
