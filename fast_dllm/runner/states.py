"""Finds the state of each run, from its files, the queue (asked once) and Slurm's accounting (asked once)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Sequence

from fast_dllm.record.judgement import Judge, Judgement
from fast_dllm.record.shards import LOCK
from fast_dllm.runner import reasons
from fast_dllm.runner.failures import TEXTS, class_of_state
from fast_dllm.runner.progress import Progress, describe, progress_text
from fast_dllm.runner.records import Records, is_forced
from fast_dllm.runner.roofline import type_of_card
from fast_dllm.runner.slurm import Job, read_ended, read_queue
from fast_dllm.spec.locks import is_held, owner_of
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shard_names import DONE_FILE, job_words, names_of, shard_folder, sharding


@dataclass(frozen=True)
class State:
    """The state of one run.

    state: that of a Judgement, or running, queued, blocked, failed. detail: for people. job: its id or "". asked_gpu:
    the GPU type that the job asked for, or "". jobs: all jobs of this run in the queue.
    """

    run: Run
    state: str
    detail: str
    job: str
    judgement: Judgement
    asked_gpu: str = ""
    jobs: tuple[Job, ...] = ()

    @property
    def is_complete(self) -> bool:
        return self.judgement.is_complete and self.state == self.judgement.state

    @property
    def gpu(self) -> str:
        """The GPU type on which the run ran, runs or will run; "" if that is not known."""
        summary = self.judgement.summary
        return type_of_card(summary.gpu) if self.is_complete and summary and summary.gpu else self.asked_gpu


def examine(request: Request) -> tuple[list[State], str]:
    """(the states of the request's runs, in order; why Slurm did not tell the queue, or "")."""
    runs, judge, root = request.runs(), Judge(request), request.root
    judgements = {run.path: Judgement("pending") if is_forced(root, run) else judge.judge(run) for run in runs}
    queued, fault = read_queue(root, [run.path for run in runs])
    records = {run.path: Records.of(root / "results" / run.path) for run in runs}
    # Ask the accounting once, about all jobs that ended without a failure.json.
    silent = [
        records[run.path].job
        for run in runs
        if run.path not in queued and records[run.path].ended_silently and not judgements[run.path].is_whole
    ]
    for run in runs:
        ended = ended_shards(records[run.path], queued.get(run.path, []))
        silent += [shard.job for shard in ended.values() if not shard.failure]
    accounting = read_ended([job for job in silent if job])
    states = []
    for run in runs:
        jobs = queued.get(run.path, [])
        state = _state_of(root, run, judgements[run.path], jobs, records[run.path], accounting)
        damage = records[run.path].fault
        if damage and not state.is_complete:
            state = replace(state, detail=f"{state.detail}; {damage}")
        states.append(state)
    return states, fault


def _state_of(
    root: Path, run: Run, judgement: Judgement, jobs: list[Job], records: Records, accounting: Mapping[str, str]
) -> State:
    """The state of a run. The queue takes precedence over a lock, a lock over a result, a result over a failure."""
    folder = records.folder
    # Leave out a waiting successor of a complete run: it is about to be cancelled.
    jobs = [job for job in jobs if not (judgement.is_complete and job.waits)]
    if jobs:
        return _queued(run, judgement, jobs, records, accounting)
    if is_held(folder / LOCK):
        detail = f"running, no job: process {owner_of(folder / LOCK)}{progress_text(Progress.read(folder))}"
        return State(run, "running", detail, "", judgement)
    if judgement.state != "pending":
        return State(run, judgement.state, judgement.detail, "", judgement)
    if records.tells_why and records.failure["class"] == "interrupted":
        detail = f"pending: interrupted{progress_text(Progress.read(folder))}"
        return State(run, "pending", detail, records.job, judgement)
    if records.tells_why:
        why = _failure_text(records.failure["class"], records.job, records.failure.get("log", ""))
        return State(run, "failed", f"failed: {why}", records.job, judgement)
    # If one process evaluates several runs, job.json is written for all of them before the first one starts.
    if records.begun and (records.job or records.has_answered):
        why = _failure_text(_class_from_accounting(records.job, accounting), records.job, records.log)
        return State(run, "failed", f"failed: {why}", records.job, judgement)
    detail = "pending: to be run again (--force)" if is_forced(root, run) else "pending"
    return State(run, "pending", detail, records.job, judgement)


# -- in the queue ------------------------------------------------------------------------------------------------------
def _queued(run: Run, judgement: Judgement, jobs: list[Job], records: Records, accounting: Mapping[str, str]) -> State:
    """The state of a run with queued jobs: that of its running job or its shards; waiting successors do not count."""
    shard_jobs = [job for job in jobs if job.shards]
    shown = next((job for job in reversed(jobs) if job.state != "PENDING" and not job.shards), None)
    if shown is None and not shard_jobs:
        shown = jobs[0]
    if shown is not None:
        state, detail = _state_of_job(shown, records.folder)
        return State(run, state, detail, shown.job_id, judgement, shown.gpu, tuple(jobs))
    state, detail, ids = _state_of_shards(shard_jobs, records, accounting)
    return State(run, state, detail, ids, judgement, shard_jobs[0].gpu, tuple(jobs))


def _state_of_job(job: Job, folder: Path) -> tuple[str, str]:
    """(state, detail) of a run from its one job."""
    reason = reasons.blocked(job)
    if reason:
        says, remedy = reason
        return "blocked", f"blocked: {says} ({job.reason}), job {job.job_id}; {remedy}"
    if job.state == "PENDING":
        segments = num_segments(folder)
        text = f"queued, job {job.job_id}, {reasons.waiting(job)}"
        return "queued", text + (f", part {segments + 1}" if segments else "")
    progress = Progress.read(folder)
    return "running", f"running, job {job.job_id}{progress_text(progress)}{_part_text(folder, job, progress)}"


def _state_of_shards(jobs: list[Job], records: Records, accounting: Mapping[str, str]) -> tuple[str, str, str]:
    """(state, detail, job ids) of a run from the jobs of its shards."""
    folder = records.folder
    for job in jobs:
        reason = reasons.blocked(job)
        if reason:
            says, remedy = reason
            return "blocked", f"blocked: {says} ({job.reason}), job {job.job_id}; {remedy}", job.job_id
    running = [job for job in jobs if job.state != "PENDING"]
    ids = job_words([job.job_id for job in running or jobs])
    if running and is_held(folder / LOCK):  # the last of them finishes the run
        return "running", f"running, job {ids}{progress_text(Progress.read(folder))}", ids
    failed = ""
    for number, shard in ended_shards(records, jobs).items():
        # A job that starts removes the failure.json of the one before, so this one is of the last job.
        name = shard.failure.get("class") or _class_from_accounting(shard.job, accounting)
        failed += f"; shard {number} failed: {_failure_text(name, shard.job, shard.log)}"
    count = _num_shards(records, jobs)
    if not running:
        first = min(jobs, key=lambda job: job.waits)
        return "queued", f"queued, job {ids}, {reasons.waiting(first)}, {count} shards{failed}", ids
    at_work: set[int] = set().union(*(job.shards for job in running))
    return "running", f"running, job {ids}{_progress_of_shards(records, count, len(at_work))}{failed}", ids


def _num_shards(records: Records, jobs: Sequence[Job]) -> int:
    """Into how many shards the run was divided, as it was submitted."""
    return records.shards or len(set().union(*(job.shards for job in jobs)))


def ended_shards(records: Records, jobs: Sequence[Job]) -> dict[int, Records]:
    """Number -> records of the shards that are not answered and whose chain of jobs has ended.

    Empty where no job answers a shard of the run.
    """
    alive: set[int] = set().union(*(job.shards for job in jobs))
    if not alive:
        return {}
    ended = {}
    for number, name in enumerate(names_of(sharding(_num_shards(records, jobs), records.gpus))):
        shard = Records.of(shard_folder(records.folder, name))
        if number not in alive and shard.begun and not (shard.folder / DONE_FILE).exists():
            ended[number] = shard
    return ended


def _progress_of_shards(records: Records, count: int, at_work: int) -> str:
    """Like ", 412/1319, 3 of 4 shards, 180.2 tok/s, ~6 min left": answers of all shards, speed of those at work."""
    answered = total = 0
    tokens_per_second = answers_per_second = 0.0
    for name in names_of(sharding(count, records.gpus)):
        folder = shard_folder(records.folder, name)
        works = not (folder / DONE_FILE).exists() and is_held(folder / LOCK)
        for path in folder.glob("progress.rank*.json"):
            progress = Progress.read(folder, path.name)
            if progress is None:
                continue
            answered += progress.answered
            total = max(total, progress.run_total)
            if works:
                tokens_per_second += progress.tokens_per_second
                answers_per_second += progress.answers_per_second
    left = (total - answered) / answers_per_second if answers_per_second and total > answered else None
    return describe(answered, total, tokens_per_second, left, f", {at_work} of {count} shards")


def num_segments(folder: Path) -> int:
    """How many jobs, or processes by hand, have answered something of a run in one piece."""
    numbers = (re.match(r"(\d+)\.rank", path.name) for path in (folder / "answers").glob("*/*.jsonl"))
    return max((int(match[1]) for match in numbers if match), default=0)


def _part_text(folder: Path, job: Job, progress: Progress | None) -> str:
    """Like ", part 2 of about 3": which of the jobs that a run takes this one is.

    How many follow comes from the questions that are left and the job's wall time.
    """
    part = max(1, num_segments(folder))
    left = progress.seconds_left if progress else None
    if left is None:
        return f", part {part}" if part > 1 else ""
    total = part + (math.ceil(max(0, left - job.left) / job.limit) if 0 < job.limit < math.inf else 0)
    return f", part {part} of about {total}" if total > 1 else ""


# -- failures ----------------------------------------------------------------------------------------------------------
def _class_from_accounting(job: str, accounting: Mapping[str, str]) -> str:
    """The failure class of a job that ended without a record of why."""
    return class_of_state(accounting.get(job, "")) or "no_result"


def _failure_text(name: str, job: str, log: str) -> str:
    return TEXTS.get(name, name) + (f", job {job}" if job else "") + (f", log: {log}" if log else "")
