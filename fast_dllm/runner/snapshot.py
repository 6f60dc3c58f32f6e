"""The code that is submitted is the code that runs: a copy of it in .snapshots/<name>/, from which a job runs.

The name is a hash of the copied files and of git's state: equal code shares a snapshot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

from fast_dllm.record.provenance import code_state
from fast_dllm.spec.files import read_json, write_json

FOLDER, STATE_FILE = ".snapshots", "snapshot.json"
ALWAYS = ("eval.py", "pyproject.toml", "constraints.txt", "fast_dllm", "tasks", "sbatch")
WHERE_PRESENT = ("generation_functions.py", "experiments/replays.json")
NAME_DIGITS = 16
TRIES = 3


class SnapshotError(RuntimeError):
    """The code could not be copied as it was when its name was computed; the message is one line."""


def name_of(root: Path, experiment: str, model: str) -> str:
    """The name of the snapshot that `ensure` would make; nothing is written. Raises SnapshotError and OSError."""
    return _describe(Path(root), experiment, model).name


def ensure(root: Path, experiment: str, model: str) -> str:
    """The name of the snapshot that a job on `model` with the policy of `experiment` needs, which is whole afterwards.

    Its files get today's times, because a scratch disk is cleared by them. Any number of processes may call this at
    once. Raises SnapshotError and OSError.
    """
    code = _describe(Path(root), experiment, model)
    for tries_left in reversed(range(TRIES)):
        try:
            _make(code)
            break
        except SnapshotError:  # somebody edits the code
            if not tries_left:
                raise
        time.sleep(1)
        code = _describe(Path(root), experiment, model)
    return code.name


@dataclass(frozen=True)
class _Code:
    """The code of one experiment and model, as it is now in the project's folder."""

    root: Path
    files: Mapping[str, str]  # path below the root -> SHA-256
    state: Mapping[str, object]  # git's: what snapshot.json holds

    @property
    def name(self) -> str:
        text = json.dumps([sorted(self.files.items()), dict(self.state)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]

    @property
    def folder(self) -> Path:
        return self.root / FOLDER / self.name


def _describe(root: Path, experiment: str, model: str) -> _Code:
    try:
        files = {path: _sha256(root / path) for path in _files(root, experiment, model)}
    except FileNotFoundError as error:
        raise SnapshotError(f"a file is missing, or was removed at this moment: {error.filename}") from error
    return _Code(root, files, code_state(root))


def _make(code: _Code) -> None:
    """Make the snapshot, or give the files of a whole one today's times. Raises SnapshotError."""
    folder = code.folder
    if _is_whole(code):
        for path in code.files:
            with contextlib.suppress(OSError):  # another member of the group may have made it
                os.utime(folder / path)
        return
    mark = f"{socket.gethostname()}.{os.getpid()}"
    new, damaged = folder.with_name(f".new.{mark}"), folder.with_name(f".damaged.{mark}")
    try:
        _copy(code, new)
        with contextlib.suppress(OSError):  # there is none, or another process has just moved it away
            folder.rename(damaged)
        with contextlib.suppress(OSError):  # another process was faster: its folder holds the same
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
    if not _is_whole(code):
        raise SnapshotError(f"the copy of the code at {folder} is not whole")


def _is_whole(code: _Code) -> bool:
    """Whether the snapshot is there and holds exactly these files with these contents."""
    if read_json(code.folder / STATE_FILE)[0] != dict(code.state):
        return False
    try:
        contents = _contents(code.folder)
    except OSError:
        return False
    contents.pop(STATE_FILE)
    return contents == code.files


def _files(root: Path, experiment: str, model: str) -> Iterator[str]:
    """Paths of everything that an evaluation reads, except data and downloaded models, in a fixed order."""
    tops = [*ALWAYS, f"experiments/{experiment}", *(path for path in WHERE_PRESENT if (root / path).is_file())]
    if model == "tiny":
        tops.append("models/tiny")
    for top in tops:
        if (root / top).is_file():
            yield top
        else:
            yield from (f"{top}/{path}" for path in sorted(_walk(root / top)))


def _walk(folder: Path) -> Iterator[str]:
    """Files below a folder, without what Python writes there and the settings of this cluster."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(place, name)
            if name != "cluster.env" and not name.endswith(".pyc") and path.is_file():
                yield path.relative_to(folder).as_posix()


def _contents(folder: Path) -> dict[str, str]:
    return {path: _sha256(folder / path) for path in _walk(folder)}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _copy(code: _Code, new: Path) -> None:
    """Copy the code to the folder `new`. Raises SnapshotError where a file is not the one that was hashed."""
    shutil.rmtree(new, ignore_errors=True)
    for path, sha256 in code.files.items():
        target = new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(code.root / path, target)  # without the old times
            shutil.copymode(code.root / path, target)
        except FileNotFoundError:
            pass
        if not target.is_file() or _sha256(target) != sha256:
            raise SnapshotError(f"a file changed while the code was copied: {code.root / path}")
    write_json(new / STATE_FILE, dict(code.state))
