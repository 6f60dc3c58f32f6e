"""What each configuration's state is, from files, one look at the queue and one at the accounting."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Optional, Tuple

from fast_dllm.record.judgement import Judge, Judgement
from fast_dllm.runner import reasons
from fast_dllm.runner.failures import TEXTS, class_of_state
from fast_dllm.runner.records import Records, is_forced
from fast_dllm.runner.roofline import type_of_card
from fast_dllm.runner.slurm import Job, read_ended, read_queue
from fast_dllm.spec.files import read_json
from fast_dllm.spec.locks import is_held, owner_of
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shares import DONE_FILE, division, job_words, names_of, share_folder

MOST_AMOUNT = 1e12
Progress = Optional[Tuple[float, ...]]  # see read_progress


@dataclass(frozen=True)
class State:
    """state: that of a Judgement, or running queued blocked failed. detail: for people. job: its id or "". asked_gpu:
    the type that it asked for, or "". jobs: all that are in the queue for it."""

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
        """The type of GPU that it ran, runs or will run on; "" where nothing tells."""
        summary = self.judgement.summary
        return type_of_card(summary.gpu) if self.is_complete and summary and summary.gpu else self.asked_gpu


# -- states ------------------------------------------------------------------------------------------------------------
def examine(request: Request) -> tuple[list[State], str]:
    """The states of the request's runs, in their order, and why the queue cannot be known or ""."""
    runs, judge, root = request.runs(), Judge(request), request.root
    judged = {run.path: Judgement("pending") if is_forced(root, run) else judge.judge(run) for run in runs}
    queued, fault = read_queue(root, [run.path for run in runs])
    records = {run.path: Records.of(root / "results" / run.path) for run in runs}
    unknown = [
        records[run.path].job
        for run in runs
        if run.path not in queued and records[run.path].ended_silently and not judged[run.path].is_whole
    ]
    for run in runs:
        parts = ended_shards(root / "results" / run.path, queued.get(run.path, []))
        unknown += [part.job for part in parts.values() if not part.failure]
    ended = read_ended([job for job in unknown if job])
    states = []
    for run in runs:
        state = state_of(root, run, judged[run.path], queued.get(run.path, []), records[run.path], ended)
        damage = records[run.path].fault
        states.append(replace(state, detail=f"{state.detail}; {damage}") if damage and not state.is_complete else state)
    return states, fault


def state_of(root: Path, run: Run, judged: Judgement, jobs: list[Job], records: Records, ended: Mapping) -> State:
    folder = root / "results" / run.path
    state, detail = judged.state, judged.detail
    if state == "pending":
        detail = "pending: to be run again (--force)" if is_forced(root, run) else "pending"
    # a job that waits to continue one that needs no continuation is about to be removed
    jobs = [job for job in jobs if not (judged.is_complete and job.waits)]
    shard_jobs = [job for job in jobs if job.shards]
    # a running job hides the one that waits to continue it, and one that waits for shares is hidden by these
    job = next((job for job in reversed(jobs) if job.state != "PENDING" and not job.shards), None)
    if job is None and not shard_jobs:
        job = next(iter(jobs), None)
    if job or shard_jobs:
        now, ids = (state_of_job(job, folder), job.job_id) if job else state_of_shards(shard_jobs, folder, ended)
        return State(run, *now, ids, judged, (job or shard_jobs[0]).gpu, tuple(jobs))
    if is_held(folder / ".lock"):
        process = owner_of(folder / ".lock")
        return State(run, "running", f"running, no job: process {process}{progress(read_progress(folder))}", "", judged)
    if state != "pending":
        return State(run, state, detail, "", judged)
    if records.tells_why and records.failure["class"] == "interrupted":
        return State(run, "pending", f"pending: interrupted{progress(read_progress(folder))}", records.job, judged)
    if records.tells_why:
        told = failure_detail(records.failure["class"], records.job, records.failure.get("log", ""))
        return State(run, "failed", f"failed: {told}", records.job, judged)
    # one of several that share a process is recorded before its turn comes
    if records.begun and (records.job or records.has_answered):
        told = failure_detail(class_of_state(ended.get(records.job, "")) or "no_result", records.job, records.log)
        return State(run, "failed", f"failed: {told}", records.job, judged)
    return State(run, "pending", detail, records.job, judged)


def state_of_job(job: Job, folder: Path) -> tuple[str, str]:
    never = reasons.blocked(job)
    if never:
        says, remedy = never
        return "blocked", f"blocked: {says} ({job.reason}), job {job.job_id}; {remedy}"
    if job.state == "PENDING":
        done = segments(folder)
        return "queued", f"queued, job {job.job_id}, {reasons.waiting(job)}" + (f", part {done + 1}" if done else "")
    now = read_progress(folder)
    return "running", f"running, job {job.job_id}{progress(now)}{parts(folder, job, now)}"


