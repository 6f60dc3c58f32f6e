"""Jobs that continue one another: what a job hands on to the next, and whether it may go on where the last one ended.

Each job submits at its start the one that continues it, which waits for it to fail (`afternotok`): at its end there may
be no time left to submit anything. A job that ends well cancels the one that waits.
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
    """Where a job stands among those that continue one another.

    further_jobs: how many more may follow. after: the jobs that this one continues, the latest last. progress:
    records.work_done when the last one started. stalled: jobs in a row before this one that answered nothing.
    """

    further_jobs: int = 0
    after: tuple[str, ...] = ()
    progress: str = "0+0"
    stalled: int = 0

    def words_for_next(self, job: str, progress: str, stalled: int) -> list[str]:
        """The options of the job that continues this one, `job`."""
        words = ["--continue", str(self.further_jobs - 1), "--after", ",".join([*self.after, job])]
        return [*words, "--progress", progress, "--stalled", str(stalled)]


def submit_successor(request: Request, chain: Chain, stalled: int, successor: JobScript) -> str:
    """Submit the job that continues this one; returns its id, "" where there is none."""
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
    """Cancel jobs that wait for nothing any more; one that is gone already is no fault."""
    if jobs:
        ask("scancel", *jobs)


@dataclass(frozen=True)
class Decision:
    """Whether a job goes on with the work of the job before it. exit_status: where it does not."""

    goes_on: bool
    stalled: int = 0
    exit_status: int = 0


def decide(request: Request, chain: Chain, log: str) -> Decision:
    """Look how the job before this one ended. A chain ends after two jobs in a row that answered nothing."""
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
    """Write failure.json for what is missing: the job ends before it evaluates anything. text: "" for the log's end."""
    text = text or failures.end_of(request.root / log)
    for run in missing_runs(request, chain.after):
        failures.write_failure(folder_of(request, run), name, 1, log, text)


def _end_of_job(request: Request, job: str) -> str:
    """The failure class of a job that has ended.

    The record of the last run that it came to says most; a job that was killed could not write one, Slurm knows.
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
