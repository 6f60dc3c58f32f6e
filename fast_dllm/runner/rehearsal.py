"""run.sh --rehearse: two questions of one configuration go through all that a job does, and are interrupted once.

In order: submit; wait in the queue; find or make the venv; load model and data; be ended by Slurm; be continued by the
job that waited; keep the result in artifacts/. One line says how each of these went and how long it took. A check that
fails names the next thing to try, and ends the rehearsal.

The jobs work in a folder of their own, logs/rehearsal/<time>/, with links to the code: no result of the project is
touched. To interrupt, the job is stopped and its time limit is lowered to a minute. Slurm then ends it as it ends a
preempted job: SIGCONT and SIGTERM, and SIGKILL some time later.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from fast_dllm.errors import UsageError, line_of
from fast_dllm.record.judgement import Judge
from fast_dllm.record.summary import SUMMARY_FILE, Summary
from fast_dllm.runner import failures, reasons, venv
from fast_dllm.runner.messages import quoted, say
from fast_dllm.runner.records import Records
from fast_dllm.runner.resources import SubmitOptions
from fast_dllm.runner.slurm import Job, ask, read_ended, read_queue, why_no_answer
from fast_dllm.runner.snapshot import ALWAYS, WHERE_PRESENT
from fast_dllm.runner.submission import run_submission
from fast_dllm.spec.files import is_same
from fast_dllm.spec.request import Request

QUESTIONS = 2
HOURS = "0.5"  # of each of its two jobs
MOST_RUNNING_SECONDS = 600.0
POLL_SECONDS, LOOK_SECONDS = 0.2, 2.0  # between two looks at the files, and at the queue
SETTLE_SECONDS = 10.0  # until the files of a job that has ended are seen everywhere
REPORT_SECONDS = 60.0
MINUTES_LEFT = "1"  # Slurm's shortest time limit
BEGUN = re.compile(r"^== .*: model ", re.MULTILINE)  # evaluation.py writes it when the venv is there

SUBMISSION, QUEUE, VENV, HUB, GPU = "account, QOS and GPU type", "queue", "venv", "hub access", "GPU"
EVALUATION, INTERRUPTION, CONTINUATION, ARTIFACTS = "evaluation", "interruption", "continuation", "artifacts"
# The check that a job fails which ends with a failure class (failures.TEXTS); else EVALUATION.
CHECK_OF_CLASS = {
    "venv": VENV,
    "node_failure": GPU,
    "gpu_oom": GPU,
    "dataset_access": HUB,
    "hub_network": HUB,
}


class CheckError(RuntimeError):
    """A check that failed. check: its name. remedy: the next thing to try, or "" for the check's own."""

    def __init__(self, check: str, text: str, remedy: str = "") -> None:
        super().__init__(text)
        self.check, self.remedy = check, remedy


@dataclass
class Clock:
    """Seconds that the jobs have waited in the queue, and that one of them ran."""

    queued: float = 0.0
    running: float = 0.0


def check_options(request: Request, words: list[str]) -> None:
    """Raises UsageError for options of run.sh that a rehearsal decides itself. words: the command line."""
    decided_here = ("--limit", "--force", "--dry-run", "--shards", "--continue", "--status", "--check", "--json")
    for option in decided_here:
        if any(word == option or word.startswith(f"{option}=") for word in words):
            raise UsageError(f"--rehearse decides {option} itself; leave it out")
    if len(request.names) > 1:
        raise UsageError(f"--rehearse takes one configuration, not {','.join(request.names)}")


def rehearse(request: Request, options: SubmitOptions) -> int:
    """Rehearse one run of the request; returns the exit status: 1 if a check failed."""
    if not shutil.which("sbatch"):
        say("run.sh: no sbatch here, so this is no Slurm cluster; sbatch/local.sh evaluates on this machine")
        return 1
    fault = why_no_answer()
    if fault:
        say(f"run.sh: Slurm does not answer, nothing is rehearsed: {fault}; sbatch/local.sh evaluates on this machine")
        return 1
    folder = make_folder(request)
    os.environ["FAST_DLLM_VENV"] = str(venv.location(request.root))
    os.chdir(str(folder))
    options = dataclasses.replace(options, further_jobs=1, hours=options.hours or HOURS)
    rehearsal = Rehearsal(request, folder, options)
    say(f"run.sh: rehearsal of {rehearsal.run.path}; its files: {folder.relative_to(request.root)}")
    try:
        rehearsal.go_through()
    except CheckError as error:
        line("fail", error.check, f"{error}; next: {error.remedy or rehearsal.remedy(error.check)}")
        return 1
    finally:
        os.chdir(str(request.root))
        rehearsal.cancel_jobs()
    clock = rehearsal.clock
    print(f"all of it works: {clock.running:.0f} s of running time, {clock.queued:.0f} s in the queue")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def make_folder(request: Request) -> Path:
    """A project's folder for the rehearsal's jobs: links to the code, and results, logs and artifacts of its own."""
    folder = request.root / "logs" / "rehearsal" / f"{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}"
    (folder / "artifacts").mkdir(parents=True)
    names = {path.partition("/")[0] for path in (*ALWAYS, *WHERE_PRESENT, "experiments", "models")}
    for name in sorted(names):
        if (request.code_root / name).exists():
            (folder / name).symlink_to(request.code_root / name)
    return folder


