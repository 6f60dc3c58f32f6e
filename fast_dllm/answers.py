"""Answers that survive the process: every answered batch is on disk before the next one starts.

    <folder>/answers/<key>/identity.json       what the answers depend on, for people
    <folder>/answers/<key>/001.rank0.jsonl     one line a batch; one file for each process of each segment
    <folder>/progress.rank0.json               how far this process is, for `run.sh --status`

The key is the SHA-256 of the identity, so answers are found again only when nothing that could change them has
changed. No file has two writers and none is written again after its process ended: killed anywhere, the last line may
be torn, that line is ignored, and at most one batch is lost. A batch is one line, so its answers and its cost
(counters) stand or fall together. Used like this, with nothing but JSON values as answers:

    with AnswerStore(folder, identity, rank=rank) as store:    # once for the whole process
        store.expect(len(requests))                            # at each call of the harness, for the progress
        keys = [request_key(request.prompt, request.until, ...) for request in requests]
        missing = [i for i, key in enumerate(keys) if key not in store]
        for batch in batches(missing):
            ...
            store.append({keys[i]: text for i, text in zip(batch, texts)},
                         {"seconds_generating": 1.5, "new_tokens": 96, "forwards.sub": 40})
        texts = [store[key] for key in keys]
        store.counters        # summed over all segments, this one included
        store.num_segments    # processes' lives that answered something, this one included

`identity` is everything that changes an answer: model and its revision, every generation argument, code hashes, dtype,
device kind. The request's key is everything that tells one request from another, its settings and, where it is sampled,
its seed included. Two requests with one key share one answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = 1  # part of the key: a store of another format is never read
PROGRESS_SECONDS = 2.0
_SEGMENT_FILE = re.compile(r"(\d{3,})\.rank(\d+)\.jsonl")


class TakenOverError(RuntimeError):
    """This process was taken for dead, and another one evaluates the run now."""


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def request_key(*parts: object) -> str:
    """A key for one request, from everything (JSON values) that tells it from another."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


class Cost(dict[str, float]):
    """What work cost, by name: counts, and seconds under `seconds...`. What has no entry cost nothing."""

    def __missing__(self, name: str) -> float:
        return 0

    def add(self, other: Mapping[str, float]) -> None:
        for name, value in other.items():
            self[name] += value


def side_by_side(processes: Iterable[Mapping[str, float]]) -> Cost:
    """What processes that ran at the same time cost together: counts add up, of `seconds...` the slowest one's stay."""
    total = Cost()
    for counters in processes:
        for name, value in counters.items():
            total[name] = max(total[name], value) if name.startswith("seconds") else total[name] + value
    return total


class AnswerStore:
    """The answers given under one identity, by this process and by those before it. Iterates over request keys.

    claim: the folder that says that the run is this process's own (sbatch/lock.sh); None: nobody else can be at it.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, object], *, rank: int = 0, claim: Path | None = None
    ) -> None:
        self._claim = claim
        self.key = hashlib.sha256(_canonical([FORMAT, dict(identity)]).encode()).hexdigest()
        self.folder = Path(folder) / "answers" / self.key[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_torn = 0  # lines that could not be read: at most the last of each file, unless the disk is at fault
        self._answers: dict[str, Any] = {}
        self._segments: dict[int, dict[int, Cost]] = {}  # segment -> rank -> what it cost
        self._progress = Path(folder) / f"progress.rank{rank}.json"
        self._rank, self._total, self._own_answered = rank, 0, 0
        self._started = self._reported = time.monotonic()
        self._write_identity(identity)
        files = sorted(file for file in self.folder.iterdir() if _SEGMENT_FILE.fullmatch(file.name))
        for file in files:
            self._read(file)
        self.num_recovered = len(self._answers)
        self.counters_before = self.counters  # what the segments before this one cost
        self._segment, self._file = self._open_segment(files)

    def _write_identity(self, identity: Mapping[str, object]) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            temporary = path.with_suffix(f".rank{self._rank}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(identity), indent=2, sort_keys=True) + "\n")
            temporary.replace(path)

    def _open_segment(self, files: list[Path]) -> tuple[int, int]:
        """A file that did not exist before: its number and descriptor."""
        own = [match for file in files if (match := _SEGMENT_FILE.fullmatch(file.name)) and int(match[2]) == self._rank]
        segment = max((int(match[1]) for match in own), default=0)
        while True:
            segment += 1
            try:
                path = self.folder / f"{segment:03d}.rank{self._rank}.jsonl"
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            except FileExistsError:
                continue
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the file's name must survive too
            finally:
                os.close(folder)
            return segment, descriptor

    def _read(self, file: Path) -> None:
        segment, rank = map(int, file.name.removesuffix(".jsonl").split(".rank"))
        for line in file.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                record = json.loads(line)
                answers, counters = record["answers"], Cost(record["counters"])
            except (ValueError, KeyError, TypeError):
                self.num_torn += 1
                continue
            for key, answer in answers.items():
                self._answers.setdefault(key, answer)
            self._segments.setdefault(segment, {}).setdefault(rank, Cost()).add(counters)

    def __contains__(self, key: object) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def expect(self, num_requests: int) -> None:
        """Say how many more requests there will be: what the progress counts towards."""
        self._total += num_requests
        self.report_progress()

    def check_claim(self) -> None:
        """Raises TakenOverError when the claim is gone: a process can be cut off, or stopped, and then go on."""
        if self._claim is not None:
            try:
                (self._claim / "owner").read_bytes()  # reading asks the file server; exists() may answer from memory
            except OSError as error:
                raise TakenOverError(f"another process has taken over {self._progress.parent}") from error

    def append(self, answers: Mapping[str, object], counters: Mapping[str, float]) -> None:
        """Add one batch's answers and what they cost; on return they are on disk. Raises TakenOverError."""
        self.check_claim()
        line = (json.dumps({"answers": dict(answers), "counters": dict(counters)}) + "\n").encode()
        start = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, start)  # a full disk: leave no half line for a later batch to be glued to
            raise
        for key, answer in answers.items():
            self._answers.setdefault(key, answer)
        self._segments.setdefault(self._segment, {}).setdefault(self._rank, Cost()).add(counters)
        self._own_answered += len(answers)
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report_progress()

    @property
    def counters(self) -> dict[str, float]:
        """Summed over segments. Processes of one segment ran side by side: of `seconds...` the slowest one's count."""
        total = Cost()
        for ranks in self._segments.values():
            total.add(side_by_side(ranks.values()))
        return dict(total)

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    def report_progress(self) -> None:
        """Write progress.rank<r>.json; a reader sees the old file or the new one."""
        self._reported = time.monotonic()
        counters = self.counters
        progress = {
            "schema_version": 1,
            "answered": min(len(self._answers), self._total),
            "total": self._total,
            "new_tokens": counters.get("new_tokens", 0),
            "seconds_generating": round(counters.get("seconds_generating", 0.0), 3),
            "segment_answered": self._own_answered,
            "segment_seconds": round(self._reported - self._started, 3),
        }
        temporary = self._progress.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(progress, indent=2) + "\n")
        temporary.replace(self._progress)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.report_progress()

    def discard(self) -> None:
        """Forget this identity's answers: the run they belong to is complete and has its own files."""
        self.close()
        with contextlib.suppress(FileNotFoundError):  # another process, taken over from, has just done it
            shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # unless it holds another identity's answers
        for progress in self._progress.parent.glob("progress.rank*.json"):
            progress.unlink(missing_ok=True)

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
