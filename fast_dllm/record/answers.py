"""Answers that survive the process, and a machine that loses its power.

    <folder>/answers/<key>/identity.json                what the answers depend on, for people
    <folder>/answers/<key>/001.rank0.jsonl              one line a batch; one file for each process of each segment
    <folder>/answers/<key>/001.shard0-of-4.rank0.jsonl  the same, of a process that answers a share (shards.py)
    <folder>/progress.rank0.json                        how far this process is, for `run.sh --status`

The key is the SHA-256 of the identity, so answers are found again only when nothing that could change them has
changed. No file has two writers and none is written again after its process ended.

The promise: a batch's line is written when it is answered, so a process that is killed loses no answer but those of
the answers in work (and the line that it was just writing, which is torn and ignored). The disk is told (fsync) at most
once every SYNC_SECONDS a process, as a shared file system can bear: a machine that loses its power loses at most that
much of finished answers too. A batch is one line, so its answers and what they cost stand or fall together, and an
answer that two processes gave counts once. Used like this, with nothing but JSON values as answers:

    with AnswerStore(folder, identity, rank=rank) as store:    # once for the whole process
        keys = [request_key(request.prompt, request.until, ...) for request in requests]
        store.expect(keys)                                     # at each call of the harness, for the progress
        missing = [i for i, key in enumerate(keys) if key not in store]
        for batch in batches(missing):
            ...
            store.append({keys[i]: text for i, text in zip(batch, texts)},
                         {"seconds_generating": 1.5},                                   # of the batch
                         {keys[i]: {"new_tokens": 96, "forwards.sub": 40} for i in batch})  # of each answer
        texts = [store[key] for key in keys]
        store.recount()       # what is on disk now, of all processes: cost, segments, wall time, batch sizes

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
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fast_dllm.errors import TakenOverError
from fast_dllm.spec.locks import read_owner

FORMAT = 1  # part of the key: a store of another format is never read
PROGRESS_SECONDS = 2.0
SYNC_SECONDS = 1.0
_SEGMENT_FILE = re.compile(r"(\d{3,})(?:\.shard(\d+-of-\d+(?:x\d+)?))?\.rank(\d+)\.jsonl")


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


class Ledger:
    """Answers and what they cost, each counted once.

    cost: counts, and seconds summed over processes, that is GPU-seconds. segments: the processes' lives that answered
    something, those that ran side by side as one. began, ended: Unix times of the first batch's start and the last
    one's end, by the clocks of the machines they ran on. batch_sizes: size -> answers that were given in such a batch.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.cost = Cost()
        self.segments: set[tuple[str | None, int]] = set()
        self.began: float | None = None
        self.ended: float | None = None
        self.batch_sizes: Counter[int] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        """One batch's record, as AnswerStore.append writes it. What the batch cost as a whole is split evenly."""
        answers, costs = record["answers"], record.get("costs", {})
        new = [key for key in answers if key not in self.answers]
        if answers and not new:
            return
        self.cost.add(_part(record["counters"], len(new), len(answers)))
        for key in new:
            self.answers[key] = answers[key]
            self.cost.add(costs.get(key, {}))
        self.batch_sizes[record.get("batch_size", len(answers))] += len(new)
        if "ended" in record:
            self.began = min(record["began"], record["began"] if self.began is None else self.began)
            self.ended = max(record["ended"], record["ended"] if self.ended is None else self.ended)

    @property
    def num_segments(self) -> int:
        """How often the run was begun: shares side by side are one segment, the lives of one share are several, and
        what was answered without shares before or after them is another."""
        lives = Counter(share for share, _ in self.segments)
        return lives.pop(None, 0) + max(lives.values(), default=0)

    @property
    def num_shares(self) -> int:
        """Shares that answered something; 1 of a run that was not split."""
        return max(len({share for share, _ in self.segments if share is not None}), 1)

    @property
    def wall_seconds(self) -> float | None:
        """From the first batch's start to the last one's end, waits between jobs included."""
        return None if self.began is None or self.ended is None else self.ended - self.began


def combined(ledgers: Iterable[Ledger]) -> Ledger:
    """Of processes side by side that kept no answers on disk: one segment."""
    total = Ledger()
    for one in ledgers:
        total.answers |= one.answers
        total.cost.add(one.cost)
        total.batch_sizes += one.batch_sizes
        for name, choose in (("began", min), ("ended", max)):
            values = [value for value in (getattr(total, name), getattr(one, name)) if value is not None]
            setattr(total, name, choose(values, default=None))
    total.segments.add((None, 1))
    return total


def _part(counters: Mapping[str, float], new: int, whole: int) -> Mapping[str, float]:
    """What the `new` of a batch's `whole` answers cost."""
    return counters if new == whole else {name: value * new / whole for name, value in counters.items()}