def state_of_shards(jobs: list[Job], folder: Path, ended: Mapping) -> tuple[tuple[str, str], str]:
    """((state, detail), the jobs' ids) of a run that is answered in shares."""
    for job in jobs:
        never = reasons.blocked(job)
        if never:
            return ("blocked", f"blocked: {never[0]} ({job.reason}), job {job.job_id}; {never[1]}"), job.job_id
    running = [job for job in jobs if job.state != "PENDING"]
    ids = job_words([job.job_id for job in running or jobs])
    if running and is_held(folder / ".lock"):  # the last of them finishes the run
        return ("running", f"running, job {ids}{progress(read_progress(folder))}"), ids
    count, text = division_of(folder, jobs)
    failed = ""
    for number, part in ended_shards(folder, jobs).items():
        why = str(part.failure.get("class") or class_of_state(ended.get(part.job, "")) or "no_result")
        failed += f"; shard {number} failed: {failure_detail(why, part.job, part.log)}"
    if not running:
        waits = min(jobs, key=lambda job: job.waits)
        return ("queued", f"queued, job {ids}, {reasons.waiting(waits)}, {count} shards{failed}"), ids
    at_work: set[int] = set().union(*(job.shards for job in running))
    return ("running", f"running, job {ids}{progress_of_shards(folder, text, len(at_work), count)}{failed}"), ids


def division_of(folder: Path, jobs: list[Job]) -> tuple[int, str]:
    """(shares, their division) of a run, as it was submitted."""
    records = Records.of(folder)
    count = records.shards or len(set().union(*(job.shards for job in jobs)))
    return count, division(count, records.gpus)


def ended_shards(folder: Path, jobs: list[Job]) -> dict[int, Records]:
    """Of a run whose shares are at work: those that are not answered, and whose chain of jobs has ended. A failure that
    is recorded is of the last one: what begins removes it."""
    alive: set[int] = set().union(*(job.shards for job in jobs))
    parts = (Records.of(share_folder(folder, name)) for name in names_of(division_of(folder, jobs)[1])) if alive else ()
    return {
        number: part
        for number, part in enumerate(parts)
        if number not in alive and part.begun and not (part.folder / DONE_FILE).exists()
    }


def progress_of_shards(folder: Path, text: str, at_work: int, count: int) -> str:
    """Like ", 412/1319, 3 of 4 shards, 180.2 tok/s, ~6 min left": of all shares of a division; speed and time of
    those at work."""
    answered = total = 0
    speed = rate = 0.0
    for name in names_of(text):
        part = share_folder(folder, name)
        at_it = not (part / DONE_FILE).exists() and is_held(part / ".lock")
        for path in part.glob("progress.rank*.json"):
            now = read_progress(part, path.name)
            if now is None:
                continue
            answered += int(now[0])
            run_total = (read_json(path)[0] or {}).get("run_total")
            if isinstance(run_total, int) and _is_amount(run_total):
                total = max(total, run_total)
            _, _, tokens, seconds, own, lasted = now
            speed += tokens / seconds if at_it and seconds > 0 else 0
            rate += own / lasted if at_it and lasted > 0 else 0
    told = (f", {answered}/{total}" if total else "") + f", {at_work} of {count} shards"
    told += f", {speed:.1f} tok/s" if speed else ""
    return told + (f", ~{int((total - answered) / rate / 60) + 1} min left" if rate > 0 and total > answered else "")


def segments(folder: Path) -> int:
    """How many jobs, or processes by hand, have answered something of it in one piece."""
    numbers = (re.match(r"(\d+)\.rank", path.name) for path in (folder / "answers").glob("*/*.jsonl"))
    return max((int(found[1]) for found in numbers if found), default=0)


def parts(folder: Path, job: Job, now: Progress) -> str:
    """Like ", part 2 of about 3": the jobs that it takes, from the questions that are left and the job's wall time."""
    part = max(1, segments(folder))
    left = seconds_left(now)
    if left is None:
        return f", part {part}" if part > 1 else ""
    total = part + (math.ceil(max(0, left - job.left) / job.limit) if 0 < job.limit < math.inf else 0)
    return f", part {part} of about {total}" if total > 1 else ""


def failure_detail(name: str, job: str, log: str) -> str:
    return TEXTS.get(name, name) + (f", job {job}" if job else "") + (f", log: {log}" if log else "")


def read_progress(folder: Path, name: str = "progress.rank0.json") -> Progress:
    """answered, total, new_tokens, seconds_generating; of this process alone segment_answered, segment_seconds."""
    told = read_json(folder / name)[0]
    names = ("answered", "total", "new_tokens", "seconds_generating", "segment_answered", "segment_seconds")
    values = tuple((told or {}).get(name, 0) for name in names)
    return values if told and all(map(_is_amount, values)) else None


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_AMOUNT


def seconds_left(now: Progress) -> float | None:
    answered, total, _, _, own, lasted = now or (0,) * 6
    return (total - answered) * lasted / own if own > 0 and total > answered else None


def progress(now: Progress) -> str:
    """Like ", 412/1319, 48.9 tok/s, ~25 min left", or nothing."""
    if now is None:
        return ""
    answered, total, tokens, seconds, _, _ = now
    text = f", {answered:d}/{total:d}" if isinstance(answered, int) and isinstance(total, int) else ""
    if tokens > 0 and seconds > 0:
        text += f", {tokens / seconds:.1f} tok/s"
    left = seconds_left(now)
    return text if left is None else f"{text}, ~{int(left / 60) + 1} min left"
