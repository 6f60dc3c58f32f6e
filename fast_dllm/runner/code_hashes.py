"""Which code a result is of: the policy's text, and everything else that can change a token.

The policy is an experiment's generation_functions.py (`generation_code_sha256` of a summary); the rest is one hash over
the files below and the rewrites of prompts (`decoding_sha256`). Editing anything else makes no result stale.
experiments/replays.json records the decoding hashes for which an experiment's transcript was replayed, token for token.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner.matrix import GENERATION_FILE
from fast_dllm.runner.tasks import read_tasks

# Of fast_dllm/. Files that are not there count for nothing.
DECODING_FILES = (
    "cache.py",
    "compiled.py",
    "config.py",
    "decoding.py",
    "engine.py",
    "graphs.py",
    "kernels.py",
    "layer_reuse.py",
    "model.py",
    "prompts.py",
    "sampling.py",
    "tokenizer.py",
)
SCORING_FILES = ("scoring.py",)
REPLAYS_FILE = "experiments/replays.json"


def file_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def policy_sha256(root: Path, experiment: str | None) -> str | None:
    """Of the experiment's generation_functions.py; None for the experiment: of the active one."""
    return file_sha256(policy_file(root, experiment))


def policy_file(root: Path, experiment: str | None) -> Path:
    folder = Path(root) / "experiments" / experiment if experiment is not None else Path(root)
    return folder / GENERATION_FILE


def decoding_sha256(root: Path, scored: bool = False) -> str:
    """Of everything outside the policy that can change a token; for scored tasks, also of what can change a score."""
    digest = hashlib.sha256()
    for name in DECODING_FILES + (SCORING_FILES if scored else ()):
        path = Path(root) / "fast_dllm" / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    rewrites = {task.family: task.rewrite for task in read_tasks(root).values() if task.rewrite}
    digest.update(json.dumps(rewrites, sort_keys=True).encode())
    return digest.hexdigest()


def replays(root: Path) -> Mapping[str, tuple]:
    """decoding_sha256 -> the experiments whose transcripts it gave. Raises UsageError."""
    path = Path(root) / REPLAYS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != 1:
            raise ValueError(f"schema version {content['schema_version']!r}, not 1")
        return {str(key): tuple(names) for key, names in content["replayed"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{REPLAYS_FILE} cannot be used: {' '.join(str(error).split())}") from None