def batch_record(
    answers: Mapping[str, object],
    counters: Mapping[str, float],
    costs: Mapping[str, Mapping[str, float]] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """A batch that ends now, and began when the seconds in its counters say. costs: of single answers, by key."""
    ended = time.time()
    record = {"answers": dict(answers), "counters": dict(counters), "costs": dict(costs or {})}
    record["batch_size"] = len(answers) if batch_size is None else batch_size
    spent = sum(value for name, value in counters.items() if name.startswith("seconds"))
    return record | {"began": round(ended - spent, 3), "ended": round(ended, 3)}


class _SyncedFile:
    """A file that is written at once and synced within SYNC_SECONDS, by a thread of its own, at most once in that time.

    A sync that failed is raised by the next write, or by close.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._dirty = self._closing = False
        self._fault: OSError | None = None
        self._thread = threading.Thread(target=self._sync_in_time, name="answers", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """The whole line or, where the disk is full, nothing of it and an OSError."""
        self._raise_fault()
        start = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, start)  # leave no half line for a later batch to be glued to
            raise
        with self._changed:
            self._dirty = True
            self._changed.notify()

    def _sync_in_time(self) -> None:
        last = -SYNC_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                if not self._dirty:
                    return
                self._changed.wait_for(lambda: self._closing, timeout=last + SYNC_SECONDS - time.monotonic())
                self._dirty = False
            last = time.monotonic()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._fault = error
                return

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def close(self) -> None:
        """What is written is on disk when this returns; again, it does nothing."""
        if self._descriptor < 0:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        os.close(self._descriptor)
        self._descriptor = -1
        self._raise_fault()


class AnswerStore:
    """The answers given under one identity, by this process and by those before it. Iterates over request keys.

    share: the name of the share that this process answers, like "0-of-4"; None: everything. records: the folder for its
    progress; None: the run's. claim: the folder that says
    that the run, or the share, is this process's own (sbatch/lock.sh); None: nobody else can be at it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, object],
        *,
        rank: int = 0,
        claim: Path | None = None,
        share: str | None = None,
        records: Path | None = None,
    ) -> None:
        self._claim, self._owner = claim, read_owner(claim) if claim else ""
        self.key = hashlib.sha256(_canonical([FORMAT, dict(identity)]).encode()).hexdigest()
        self.run_folder = Path(folder)
        self.folder = self.run_folder / "answers" / self.key[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_torn = 0  # lines that could not be read: at most the last of each file, unless the disk is at fault
        self._rank, self._share, self._total, self._counted = rank, share, 0, 0
        self._own = Ledger()
        self._run_total: int | None = None
        self._progress = (records or self.run_folder) / f"progress.rank{rank}.json"
        self._progress.parent.mkdir(parents=True, exist_ok=True)
        self._started = self._reported = time.monotonic()
        self._write_identity(identity)
        self._ledger = self.recount()
        self.num_recovered = len(self._ledger.answers)
        self._file = self._open_segment()

    def _write_identity(self, identity: Mapping[str, object]) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            temporary = path.with_suffix(f".rank{self._rank}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(identity), indent=2, sort_keys=True) + "\n")
            temporary.replace(path)

    def _files(self) -> list[tuple[Path, int, str | None, int]]:
        """(path, number, share, rank) of every process's file."""
        found = ((file, _SEGMENT_FILE.fullmatch(file.name)) for file in sorted(self.folder.iterdir()))
        return [(file, int(match[1]), match[2], int(match[3])) for file, match in found if match]

    def _open_segment(self) -> _SyncedFile:
        """A file that did not exist before."""
        own = [number for _, number, share, rank in self._files() if (share, rank) == (self._share, self._rank)]
        self._segment = max(own, default=0)
        part = "" if self._share is None else f".shard{self._share}"
        while True:
            self._segment += 1
            try:
                path = self.folder / f"{self._segment:03d}{part}.rank{self._rank}.jsonl"
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            except FileExistsError:
                continue
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the file's name must survive too
            finally:
                os.close(folder)
            return _SyncedFile(descriptor)

    def recount(self) -> Ledger:
        """What all processes have written until now, read from the files."""
        ledger, self.num_torn = Ledger(), 0
        for file, number, share, _ in self._files():
            for line in file.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("torn")
                    ledger.add(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.num_torn += 1
                else:
                    ledger.segments.add((share, number))
        return ledger

    def total(self, ledgers: Sequence[Ledger]) -> Ledger:
        """What all processes and segments of the run did. ledgers: what each process of now did.

        Another process that took this one for dead may have finished the run and removed the files: then it is what
        this process knows, where it is alone, and else TakenOverError.
        """
        try:
            found = self.recount()
        except FileNotFoundError:
            found = Ledger()
        if all(ledger.answers.keys() <= found.answers.keys() for ledger in ledgers):
            return found
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
        where this process answers a share of them."""
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
        counters: Mapping[str, float],
        costs: Mapping[str, Mapping[str, float]] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Add one batch's answers and what they cost (see batch_record). On return they outlive this process; the disk
        has them within SYNC_SECONDS. Raises TakenOverError, and OSError also for an earlier batch that the disk could
        not be given."""
        self.check_claim()
        record = batch_record(answers, counters, costs, batch_size)
        self._file.write((json.dumps(record) + "\n").encode())
        self._counted += sum(key not in self for key in answers)
        self._ledger.add(record)
        self._ledger.segments.add((self._share, self._segment))
        self._own.add(record)
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report_progress()

    @property
    def counters(self) -> Cost:
        """What is known to this process: its own answers, and those that were there when it began."""
        return self._ledger.cost

    @property
    def num_segments(self) -> int:
        return self._ledger.num_segments

    def report_progress(self) -> None:
        """Write progress.rank<r>.json; a reader sees the old file or the new one. A share's tokens and seconds are
        those of this process, a whole run's those of all before it too."""
        self._reported = time.monotonic()
        counters = self._ledger.cost if self._share is None else self._own.cost
        progress = {
            "schema_version": 1,
            "answered": min(self._counted, self._total),
            "total": self._total,
            "new_tokens": counters["new_tokens"],
            "seconds_generating": round(counters["seconds_generating"], 3),
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
