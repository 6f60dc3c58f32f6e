"""Answers that survive the process, and a machine that loses its power.

    <folder>/answers/<key>/identity.json                what the answers depend on, for people
    <folder>/answers/<key>/001.rank0.jsonl              one line a batch; one file for each process of each segment
    <folder>/answers/<key>/001.shard0-of-4.rank0.jsonl  the same, of a process that answers a shard (shards.py)
    <folder>/answers/<key>/001.rank0.traces.jsonl.gz    traces, where they are kept (traces.py)
    <folder>/progress.rank0.json                        how far this process is, for `run.sh --status`

The key is the SHA-256 of the identity, so answers are found again only when nothing that could change them has
changed. No file has two writers and none is written again after its process ended.

The promise: a batch's line is written when it is answered, so a process that is killed loses no answer but those of
the answers in work (and the line that it was just writing, which is torn and ignored). The disk is synced (fsync)
when a batch is added, at most once every SYNC_SECONDS a process, as a network's file system can bear: a machine that
loses its power also loses at most the answers that were finished within SYNC_SECONDS after the last sync. A batch is
one line with a checksum: its answers and what they cost are kept or lost together, and a damaged line is ignored, so
that its questions are answered again. An answer that two processes gave counts once. Used like this, with nothing but
JSON values as answers:

    with AnswerStore(folder, identity, rank=rank) as store:    # once for the whole process
        keys = [request_key(request.prompt, request.until, ...) for request in requests]
        store.expect(keys)                                     # at each call of the harness, for the progress
        missing = [i for i, key in enumerate(keys) if key not in store]
        for batch in batches(missing):
            ...
            store.append({keys[i]: text for i, text in zip(batch, texts)},
                         Cost(seconds_generating=1.5),                              # of the batch
                         {keys[i]: Cost(new_tokens=96, ...) for i in batch})        # of each answer
        texts = [store[key] for key in keys]
        store.recount()       # what is on disk now, of all processes: cost, segments, wall time, batch sizes

`identity` is everything that changes an answer: model and its revision, every generation argument, code hashes, dtype,
device kind. The request's key is everything that tells one request from another, its settings and, where it is sampled,
its seed included. Two requests with one key have one answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fast_dllm.errors import TakenOverError
from fast_dllm.record.batches import BatchRecord, Ledger
from fast_dllm.record.cost import Cost
from fast_dllm.spec.files import sync_folder
from fast_dllm.spec.locks import read_owner

FORMAT = 1  # part of the key: a store of another format is never read
PROGRESS_SECONDS = 2.0
SYNC_SECONDS = 1.0
MOST_LINE_BYTES = 64 * 2**20
_SEGMENT_FILE = re.compile(r"(\d{3,})(?:\.shard(\d+-of-\d+(?:x\d+)?))?\.rank(\d+)\.jsonl")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def request_key(*parts: object) -> str:
    """A key for one request, from everything (JSON values) that tells it from another."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


class GrowingFile:
    """A file that only grows by whole lines, each written at once; synced at most once in SYNC_SECONDS."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._synced = -math.inf  # when, by time.monotonic

    def write(self, line: bytes) -> None:
        """The whole line or, where the disk is full, nothing of it and an OSError. Also raises what a sync raises."""
        start = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, start)  # leave no half line for a later batch to be glued to
            raise
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._synced = time.monotonic()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """What is written is on disk when this returns; again, it does nothing."""
        if self._descriptor < 0:
            return
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file with their newlines. Of one that is longer than MOST_LINE_BYTES comes the start alone."""
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE_BYTES):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(MOST_LINE_BYTES)):
                pass


def num_answers(folder: Path) -> int:
    """Answers on disk of the run in `folder`, whatever code gave them; one that two processes gave counts twice."""
    count = 0
    for path in (Path(folder) / "answers").glob("*/*.jsonl"):
        for line in lines_of(path):
            with contextlib.suppress(ValueError):
                count += len(BatchRecord.from_line(line).answers)
    return count


