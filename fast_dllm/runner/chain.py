"""Chains of jobs that continue one another: submits the next job, and decides whether a job may continue the last one.

Each job submits its successor when it starts, because at its end there may be no time left. The successor waits until
the job fails (`afternotok`). A job that ends well cancels its successor.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

from fast_dllm.runner import failures
from fast_dllm.runner.messages import say
from fast_dllm.runner.records import Records, folder_of, missing_runs, work_done
from fast_dllm.runner.sbatch import JobScript, has_no_place, submit
from fast_dllm.runner.slurm import ask
from fast_dllm.spec.request import Request

ACCOUNTING_TRIES, ACCOUNTING_SECONDS = 6, 5  # Slurm's accounting may lag behind
STALLED_JOBS = 2  # jobs in a row that answered nothing end a chain


@dataclass(frozen=True)
class Chain:
    """The place of a job in its chain.

    further_jobs: how many more may follow. after: the jobs that this one continues, the latest last. progress:
    records.work_done when the last one started. stalled: jobs in a row before this one that answered nothing.
    """

    further_jobs: int = 0
    after: tuple[str, ...] = ()
    progress: str = "0+0"
    stalled: int = 0

    def words_for_next(self, job: str, progress: str, stalled: int) -> list[str]:
        """The options for the successor of this job. job: the id of this job."""
        words = ["--continue", str(self.further_jobs - 1), "--after", ",".join([*self.after, job])]
        return [*words, "--progress", progress, "--stalled", str(stalled)]


def submit_successor(request: Request, chain: Chain, stalled: int, successor: JobScript) -> str:
    """Submit the job that continues this one; returns its id, or "" if there is none."""
    if chain.further_jobs <= 0:
        return ""
    job = failures.current_job()
    words = chain.words_for_next(job, work_done(request), stalled)
    submitted, reply = submit(successor.with_words(words).command(dependency=f"afternotok:{job}"), {})
    if submitted:
        say(f"job {submitted} waits to continue this one, should Slurm end it")
    else:
        hint = " (you have as many jobs as your QOS allows; run.sh submits it once there is a place)"
        say("no job to continue this one could be submitted: " + reply + (hint if has_no_place(reply) else ""))
    return submitted


def cancel(jobs: list[str]) -> None:
    """Cancel waiting jobs. It is no error if one has ended already."""
    if jobs:
        ask("scancel", *jobs)


@dataclass(frozen=True)
class Decision:
    """Whether a job continues the work of the job before it. exit_status: of this job, if it does not."""

    goes_on: bool
    stalled: int = 0
    exit_status: int = 0


def decide(request: Request, chain: Chain, log: str) -> Decision:
    """Decide from the end of the job before this one. A chain ends after two jobs in a row that answered nothing."""
    if not chain.after:
        return Decision(True, chain.stalled)
    before = chain.after[-1]
    name = _end_of_job(request, before)
    if name not in failures.CONTINUED:
        say(f"job {before} is not continued: {failures.TEXTS.get(name, name)}")
        return Decision(False)
    now = work_done(request)
    stalled = chain.stalled + 1 if now == chain.progress else 0
    say(
        f"continues job {before} ({failures.TEXTS[name]}); "
        f"complete tasks + batches: {chain.progress} when that started, now {now}"
    )
    if stalled < STALLED_JOBS:
        return Decision(True, stalled)
    record_failure(request, chain, "no_progress", "jobs before this one answered nothing, twice", log)
    say(f"not continued any more: {failures.TEXTS['no_progress']}")
    return Decision(False, stalled, exit_status=1)


def record_failure(request: Request, chain: Chain, name: str, text: str, log: str) -> None:
    """Write failure.json for all missing runs of a job that evaluates nothing. text: "" takes the end of the log."""
    text = text or failures.end_of(request.root / log)
    for run in missing_runs(request, chain.after):
        failures.write_failure(folder_of(request, run), name, 1, log, text)


def _end_of_job(request: Request, job: str) -> str:
    """The failure class of a job that has ended.

    It is taken from failure.json, or from Slurm's accounting if the job was killed before it could write one.
    """
    name = ""
    for run in request.runs():
        records = Records.of(folder_of(request, run))
        if str(records.failure.get("job_id")) == job:
            name = str(records.failure.get("class") or "")
        elif records.job == job:
            name = ""
    for number in range(ACCOUNTING_TRIES):
        if name not in ("", "terminated", "killed") or not shutil.which("sacct"):
            break
        if number:
            time.sleep(ACCOUNTING_SECONDS)
        _, text = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")
        name = failures.class_of_state(text.split("\n")[0]) if text else ""
    return name or "killed"
