"""Reads JSON files with strict bounds, and writes files in one step, since other processes may read them meanwhile."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Callable

from fast_dllm.errors import UsageError, line_of

MOST_BYTES = 16 * 2**20  # of a JSON file that these programs write for each other
MOST_DEPTH = 32
MOST_DIGITS = 40  # of a whole number
MOST_NAME = 255  # bytes of a file's name
TOO_DEEP = f"it is nested deeper than {MOST_DEPTH} levels"


def read_json(path: Path, most_bytes: int = MOST_BYTES, finite: bool = True) -> tuple[dict | None, str]:
    """(the object in a JSON file, "") or (None, why it is not one); (None, "") where there is no file.

    The file's size, its depth and its numbers are bounded; see `parse_json`.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as error:
        return None, printable(line_of(error))
    if len(data) > most_bytes:
        return None, f"it has more than {most_bytes} bytes"
    try:
        return parse_json(data, finite), ""
    except ValueError as error:
        return None, str(error)


def parse_json(data: bytes, finite: bool = True) -> dict:
    """The object that is written in UTF-8 JSON. Raises ValueError, one printable line, where it is none, where a key
    repeats, where it is nested deeper than MOST_DEPTH, for a whole number of more than MOST_DIGITS digits, for half a
    surrogate pair, and with `finite` for a number that is not finite."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(line_of(error)) from None
    if not text.strip():
        raise ValueError("it is empty")
    try:
        content = (_FINITE if finite else _ANY_NUMBER).decode(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise ValueError("it ends in the middle") from None
        raise ValueError(f"unexpected {text[error.pos : error.pos + 1]!r} in line {error.lineno}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not isinstance(content, dict):
        raise ValueError(f"unexpected {text.strip()[:1]}")
    _check_depth_and_texts(content)
    return content


def _no_constant(constant: str) -> object:
    raise ValueError(f"unexpected {constant[:1]}")


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {printable(twice)} stands twice")
    return content


_FINITE = json.JSONDecoder(
    parse_constant=_no_constant,
    parse_int=_whole_number,
    parse_float=_finite_number,
    object_pairs_hook=_no_key_twice,
)
_ANY_NUMBER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_no_key_twice)


def _check_depth_and_texts(content: object) -> None:
    """Raises ValueError. Without recursion, so that it can be given anything that the parser can read."""
    to_check = [(content, 1)]
    while to_check:
        value, depth = to_check.pop()
        if depth > MOST_DEPTH:
            raise ValueError(TOO_DEEP)
        if isinstance(value, dict):
            to_check += [(key, depth) for key in value]
            to_check += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            to_check += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("half a surrogate pair in a text") from None


def printable(text: str, keep: str = "") -> str:
    """For a screen: control characters, which could move the cursor or colour it, are written as escapes.

    keep: control characters that stay, as "\\n" in a text of several lines.
    """
    return "".join(
        character if character.isprintable() or character in keep else repr(character)[1:-1] for character in text
    )


def is_file_name(text: str) -> bool:
    """Whether a text from a file may be part of a path: no separator, not `..`, not hidden, printable, not too long."""
    return (
        0 < len(text.encode("utf-8", "replace")) <= MOST_NAME
        and text[0] != "."
        and text.isprintable()
        and ("/" not in text)
    )


def as_object(value: object) -> dict:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_same(path: Path, other: Path) -> bool:
    """Whether both files exist and have the same content."""
    return path.is_file() and other.is_file() and path.read_bytes() == other.read_bytes()


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file as `write_whole` does, unless the target has the same content already."""
    if not is_same(source, target):
        write_whole(target, source.read_bytes())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step: it is replaced whole or not at all, and it is on the disk when this returns."""
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
    sync_folder(path.parent)


def check_writable(folder: Path) -> None:
    """Raises UsageError if files cannot be written into a folder, which need not exist yet. Writes nothing itself."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        fault = "it is not a folder"
    elif os.statvfs(existing).f_flag & os.ST_RDONLY:
        fault = "its file system is read-only"
    elif not os.access(existing, os.W_OK | os.X_OK):
        fault = "permission denied"
    else:
        return
    raise UsageError(f"cannot write into {str(existing)!r}: {fault}")


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, so that a new or renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict, default: Callable[[object], object] | None = None) -> None:
    """Write a JSON file as `write_whole` does. default: as json.dumps takes it."""
    text = json.dumps(content, indent=2, default=default, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "replace"))


def is_newer(path: Path, other: Path) -> bool:
    """Whether both files exist and `path` was written later."""
    try:
        return path.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


def set_aside(path: Path, word: str) -> None:
    """Rename a file, if it exists: summary.json becomes summary.<word>.json, or summary.<word>.2.json and so on."""
    path, number = Path(path), 1
    if not path.is_file():
        return
    while True:
        copy = path.with_name(f"{path.stem}.{word}{'' if number == 1 else f'.{number}'}{path.suffix}")
        if not copy.exists():
            path.replace(copy)
            return
        number += 1


def remove(*paths: Path) -> None:
    """Delete those of the files that exist."""
    for path in paths:
        if path.exists():
            path.unlink()
