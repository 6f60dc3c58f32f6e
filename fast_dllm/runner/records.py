"""What the runner leaves beside a result: job.json, failure.json, the mark of --force; and what they say of a run.

All of it is in results/<experiment>/<task>/<configuration>/, and of one shard in shards/<i>-of-<N>/ below that.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.record.judgement import Judge
from fast_dllm.runner import failures
from fast_dllm.spec.files import as_object, read_json, remove, write_json, write_whole
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shares import DONE_FILE, share_folder

FORCE_FILE = "force"  # in a run's folder: it is to be run again from its first question, until it begins


def folder_of(request: Request, run: Run) -> Path:
    """The folder with the records of a run, or of the one shard of it that the request names."""
    return share_folder(request.root / "results" / run.path, request.shard)


# -- job.json and failure.json -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Records:
    """job.json (the last job, written when it was submitted or began) and failure.json (why it ended)."""

    folder: Path
    begun: bool
    job: str
    log: str
    failure: Mapping[str, object]

    @classmethod
    def of(cls, folder: Path) -> Records:
        job, failure = read_json(folder / "job.json")[0], read_json(folder / "failure.json")[0]
        known = job or {}
        return cls(folder, job is not None, str(known.get("job_id", "")), str(known.get("log", "")), failure or {})

    @property
    def tells_why(self) -> bool:
        """Whether failure.json is of the last job."""
        return bool(self.failure.get("class")) and str(self.failure.get("job_id", "")) == self.job

    @property
    def ended_silently(self) -> bool:
        return self.begun and not self.tells_why

    @property
    def has_answered(self) -> bool:
        return (self.folder / "answers").is_dir() or any(self.folder.glob("progress.rank*.json"))


def record_job(folder: Path, job: str, log: str, **further: object) -> None:
    """Write job.json: the job whose end `--status` asks the accounting about, if it cannot write failure.json."""
    write_json(folder / "job.json", {"schema_version": 1, "job_id": job, "log": failures.printable(log), **further})


def failed_before(request: Request, run: Run, after: Iterable[str]) -> str:
    """The failure class, if one of the jobs `after` failed on this run in a way that a retry would repeat; else ""."""
    failure = read_json(folder_of(request, run) / "failure.json")[0] or {}
    job, name = str(failure.get("job_id") or ""), str(failure.get("class") or "")
    return name if job and job in after and name not in ("terminated", *failures.CONTINUED) else ""


# -- --force -----------------------------------------------------------------------------------------------------------
def is_forced(root: Path, run: Run) -> bool:
    return (root / "results" / run.path / FORCE_FILE).exists()


def force(request: Request) -> None:
    """Mark the request's runs: whoever evaluates them next begins with the first question and removes the mark.

    That may be the job that is submitted now, the one that continues it, or one of a later run.sh. Until then the old
    summary does not count. A job that continues one that has begun finds no mark, and goes on where that one was.
    """
    for run in request.runs():
        folder = folder_of(request, run)
        write_whole(folder / FORCE_FILE, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
        remove(folder / "job.json", folder / "failure.json")  # these are of the run before


# -- what is left to do ------------------------------------------------------------------------------------------------
def is_done(request: Request, run: Run, judge: Judge) -> bool:
    """Whether there is a whole result and nobody asked for another; for a shard, whether it is answered."""
    if not is_forced(request.root, run) and judge.judge(run).is_whole:
        return True
    return request.shard is not None and shard_is_done(request, run, judge)


def shard_is_done(request: Request, run: Run, judge: Judge) -> bool:
    """Whether the request's shard is answered by the code and the model that are evaluated now."""
    content = read_json(folder_of(request, run) / DONE_FILE)[0] or {}
    hashes = (judge.policy, judge.decoding(False))
    recorded = (content.get("generation_code_sha256"), content.get("decoding_sha256"))
    return recorded == hashes and content.get("model_path") == request.model_or_default


def missing_runs(request: Request, after: Iterable[str] = ()) -> list[Run]:
    """The request's runs that are not done and did not fail for good in one of the jobs `after`."""
    judge = Judge(request)
    return [
        run for run in request.runs() if not is_done(request, run, judge) and not failed_before(request, run, after)
    ]


def work_done(request: Request) -> str:
    """The work on disk: the number of complete runs, a plus, the number of answered batches of the others.

    A job that leaves this text as it was has answered nothing.
    """
    judge, complete, batches = Judge(request), 0, 0
    for run in request.runs():
        if is_done(request, run, judge):
            complete += 1
        elif not is_forced(request.root, run):
            shard = "" if request.shard is None else f"*.shard{request.shard}.rank"
            for file in (request.root / "results" / run.path / "answers").glob(f"**/{shard}*.jsonl"):
                batches += file.read_bytes().count(b"\n")
    return f"{complete}+{batches}"


def answers_on_disk(folder: Path) -> int:
    """How many answers of an interrupted run will be found again."""
    count = 0
    for file in (folder / "answers").glob("*/*.jsonl"):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # the last one may have been cut off
                count += len(as_object(as_object(json.loads(line)).get("answers")))
    return count