def line(level: str, check: str, text: str) -> None:
    print(f"{level:4} {check}: {text}", flush=True)


class Rehearsal:
    """One rehearsal. request: with the folder of the rehearsal as its root."""

    def __init__(self, request: Request, folder: Path, options: SubmitOptions) -> None:
        self.project = request.root
        self.request = dataclasses.replace(request, root=folder, limit=QUESTIONS, model=request.model_or_default)
        self.options = options
        [self.run] = self.request.runs()
        self.folder = folder / "results" / self.run.path
        self.clock = Clock()
        self.jobs: list[Job] = []
        self._looked = self._reported = self._step_began = time.monotonic()

    # -- the steps -----------------------------------------------------------------------------------------------------
    def go_through(self) -> None:
        """All checks, in their order. Raises CheckError for the first that fails."""
        first = self.submit()
        self.wait(QUEUE, lambda: self.is_running(first) or self.log(first).is_file(), first)
        self.passed(QUEUE, f"job {first} has started")
        self.wait(VENV, lambda: bool(BEGUN.search(failures.end_of(self.log(first)))), first)
        self.passed(VENV, f"ready, {os.environ['FAST_DLLM_VENV']}")
        if self.request.model != "tiny":  # which answers both questions before anyone can look
            self.wait(HUB, lambda: self.has_answered() or self.is_complete(), first)
            self.passed(HUB, "model and data are loaded, the first question is answered")
        self.interrupt(first)
        self.wait(CONTINUATION, self.is_complete)
        summary = self.summary()
        second = summary.slurm_job_id or Records.of(self.folder).job
        if self.request.model == "tiny":
            self.passed(HUB, "model and data are loaded")
        self.passed(CONTINUATION, f"job {second} went on where job {first} was ended")
        self.check_artifacts()
        self.check_gpu(summary)

    def submit(self) -> str:
        """Submit the first job; returns its id."""
        try:
            status = run_submission(self.request, self.options)
        except UsageError as error:  # what Slurm would refuse, or accept and never start
            raise CheckError(SUBMISSION, line_of(error)) from None
        first = Records.of(self.folder).job
        if status or not first:
            raise CheckError(SUBMISSION, "Slurm has no job of this rehearsal, for the reason above")
        self.passed(SUBMISSION, f"job {first} is accepted")
        return first

    def interrupt(self, job: str) -> None:
        """Let Slurm end the job as preemption does."""
        ask("scancel", "--signal=STOP", "--full", job)
        worked, reply = ask("scontrol", "update", f"JobId={job}", f"TimeLimit={MINUTES_LEFT}")
        if self.is_complete():
            raise CheckError(INTERRUPTION, f"job {job} was over before it could be interrupted")
        if not worked:
            ask("scancel", "--signal=CONT", "--full", job)
            raise CheckError(INTERRUPTION, f"Slurm does not lower the time limit of job {job} ({reply.strip()})")
        self.wait(INTERRUPTION, lambda: all(each.job_id != job for each in self.jobs))
        self.passed(INTERRUPTION, f"Slurm has ended job {job} by its time limit")

    def check_gpu(self, summary: Summary) -> None:
        if not summary.gpu:
            raise CheckError(GPU, f"the evaluation ran on {summary.device or 'an unknown device'} of {summary.host}")
        self.passed(GPU, f"{summary.gpu}, {summary.dtype}, {summary.host}")

    def check_artifacts(self) -> None:
        """The rehearsal's summary is kept, and this user may write where the project's are kept."""
        copy = self.request.root / "artifacts" / self.run.path / SUMMARY_FILE
        self.wait(ARTIFACTS, lambda: not self.jobs)
        if not is_same(self.folder / SUMMARY_FILE, copy):
            raise CheckError(ARTIFACTS, f"the job left no {copy.relative_to(self.request.root)}")
        place = next(path for path in (self.project / "artifacts", self.project) if path.is_dir())
        if not os.access(str(place), os.W_OK):
            raise CheckError(ARTIFACTS, f"{place} cannot be written")
        self.passed(ARTIFACTS, "the summary is kept")

    # -- what is seen --------------------------------------------------------------------------------------------------
    def look(self) -> None:
        """Ask the queue, where the last look is old enough, and add up the time."""
        now = time.monotonic()
        since = now - self._looked
        if since < LOOK_SECONDS:
            return
        if any(job.state != "PENDING" for job in self.jobs):
            self.clock.running += since
        else:
            self.clock.queued += since
        self._looked = now
        queued, fault = read_queue(self.request.root, [self.run.path])
        if not fault:
            self.jobs = queued.get(self.run.path, [])

    def is_running(self, job: str) -> bool:
        return any(each.job_id == job and each.state != "PENDING" for each in self.jobs)

    def log(self, job: str) -> Path:
        return self.request.root / "logs" / self.run.path / f"slurm_{job}.log"

    def has_answered(self) -> bool:
        """Whether an answer is on the disk."""
        return any(file.stat().st_size for file in (self.folder / "answers").glob("*/*.jsonl"))

    def is_complete(self) -> bool:
        return (self.folder / SUMMARY_FILE).is_file() and Judge(self.request).judge(self.run).is_complete

    def summary(self) -> Summary:
        summary = Judge(self.request).judge(self.run).summary
        assert summary is not None, "it is complete"
        return summary

    def wait(self, check: str, is_reached: Callable[[], bool], job: str = "") -> None:
        """Wait for something. job: the one that must not end before; "": any of the run's. Raises CheckError."""
        gone_since = None
        while not is_reached():
            self.look()
            self._check_blocked()
            if self.clock.running > MOST_RUNNING_SECONDS:
                raise CheckError(check, f"not within {MOST_RUNNING_SECONDS / 60:.0f} minutes of running time")
            if any(job in ("", each.job_id) for each in self.jobs):
                gone_since = None
            elif gone_since is None:
                gone_since = time.monotonic()
            elif time.monotonic() - gone_since > SETTLE_SECONDS:
                raise self._end_of_job(check, job)
            self._report(check)
            time.sleep(POLL_SECONDS)

    def _check_blocked(self) -> None:
        for job in self.jobs:
            reason = None if job.waits else reasons.blocked(job)
            if reason:
                raise CheckError(QUEUE, f"job {job.job_id} never starts: {reason[0]} ({job.reason})", reason[1])

    def _end_of_job(self, check: str, job: str) -> CheckError:
        """Why a job ended without what was waited for. job: "" for the run's last one."""
        records = Records.of(self.folder)
        job = job or records.job
        name = str(records.failure.get("class") or "") if records.failure.get("job_id") == job else ""
        if name in ("", "terminated", "killed"):
            name = failures.class_of_state(read_ended([job]).get(job, "")) or name or "no_result"
        if check != CONTINUATION or name in CHECK_OF_CLASS:
            check = CHECK_OF_CLASS.get(name, EVALUATION)
        return CheckError(check, f"job {job} ended: {failures.TEXTS.get(name, name)}")

    # -- what is said --------------------------------------------------------------------------------------------------
    def passed(self, check: str, text: str) -> None:
        now = time.monotonic()
        line("ok", check, f"{text} ({now - self._step_began:.0f} s)")
        self._step_began = now

    def _report(self, check: str) -> None:
        if time.monotonic() - self._reported < REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        why = ", ".join(f"job {job.job_id}: {reasons.waiting(job)}" for job in self.jobs if job.state == "PENDING")
        say(f"     {check}: waiting for {time.monotonic() - self._step_began:.0f} s{f' ({why})' if why else ''}")

    def remedy(self, check: str) -> str:
        """The next thing to try when a check has failed."""
        what = ["--task", self.request.task, "--model", self.request.model_or_default]
        log = f"the log {self.log(Records.of(self.folder).job)}"
        return {
            SUBMISSION: f"{quoted(['python', '-m', 'fast_dllm.doctor', *what])}, and SBATCH_ACCOUNT and SBATCH_QOS in "
            "sbatch/cluster.env",
            QUEUE: "squeue --me --start, or another --gpu",
            VENV: f"bash sbatch/venv.sh on a login node, and {log}",
            HUB: f"{quoted(['bash', 'sbatch/prefetch.sh', *what])} on a login node, then HF_HUB_OFFLINE=1 in "
            "sbatch/cluster.env",
            GPU: f"nvidia-smi in an salloc, another --gpu or SBATCH_GRES, and {log}",
            INTERRUPTION: "run it again; if Slurm refuses, ask its administrators whether users may lower a time limit",
            CONTINUATION: f"squeue --me, sacct --name={self.run.path}, and {log}",
            ARTIFACTS: f"ls -ld {self.project / 'artifacts'}, the quota, and {log}",
        }.get(check, log)

    def cancel_jobs(self) -> None:
        """Cancel what is left of the rehearsal in the queue; those that wait first, or they would start."""
        queued, _ = read_queue(self.request.root, [self.run.path])
        jobs = sorted(queued.get(self.run.path, []), key=lambda job: not job.waits)
        for job in jobs:
            ask("scancel", job.job_id)
