"""The runner's own files of a run: job.json, failure.json and the mark of --force.

They are in results/<experiment>/<task>/<configuration>/; those of a shard in shards/<i>-of-<N>/ below that.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.record.judgement import Judge
from fast_dllm.runner import failures
from fast_dllm.spec.files import printable, read_json, remove, write_json, write_whole
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shard_names import DONE_FILE, MAX_GPUS, MAX_SHARDS, shard_folder

JOB_FILE, FAILURE_FILE = "job.json", "failure.json"
MOST_RECORD_BYTES, MOST_TEXT = 2**20, 1000
FORCE_FILE = "force"  # in a run's folder: the next evaluation starts again from the first question


def folder_of(request: Request, run: Run) -> Path:
    """The folder with the records of a run, or of the one shard of it that the request names."""
    return shard_folder(request.root / "results" / run.path, request.shard)


# -- job.json and failure.json -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Records:
    """The contents of job.json (the last job) and failure.json (why it failed). begun: whether job.json exists."""

    folder: Path
    begun: bool
    job: str
    log: str
    shards: int  # of the run; 0 if it is one job
    gpus: int  # of each job
    failure: Mapping[str, str]  # class, job_id and log, printable; empty where there is no record
    fault: str = ""  # what is wrong with the files, for people

    @classmethod
    def of(cls, folder: Path) -> Records:
        job, job_fault = read_json(folder / JOB_FILE, MOST_RECORD_BYTES)
        failure, failure_fault = read_json(folder / FAILURE_FILE, MOST_RECORD_BYTES)
        content = job or {}
        counts = {"shards": 0, "gpus": 1}
        for name, most in (("shards", MAX_SHARDS), ("gpus", MAX_GPUS)):
            value = content.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
                counts[name] = value or counts[name]
            elif value is not None:
                job_fault = f"{name} is {printable(json.dumps(value))[:60]}, not a whole number up to {most}"
        faults = ((JOB_FILE, job_fault), (FAILURE_FILE, failure_fault))
        return cls(
            folder,
            begun=job is not None,
            job=_text(content, "job_id"),
            log=_text(content, "log"),
            shards=counts["shards"],
            gpus=counts["gpus"],
            failure={name: _text(failure or {}, name) for name in ("class", "job_id", "log") if failure},
            fault="; ".join(f"{name} cannot be used: {fault}" for name, fault in faults if fault),
        )

    @property
    def tells_why(self) -> bool:
        """Whether failure.json is of the last job, and so says why it failed."""
        return bool(self.failure.get("class")) and self.failure.get("job_id") == self.job

    @property
    def ended_silently(self) -> bool:
        """Whether the last job has left no failure.json."""
        return self.begun and not self.tells_why

    @property
    def has_answered(self) -> bool:
        return (self.folder / "answers").is_dir() or any(self.folder.glob("progress.rank*.json"))


def _text(content: Mapping[str, object], name: str) -> str:
    """A text or a whole number of a record, printable and shortened; "" for anything else."""
    value = content.get(name)
    return printable(str(value))[:MOST_TEXT] if isinstance(value, (str, int)) else ""


def record_job(folder: Path, job: str, log: str, **further: object) -> None:
    """Write job.json: the job whose end `--status` asks the accounting about, if it cannot write failure.json."""
    write_json(folder / JOB_FILE, {"schema_version": 1, "job_id": job, "log": printable(log), **further})


def failed_before(request: Request, run: Run, after: Iterable[str]) -> str:
    """The failure class, if one of the jobs `after` failed on this run in a way that a retry would repeat; else ""."""
    failure = Records.of(folder_of(request, run)).failure
    job, name = failure.get("job_id", ""), failure.get("class", "")
    return name if job and job in after and name not in ("terminated", *failures.CONTINUED) else ""


# -- --force -----------------------------------------------------------------------------------------------------------
def is_forced(root: Path, run: Run) -> bool:
    return (root / "results" / run.path / FORCE_FILE).exists()


def force(request: Request) -> None:
    """Mark the request's runs, so that their next evaluation starts from the first question and removes the mark.

    Until then the old summary does not count. A job that continues one that has started finds no mark, and so keeps
    the answers.
    """
    for run in request.runs():
        folder = folder_of(request, run)
        write_whole(folder / FORCE_FILE, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
        remove(folder / "job.json", folder / "failure.json")  # these are of the run before


# -- what is left to do ------------------------------------------------------------------------------------------------
def is_done(request: Request, run: Run, judge: Judge) -> bool:
    """Whether the run has a whole result and is not marked by --force; for a shard, whether it is answered."""
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
