"""Traces: what each denoising step of each answer saw and did. docs/traces.md describes the file.

    <run's folder>/answers/<key>/001.rank0.traces.jsonl.gz   while the run is answered: beside the answers' own file
    <run's folder>/traces.jsonl.gz                           of a finished run: a header line, then a line an answer

An answer's trace is written before the answer, so that an answer on disk has its trace. Each line is a gzip member of
its own: a process that is killed damages at most the last one.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping

from fast_dllm.errors import line_of
from fast_dllm.record.answers import AnswerStore
from fast_dllm.spec.files import printable

SCHEMA_VERSION = 1
TRACES_FILE = "traces.jsonl.gz"
PART_SUFFIX = ".traces.jsonl.gz"
MOST_ANSWER_BYTES = 4 * 2**20  # of an answer's steps as JSON, about: the steps after that are left out
MOST_LINE_BYTES = 4 * MOST_ANSWER_BYTES
PART_LEVEL, LEVEL = 1, 6  # of compression: while answers are given it must be fast

Trace = Dict[str, Any]


class TracesError(ValueError):
    """A traces file that cannot be read; one line."""


class TraceWriter:
    """This process's traces of one run, beside its answers."""

    def __init__(self, store: AnswerStore):
        self._file = store.open_beside(PART_SUFFIX)

    def write(self, trace: Mapping[str, object]) -> None:
        """Add one answer's trace. Raises OSError where the disk takes no more."""
        self._file.write(gzip.compress(_line(trace), PART_LEVEL, mtime=0))


def finish(store: AnswerStore, folder: Path, header: Mapping[str, object]) -> dict[str, int]:
    """Write the traces file of a finished run into `folder`. Each answer is in it once, whatever processes gave it.

    Returns num_answers, those that were generated, and num_traces; both are in the header too. Where no process kept
    traces, it removes the file of an earlier run and returns nothing. header: what the run is.
    """
    parts = sorted(store.folder.glob(f"*{PART_SUFFIX}"))
    target = folder / TRACES_FILE
    if not parts:
        target.unlink(missing_ok=True)
        return {}
    traced = {trace["key"] for part in parts for trace in _readable(part)}
    counts = {"num_answers": int(store.recount().cost.requests), "num_traces": len(traced)}
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with gzip.GzipFile(temporary, "wb", LEVEL, mtime=0) as file:
        file.write(_line({"schema_version": SCHEMA_VERSION, **header, **counts}))
        for part in parts:
            for trace in _readable(part):
                if trace["key"] in traced:
                    traced.remove(trace["key"])
                    file.write(_line(trace))
    temporary.replace(target)
    return counts


def read(path: Path) -> tuple[Trace, Iterator[Trace]]:
    """(header, traces) of a finished run's file. Raises TracesError, also while the traces are read."""
    lines = _checked_lines(path)
    header = next(lines, None)
    if header is None or header.get("schema_version") != SCHEMA_VERSION:
        version = None if header is None else header.get("schema_version")
        raise TracesError(f"{path.name} has schema version {version!r:.20}, not {SCHEMA_VERSION}")
    return header, lines


def _checked_lines(path: Path) -> Iterator[Trace]:
    try:
        yield from _lines(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise TracesError(f"{path.name} cannot be read: {printable(line_of(error))}") from None


def _readable(path: Path) -> Iterator[Trace]:
    """The traces of one process up to the first damaged line, at which the process was killed."""
    try:
        yield from _lines(path)
    except (OSError, EOFError, zlib.error, ValueError):
        return


def _lines(path: Path) -> Iterator[Trace]:
    """Raises OSError, EOFError, zlib.error and ValueError for a damaged file."""
    with gzip.open(path) as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            content = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(content, dict):
                raise ValueError("a line is no trace")
            yield content


def _line(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"
