"""Keeps a run's answers on disk, so that they survive a kill of the process and a power cut.

    <folder>/answers/<key>/identity.json                what the answers depend on, for people
    <folder>/answers/<key>/001.rank0.jsonl              one line per batch; one file for each process of each segment
    <folder>/answers/<key>/001.shard0-of-4.rank0.jsonl  the same, of a process for a shard (shards.py)
    <folder>/answers/<key>/001.rank0.traces.jsonl.gz    traces, where they are kept (traces.py)
    <folder>/progress.rank0.json                        how far this process is, for `run.sh --status`

The key is the SHA-256 of the identity, so answers are used again only if nothing that could change them has changed.
Each file has one writer, and is not written to after its process has ended.

What is guaranteed: a batch is written as soon as it is answered. A killed process loses only the answers in work, and
the line that it was writing, which is ignored. A file is synced (fsync) when a batch is added, at most once every
SYNC_SECONDS, so as not to overload a network file system. A power cut also loses at most the answers that were finished
within SYNC_SECONDS after the last sync. A batch is one line with a checksum, so its answers and their cost are kept or
lost together. A damaged line is ignored, and its questions are answered again. An answer that two processes gave counts
once. Usage, with JSON values as answers:

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

`identity` holds everything that changes an answer: the model and its revision, all generation arguments, the hashes of
the code, the dtype, the kind of device. The key of a request is made of everything in which requests differ, with its
settings and, if it is sampled, its seed. Two requests with the same key have the same answer.
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
    """The key of a request. parts: everything in which requests differ, as JSON values."""
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


class GrowingFile:
    """A file to which whole lines are appended; synced at most once every SYNC_SECONDS."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._synced = -math.inf  # when, by time.monotonic

    def write(self, line: bytes) -> None:
        """Append a line. Raises OSError; if the disk is full, nothing of the line stays in the file."""
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
        """Sync and close the file. A second call does nothing."""
        if self._descriptor < 0:
            return
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file with their newlines. A line longer than MOST_LINE_BYTES is cut to its start."""
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE_BYTES):
            yield line
            while not line.endswith(b"\n") and (line := file.readline(MOST_LINE_BYTES)):
                pass


def num_answers(folder: Path) -> int:
    """The number of answers on disk of the run in `folder`, of any code. An answer of two processes counts twice."""
    count = 0
    for path in (Path(folder) / "answers").glob("*/*.jsonl"):
        for line in lines_of(path):
            with contextlib.suppress(ValueError):
                count += len(BatchRecord.from_line(line).answers)
    return count


class AnswerStore:
    """A mapping from request keys to answers of one identity, given by this process or by earlier ones.

    shard: the name of the shard that this process answers, like "0-of-4"; None: the whole run. records: the folder for
    its progress; None: the run's. claim: the folder of the claim that this process holds on the run or the shard
    (spec/locks.py); None: no other process can work on it.
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
        self._added = Ledger()
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
        """Open a new file, with the next free number of a segment."""
        numbers = [number for _, number, shard, rank in self._files() if (shard, rank) == (self._shard, self._rank)]
        self._segment = max(numbers, default=0)
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
        """All answers that all processes have written so far, read from the files."""
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
        """The answers and costs of all processes and segments of the run. ledgers: what the current processes added.

        If another process took over this run, it may have finished it and removed the files, also those with the
        answers that were found at the start. Then the result is what this process knows, if it is the only one;
        otherwise TakenOverError is raised.
        """
        try:
            total = self.recount()
        except FileNotFoundError:
            total = Ledger()
        if all(ledger.answers.keys() <= total.answers.keys() for ledger in (*ledgers, self._ledger)):
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
        """Announce further requests, for the progress. of_run: how many more the whole run has, if this process answers
        a shard."""
        expected = set(keys)
        self._total += len(expected)
        self._counted += sum(key in self for key in expected)
        if of_run is not None:
            self._run_total = (self._run_total or 0) + of_run
        self.report_progress()

    def check_claim(self) -> None:
        """Raises TakenOverError if this process has lost its claim: it was stopped or cut off for long."""
        if self._claim is not None and not (self._owner and read_owner(self._claim) == self._owner):
            raise TakenOverError(f"another process has taken over {self._progress.parent}")

    def append(
        self,
        answers: Mapping[str, object],
        cost: Cost,
        costs: Mapping[str, Cost] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Write the answers and costs of one batch (see BatchRecord.ending_now). Then a kill cannot lose them.

        Raises TakenOverError, and OSError if the disk is full.
        """
        self.check_claim()
        record = BatchRecord.ending_now(answers, cost, costs, batch_size)
        self._file.write(record.to_line())
        self._counted += sum(key not in self for key in answers)
        self._ledger.add(record)
        self._ledger.segments.add((self._shard, self._segment))
        self._added.add(record)
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report_progress()

    @property
    def cost(self) -> Cost:
        """The cost of the answers that this process knows: its own, and those on disk when it started."""
        return self._ledger.cost

    @property
    def num_segments(self) -> int:
        return self._ledger.num_segments

    def report_progress(self) -> None:
        """Replace progress.rank<r>.json. For a shard, tokens and seconds are those of this process; for a whole run,
        those of earlier processes too."""
        self._reported = time.monotonic()
        cost = self._ledger.cost if self._shard is None else self._added.cost
        progress = {
            "schema_version": 1,
            "answered": min(self._counted, self._total),
            "total": self._total,
            "new_tokens": cost.new_tokens,
            "seconds_generating": round(cost.seconds_generating, 3),
            "segment_answered": len(self._added.answers),
            "segment_seconds": round(self._reported - self._started, 3),
        }
        if self._run_total is not None:
            progress["run_total"] = self._run_total
        temporary = self._progress.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(progress, indent=2) + "\n")
        temporary.replace(self._progress)

    def close(self) -> None:
        """Close the files and write the progress; afterwards everything is on disk."""
        for file in self._beside:
            file.close()
        self._file.close()
        if self._progress.parent.is_dir():
            self.report_progress()

    def discard(self) -> None:
        """Delete the answers of this identity, once the run is complete and has its results."""
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
