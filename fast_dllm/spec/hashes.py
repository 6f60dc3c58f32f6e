"""Which code a result is of: the policy's text, and everything else that can change a token.

The policy is an experiment's generation_functions.py (`generation_code_sha256` of a summary); the rest is one hash over
the files below and the rewrites of prompts (`decoding_sha256`). Editing anything else makes no result stale.
experiments/replays.json records the decoding hashes for which an experiment's transcript was replayed, token for token.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from pathlib import Path
from typing import Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec.matrix import GENERATION_FILE
from fast_dllm.spec.tasks import read_tasks

# Files of fast_dllm/ that can change a token; a file that is absent is left out.
DECODING_FILES = (
    "decode/checks.py",
    "decode/decoding_run.py",
    "decode/engine.py",
    "decode/forwards.py",
    "decode/grouping.py",
    "decode/predictions.py",
    "decode/sequences.py",
    "decoding.py",
    "evaluate/prompts.py",
    "layer_reuse.py",
    "network/cache.py",
    "network/chat_template.py",
    "network/compiled.py",
    "network/config.py",
    "network/devices.py",
    "network/eager.py",
    "network/executor.py",
    "network/graphs.py",
    "network/kernels.py",
    "network/layer_libraries.py",
    "network/layers.py",
    "network/loading.py",
    "network/model.py",
    "network/modes.py",
    "network/packing.py",
    "network/recordings.py",
    "network/tokenizer.py",
    "sampling.py",
)
SCORING_FILES = ("evaluate/scoring.py",)
REPLAYS_FILE = "experiments/replays.json"


def file_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def code_text(source: str) -> str:
    """A Python source without comments, docstrings and layout: what remains decides what the code computes.

    Python 3.8 to 3.14 give the same text: strings are copied from the source as they are written, because newer
    versions split an f-string into several tokens. Raises SyntaxError.
    """
    docstrings = _docstring_starts(ast.parse(source))
    lines = source.splitlines(keepends=True)
    words = []
    f_string_start, depth = (0, 0), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":
            f_string_start = token.start if depth == 0 else f_string_start
            depth += 1
        elif name == "FSTRING_END":
            depth -= 1
            if depth == 0:
                words.append(_between(lines, f_string_start, token.end))
        elif depth or token.type in (tokenize.COMMENT, tokenize.NL) or token.start in docstrings:
            continue
        elif name == "NEWLINE" and (not words or words[-1] in ("NEWLINE", "INDENT", "DEDENT")):
            continue  # the end of a docstring's line
        elif name in ("NEWLINE", "INDENT", "DEDENT"):
            words.append(name)
        else:
            words.append(token.string)
    return " ".join(words)


def _docstring_starts(tree: ast.Module) -> set:
    """(line, column) of each docstring's first character."""
    starts = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                starts.add((first.lineno, first.col_offset))
    return starts


def _between(lines: list, start: tuple, end: tuple) -> str:
    """The source text from one (line, column) to another; lines count from 1."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = lines[start[0] : end[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *middle, lines[end[0] - 1][: end[1]]])


def policy_sha256(root: Path, experiment: str | None) -> str | None:
    """The SHA-256 of the experiment's generation_functions.py; experiment None: of the active file."""
    return file_sha256(policy_file(root, experiment))


def policy_file(root: Path, experiment: str | None) -> Path:
    folder = Path(root) / "experiments" / experiment if experiment is not None else Path(root)
    return folder / GENERATION_FILE


def decoding_sha256(root: Path, scored: bool = False) -> str:
    """The hash of all code outside the policy that can change a token; for scored tasks, or a score.
    Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in DECODING_FILES + (SCORING_FILES if scored else ()):
        path = Path(root) / "fast_dllm" / name
        if path.is_file():
            digest.update(f"{name}\0{code_text(path.read_text(encoding='utf-8'))}\0".encode())
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
