"""What a run was made of: the model's revision, the commit of the code, host and package versions.

Standard library only, but for the hub's cache of a published model.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from fast_dllm.errors import line_of
from fast_dllm.spec.files import printable, read_json
from fast_dllm.spec.tasks import ROOT

PACKAGES = ("torch", "transformers", "lm_eval", "accelerate", "datasets", "tokenizers", "safetensors")
CODE_FOLDERS = ("experiments", "fast_dllm", "tasks")  # an untracked file in them may be read by an evaluation
LARGE_FILE_BYTES = 256 * 2**20


def model_revision(source: str) -> str | None:
    """What exactly was loaded: the commit of a model from the hub, or a hash over the files of a folder.

    A file over LARGE_FILE_BYTES counts by name, size and modification time: hashing it takes longer than loading it.
    """
    folder = Path(source)
    if folder.is_dir():
        digest = sha256()
        for path in sorted(folder.glob("*")):
            if path.suffix in (".json", ".safetensors", ".jinja", ".txt"):
                state = path.stat()
                large = state.st_size > LARGE_FILE_BYTES
                content = f"{state.st_size} {state.st_mtime_ns}".encode() if large else path.read_bytes()
                digest.update(path.name.encode() + b"\0" + content + b"\0")
        return f"files-sha256:{digest.hexdigest()}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


# -- the code ----------------------------------------------------------------------------------------------------------
def code_state(root: Path = ROOT) -> dict[str, Any]:
    """Commit, branch and dirty flag of the code in `root`; None where `root` is no git repository itself.

    A job's snapshot of the code has them in snapshot.json. Writes a warning to stderr where git refuses to answer.
    """
    recorded, fault = read_json(root / "snapshot.json")
    names = ("git_commit", "git_branch", "git_dirty")
    if recorded is not None or fault:
        if fault:
            _warn(f"snapshot.json cannot be used: {fault}")
        return {name: (recorded or {}).get(name) for name in names}
    nothing: dict[str, Any] = dict.fromkeys(names)
    if not (root / ".git").exists():
        return nothing  # a repository around it is of something else
    try:
        commit = _git(root, "rev-parse", "HEAD")
        branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        untracked = _git(root, "status", "--porcelain", "--", *CODE_FOLDERS)
    except _GitError as error:
        _warn(f"the commit of the code is not recorded: {error}")
        return nothing
    return {"git_commit": commit, "git_branch": branch, "git_dirty": bool(changed or untracked)}


class _GitError(RuntimeError):
    """git gave no answer; why, on one line."""


def _git(root: Path, *arguments: str) -> str:
    """git's output. Raises _GitError.

    git refuses a repository that another user owns, because its configuration could run programs. Here that user's
    Python code runs already, so the folder is named as safe. Before version 2.38 git ignores that on a command line.
    """
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    settings = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    settings["GIT_CEILING_DIRECTORIES"] = str(root.parent)  # never a repository around this folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=settings)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _GitError(line_of(error)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise _GitError(lines[0] if lines else f"git {arguments[0]} ended with status {done.returncode}")
    return done.stdout.strip()


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


# -- the machine -------------------------------------------------------------------------------------------------------
def environment() -> dict[str, Any]:
    """Host, job and package versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "host": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "packages": versions,
    }


def timestamp(seconds: float) -> str:
    """A Unix time as ISO 8601 in UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
