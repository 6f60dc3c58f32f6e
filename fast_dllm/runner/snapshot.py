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
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

from fast_dllm.record.results import code_state
from fast_dllm.spec.files import read_json, write_json

FOLDER, STATE_FILE = ".snapshots", "snapshot.json"
ALWAYS = ("eval.py", "pyproject.toml", "constraints.txt", "fast_dllm", "tasks", "sbatch")
WHERE_PRESENT = ("generation_functions.py", "experiments/replays.json")
NAME_DIGITS = 16


class SnapshotError(RuntimeError):
    """The code could not be copied as it was when its name was computed; the message is one line."""


@dataclass(frozen=True)
class Snapshot:
    """The code of one experiment and model as it is now: nothing is written yet."""

    root: Path  # the project's folder
    name: str
    files: Mapping[str, str]  # path below the root -> SHA-256
    state: Mapping[str, object]  # git's: what snapshot.json holds

    @property
    def folder(self) -> Path:
        return self.root / FOLDER / self.name


def describe(root: Path, experiment: str, model: str) -> Snapshot:
    """The snapshot that a job on `model` with the policy of `experiment` needs. Raises SnapshotError and OSError."""
    root = Path(root)
    try:
        files = {path: _sha256(root / path) for path in _files(root, experiment, model)}
    except FileNotFoundError as error:
        raise SnapshotError(f"a file is missing, or was removed at this moment: {error.filename}") from error
    state = code_state()
    return Snapshot(root, _name(files, state), files, state)


def ensure(snapshot: Snapshot) -> Path:
    """The snapshot's folder, made where it is missing or not whole.

    Its files get today's times, because a scratch disk is cleared by them. Any number of processes may call this at
    once. Raises SnapshotError and OSError.
    """
    folder = snapshot.folder
    if is_whole(snapshot):
        for path in snapshot.files:
            with contextlib.suppress(OSError):  # another member of the group may have made it
                os.utime(folder / path)
        return folder
    mark = f"{socket.gethostname()}.{os.getpid()}"
    new, damaged = folder.with_name(f".new.{mark}"), folder.with_name(f".damaged.{mark}")
    try:
        _copy(snapshot, new)
        if _contents(new) != {**snapshot.files, STATE_FILE: _sha256(new / STATE_FILE)}:
            raise SnapshotError(f"a file changed while the code was copied: {snapshot.root}")
        with contextlib.suppress(OSError):  # there is none, or another process has just moved it away
            folder.rename(damaged)
        with contextlib.suppress(OSError):  # another process was faster: its folder holds the same
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
    if not is_whole(snapshot):
        raise SnapshotError(f"the copy of the code at {folder} is not whole")
    return folder


def is_whole(snapshot: Snapshot) -> bool:
    """Whether the snapshot is there and holds exactly these files with these contents."""
    if read_json(snapshot.folder / STATE_FILE)[0] != dict(snapshot.state):
        return False
    try:
        contents = _contents(snapshot.folder)
    except OSError:
        return False
    contents.pop(STATE_FILE)
    return contents == snapshot.files


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


def _name(files: Mapping[str, str], state: Mapping[str, object]) -> str:
    text = json.dumps([sorted(files.items()), dict(state)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def _copy(snapshot: Snapshot, new: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)
    for path in snapshot.files:
        target = new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(snapshot.root / path, target)  # without the old times
            shutil.copymode(snapshot.root / path, target)
        except FileNotFoundError as error:
            raise SnapshotError(f"a file changed while the code was copied: {snapshot.root}") from error
    write_json(new / STATE_FILE, dict(snapshot.state))