class AnswerStore:
    """The answers given under one identity, by this process and by those before it. Iterates over request keys.

    shard: the name of the shard that this process answers, like "0-of-4"; None: everything. records: the folder for its
    progress; None: the run's. claim: the folder that says
    that the run, or the shard, is this process's own (spec/locks.py); None: nobody else can be at it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, object],
        *,
        rank: int = 0,
        claim: Path | None = None,
        shard: str | None = None,
        records: Path | None = None,
    ) -> None:
        self._claim, self._owner = claim, read_owner(claim) if claim else ""
        self.key = hashlib.sha256(_canonical([FORMAT, dict(identity)]).encode()).hexdigest()
        self.run_folder = Path(folder)
        self.folder = self.run_folder / "answers" / self.key[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_torn = 0  # lines that could not be read: at most the last of each file, unless the disk is at fault
        self._rank, self._shard, self._total, self._counted = rank, shard, 0, 0
        self._own = Ledger()
        self._run_total: int | None = None
        self._progress = (records or self.run_folder) / f"progress.rank{rank}.json"
        self._progress.parent.mkdir(parents=True, exist_ok=True)
        self._started = self._reported = time.monotonic()
        self._write_identity(identity)
        self._ledger = self.recount()
        self.num_recovered = len(self._ledger.answers)
        self._beside: list[GrowingFile] = []
        self._file = self._open_segment()

    def _write_identity(self, identity: Mapping[str, object]) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            temporary = path.with_suffix(f".rank{self._rank}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(identity), indent=2, sort_keys=True) + "\n")
            temporary.replace(path)

    def _files(self) -> list[tuple[Path, int, str | None, int]]:
        """(path, number, shard, rank) of every process's file."""
        matches = ((file, _SEGMENT_FILE.fullmatch(file.name)) for file in sorted(self.folder.iterdir()))
        return [(file, int(match[1]), match[2], int(match[3])) for file, match in matches if match]

    def _open_segment(self) -> GrowingFile:
        """A file that did not exist before."""
        own = [number for _, number, shard, rank in self._files() if (shard, rank) == (self._shard, self._rank)]
        self._segment = max(own, default=0)
        name = "" if self._shard is None else f".shard{self._shard}"
        while True:
            self._segment += 1
            try:
                path = self.folder / f"{self._segment:03d}{name}.rank{self._rank}.jsonl"
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            except FileExistsError:
                continue
            sync_folder(self.folder)
            self._path = path
            return GrowingFile(descriptor)

    def open_beside(self, suffix: str) -> GrowingFile:
        """A new file of this process beside its answers, which is closed and removed with them."""
        path = self._path.with_name(self._path.name[: -len(".jsonl")] + suffix)
        file = GrowingFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666))
        sync_folder(self.folder)
        self._beside.append(file)
        return file

    def recount(self) -> Ledger:
        """What all processes have written until now, read from the files."""
        ledger, self.num_torn = Ledger(), 0
        for file, number, shard, _ in self._files():
            for line in lines_of(file):
                try:
                    ledger.add(BatchRecord.from_line(line))
                except ValueError:
                    self.num_torn += 1
                else:
                    ledger.segments.add((shard, number))
        return ledger

    def total(self, ledgers: Sequence[Ledger]) -> Ledger:
        """What all processes and segments of the run did. ledgers: what each process of now did.

        Another process that took this one for dead may have finished the run and removed the files: then it is what
        this process knows, where it is alone, and else TakenOverError.
        """
        try:
            total = self.recount()
        except FileNotFoundError:
            total = Ledger()
        if all(ledger.answers.keys() <= total.answers.keys() for ledger in ledgers):
            return total
        if len(ledgers) > 1:
            raise TakenOverError(f"another process has finished {self.run_folder}")
        return self._ledger

    def __contains__(self, key: object) -> bool:
        return key in self._ledger.answers

    def __getitem__(self, key: str) -> Any:
        return self._ledger.answers[key]

    def __len__(self) -> int:
        return len(self._ledger.answers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ledger.answers)

    def expect(self, keys: Iterable[str], of_run: int | None = None) -> None:
        """Say which further requests there will be: what the progress counts. of_run: how many more the whole run has,
        where this process answers a shard."""
        expected = set(keys)
        self._total += len(expected)
        self._counted += sum(key in self for key in expected)
        if of_run is not None:
            self._run_total = (self._run_total or 0) + of_run
        self.report_progress()

    def check_claim(self) -> None:
        """Raises TakenOverError when the claim is gone: a process can be cut off, or stopped, and then go on."""
        if self._claim is not None and not (self._owner and read_owner(self._claim) == self._owner):
            raise TakenOverError(f"another process has taken over {self._progress.parent}")

    def append(
        self,
        answers: Mapping[str, object],
        cost: Cost,
        costs: Mapping[str, Cost] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Add one batch's answers and what they cost (see BatchRecord.ending_now). On return they outlive this process.
        Raises TakenOverError, and OSError where the disk takes no more."""
        self.check_claim()
        record = BatchRecord.ending_now(answers, cost, costs, batch_size)
        self._file.write(record.to_line())
        self._counted += sum(key not in self for key in answers)
        self._ledger.add(record)
        self._ledger.segments.add((self._shard, self._segment))
        self._own.add(record)
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report_progress()

    @property
    def cost(self) -> Cost:
        """What is known to this process: its own answers, and those that were there when it began."""
        return self._ledger.cost

    @property
    def num_segments(self) -> int:
        return self._ledger.num_segments

    def report_progress(self) -> None:
        """Write progress.rank<r>.json; a reader sees the old file or the new one. A shard's tokens and seconds are
        those of this process, a whole run's those of all before it too."""
        self._reported = time.monotonic()
        cost = self._ledger.cost if self._shard is None else self._own.cost
        progress = {
            "schema_version": 1,
            "answered": min(self._counted, self._total),
            "total": self._total,
            "new_tokens": cost.new_tokens,
            "seconds_generating": round(cost.seconds_generating, 3),
            "segment_answered": len(self._own.answers),
            "segment_seconds": round(self._reported - self._started, 3),
        }
        if self._run_total is not None:
            progress["run_total"] = self._run_total
        temporary = self._progress.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(progress, indent=2) + "\n")
        temporary.replace(self._progress)

    def close(self) -> None:
        """Everything is on disk when this returns."""
        for file in self._beside:
            file.close()
        self._file.close()
        if self._progress.parent.is_dir():
            self.report_progress()

    def discard(self) -> None:
        """Forget this identity's answers: the run they belong to is complete and has its own files."""
        self.close()
        with contextlib.suppress(FileNotFoundError):  # another process, taken over from, has just done it
            shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # unless it holds another identity's answers
        for progress in self.run_folder.glob("progress.rank*.json"):
            progress.unlink(missing_ok=True)

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
