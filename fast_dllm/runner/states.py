"""What each configuration's state is, from files, one look at the queue and one at the accounting."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from fast_dllm.runner.failures import TEXTS, class_of_state
from fast_dllm.runner.files import read_json
from fast_dllm.runner.request import Request, Run
from fast_dllm.runner.summaries import Judge, Judgement

SECONDS = 30  # that Slurm is waited for
FORCE_FILE = "force"  # in a run's folder: --force, until the run begins


@dataclass(frozen=True)
class Job:
    job_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class State:
    """state: complete earlier stale running queued corrupt failed pending. detail: for people. job: its id or ""."""

    run: Run
    state: str
    detail: str
    job: str
    judgement: Judgement

    @property
    def is_complete(self) -> bool:
        return self.state in ("complete", "earlier")


def ask(*command: str) -> tuple[bool, str]:
    """(whether it worked, what it said), of one of Slurm's programs."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {SECONDS} s"
    except OSError as error:
        return False, str(error)
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return done.returncode == 0, out if done.returncode == 0 else " ".join((out + err).split())


def read_queue(root: Path, runs: list[Run]) -> tuple[dict[str, Job], str]:
    """(job by run.path, why the queue cannot be known or ""). A running job hides the one that waits to continue it.
    Jobs of other folders with the same names are not this project's."""
    if not shutil.which("squeue"):
        return {}, ""
    names = ",".join(run.path for run in runs)
    worked, text = ask("squeue", "--noheader", f"--name={names}", "--format=%i|%T|%r|%j|%Z")
    if not worked:
        return {}, text or "it said nothing"
    queued: dict[str, Job] = {}
    for line in text.splitlines():
        fields = line.split("|", 4)
        if len(fields) == 5 and fields[4] == str(root):
            job_id, state, reason, name, _ = fields
            if name not in queued or state != "PENDING":
                queued[name] = Job(job_id, state, reason)
    return queued, ""


def read_ended(job_ids: list[str]) -> dict[str, str]:
    """job -> "state|exit code", of jobs that are gone and left no record."""
    if not job_ids or not shutil.which("sacct"):
        return {}
    worked, text = ask("sacct", "-X", "-n", "-P", "-j", ",".join(job_ids), "-o", "JobIDRaw,State,ExitCode")
    lines = (line.split("|", 1) for line in text.splitlines() if "|" in line) if worked else ()
    return {job_id: state for job_id, state in lines if job_id}


# -- locks, as sbatch/lock.sh makes them -------------------------------------------------------------------------------
def latest_claim(base: Path) -> Path | None:
    return max(base.parent.glob(f"{base.name}.[0-9][0-9][0-9][0-9]"), default=None)


def lock_owner(base: Path) -> str:
    """The "host pid" of the latest claim."""
    claim = latest_claim(base)
    try:
        return (claim / "owner").read_text().strip() if claim else "another process"
    except OSError:
        return "another process"


def process_gone(pid: str) -> bool:
    """Of this host. A zombie is gone."""
    if not pid.isdigit():
        return True
    try:
        if Path("/proc/self").is_dir():
            state = re.search(r"^State:\s*(.)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            return state is None or state[1] in "ZX"
        os.kill(int(pid), 0)
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True
    return False


def lock_is_held(base: Path) -> bool:
    """At a glance: of another host its clock has to be trusted."""
    claim = latest_claim(base)
    if claim is None or (claim / "released").exists():
        return False
    host, _, pid = lock_owner(base).partition(" ")
    if host == socket.gethostname():
        return not process_gone(pid)
    try:
        return time.time() - (claim / "heartbeat").stat().st_mtime < 120
    except OSError:
        return False


# -- states ------------------------------------------------------------------------------------------------------------
def examine(request: Request) -> tuple[list[State], str]:
    """The states of the request's runs, in their order, and why the queue cannot be known or ""."""
    runs, judge, root = request.runs(), Judge(request), request.root
    judged = {run.path: Judgement("pending") if is_forced(root, run) else judge.judge(run) for run in runs}
    queued, fault = read_queue(root, runs)
    records = {run.path: Records.of(root / "results" / run.path) for run in runs}
    unknown = [
        records[run.path].job
        for run in runs
        if run.path not in queued and records[run.path].ended_silently and not judged[run.path].is_whole
    ]
    ended = read_ended([job for job in unknown if job])
    return [
        state_of(root, run, judged[run.path], queued.get(run.path), records[run.path], ended) for run in runs
    ], fault


def is_forced(root: Path, run: Run) -> bool:
    return (root / "results" / run.path / FORCE_FILE).exists()


@dataclass(frozen=True)
class Records:
    """job.json (the last job, as it was submitted or began) and failure.json (why it ended)."""

    folder: Path
    begun: bool
    job: str
    log: str
    failure: Mapping[str, object]

    @classmethod
    def of(cls, folder: Path) -> Records:
        job, failure = read_json(folder / "job.json")[0], read_json(folder / "failure.json")[0]
        told = job or {}
        return cls(folder, job is not None, str(told.get("job_id", "")), str(told.get("log", "")), failure or {})

    @property
    def tells_why(self) -> bool:
        """The failure is that job's."""
        return bool(self.failure.get("class")) and str(self.failure.get("job_id", "")) == self.job

    @property
    def ended_silently(self) -> bool:
        return self.begun and not self.tells_why

    @property
    def has_answered(self) -> bool:
        return (self.folder / "answers").is_dir() or any(self.folder.glob("progress.rank*.json"))


def state_of(root: Path, run: Run, judged: Judgement, job: Job | None, records: Records, ended: Mapping) -> State:
    folder = root / "results" / run.path
    state, detail = judged.state, judged.detail
    if state == "pending":
        detail = "pending: to be run again (--force)" if is_forced(root, run) else "pending"
    # a job that waits to continue one that needs no continuation is about to be removed
    if job and judged.is_complete and job.state == "PENDING" and job.reason.startswith("Dependency"):
        job = None
    if job:
        if job.state == "PENDING":
            return State(run, "queued", f"queued, job {job.job_id}, {job.reason}", job.job_id, judged)
        return State(run, "running", f"running, job {job.job_id}{progress(folder)}", job.job_id, judged)
    if lock_is_held(folder / ".lock"):
        process = lock_owner(folder / ".lock")
        return State(run, "running", f"running, no job: process {process}{progress(folder)}", "", judged)
    if state != "pending":
        return State(run, state, detail, "", judged)
    if records.tells_why:
        told = failure_detail(str(records.failure["class"]), records.job, str(records.failure.get("log") or ""))
        return State(run, "failed", f"failed: {told}", records.job, judged)
    # one of several that share a process is recorded before its turn comes
    if records.begun and (records.job or records.has_answered):
        told = failure_detail(class_of_state(ended.get(records.job, "")) or "no_result", records.job, records.log)
        return State(run, "failed", f"failed: {told}", records.job, judged)
    return State(run, "pending", detail, records.job, judged)


def failure_detail(name: str, job: str, log: str) -> str:
    return TEXTS.get(name, name) + (f", job {job}" if job else "") + (f", log: {log}" if log else "")


def progress(folder: Path) -> str:
    """Like ", 412/1319, 48.9 tok/s, ~25 min left", or nothing."""
    told = read_json(folder / "progress.rank0.json")[0]
    names = ("answered", "total", "new_tokens", "seconds_generating", "segment_answered", "segment_seconds")
    values = [(told or {}).get(name, 0) for name in names]
    if not told or not all(isinstance(value, (int, float)) for value in values):
        return ""
    answered, total, tokens, seconds, own, lasted = values
    text = f", {answered:d}/{total:d}" if isinstance(answered, int) and isinstance(total, int) else ""
    if tokens > 0 and seconds > 0:
        text += f", {tokens / seconds:.1f} tok/s"
    if own > 0 and total > answered:
        text += f", ~{int((total - answered) * lasted / own / 60) + 1} min left"
    return text
