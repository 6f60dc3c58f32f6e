"""Runs one evaluation process: takes the locks, runs eval.py, and records how each configuration ended.

Jobs, local.sh and baseline.sh call `evaluate`. One process answers several configurations of one task, one after the
other, with one loaded model. It stops at the first one that fails.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Mapping

from fast_dllm.record.judgement import Judge, Judgement, fault_of_new, set_aside_foreign
from fast_dllm.record.shards import LOCK
from fast_dllm.record.summary import QUESTIONS_FILE
from fast_dllm.runner import artifacts, failures
from fast_dllm.runner.environment import has_gpu, stderr_file
from fast_dllm.runner.messages import say
from fast_dllm.runner.records import FORCE_FILE, Records, failed_before, folder_of, is_forced, record_job
from fast_dllm.runner.watch import run_and_watch
from fast_dllm.spec.files import is_newer, remove, set_aside
from fast_dllm.spec.locks import Claim, acquire, owner_of
from fast_dllm.spec.request import Request, Run, evaluation_words
from fast_dllm.spec.shard_names import DONE_FILE

BUSY = 75  # exit status: another process evaluates this run
NO_SUMMARY = 70  # exit status: the evaluation ended well, but wrote no complete summary
TERMINATED = 143  # exit status after SIGTERM, as a shell has it: 128 + 15

# Modes: what to do with a whole result that exists already.
#   job     keep it, whatever its code and arguments; refuse if it is of another model
#   matrix  keep it, and continue with the others
#   demo    keep it if it is of today's code; else rename it and evaluate again
#   named   evaluate again; refuse if it is of another model, of other code or of the lab's first runner
# With --force every mode evaluates again.


@dataclass(frozen=True)
class Settings:
    """How to evaluate; the same for all runs of a command.

    mode: see Modes. keep: copy results to artifacts/. batch_size: a number or `auto`. after: jobs that this one
    continues. environment: of the evaluation process. in_job: within a batch job, whose log is its own output. traces:
    keep the steps of each answer.
    """

    environment: Mapping[str, str]
    mode: str = "job"
    keep: bool = False
    force: bool = False
    batch_size: str = "1"
    gpus: int = 1
    after: tuple[str, ...] = ()
    in_job: bool = False
    traces: bool = False


@dataclass
class Outcome:
    """How an evaluation ended.

    done, failed, not_started: the names of the configurations that succeeded, that failed or were refused, and that
    were not started. status: the exit status. failure_class: of the first one that failed; "" if none did.
    """

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    not_started: list[str] = field(default_factory=list)
    status: int = 0
    failure_class: str = ""

    @property
    def may_be_continued(self) -> bool:
        """Whether another job should continue the work of this one."""
        return self.failure_class in ("terminated", *failures.CONTINUED)


class StopSignal:
    """Receives SIGTERM, which Slurm sends before it ends a job, and passes it on to the running evaluation.

    Use it as a context; at the end the former handler is restored.
    """

    def __init__(self) -> None:
        self.received = False
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> StopSignal:
        self._former = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._process is not None:
            self._process.terminate()

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end; returns its exit status, or 128 + the number of the signal that ended it."""
        self._process = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL)
        if self.received:  # before the process was known to the handler
            self._process.terminate()
        status = self._process.wait()
        self._process = None
        return status if status >= 0 else 128 - status


def evaluate(request: Request, task: str, names: list[str], settings: Settings, stop: StopSignal) -> Outcome:
    """Evaluate configurations of one task in one process, each under its lock.

    Whether a run is complete is decided under its lock, so that a run that another process has just finished is not
    repeated. Afterwards each folder has a summary.json or a failure.json.
    """
    outcome = Outcome()
    runs = {name: request.run(task, name) for name in names}
    log = _log_of(request, list(runs.values()), settings)
    claims = _claim(request, runs, outcome)
    try:
        wanted = _begin(request, [runs[name] for name in claims], settings, log, outcome)
        for name in set(claims) - {run.name for run in wanted}:
            claims.pop(name).release()
        if wanted:
            start = _size_of(request.root / log)
            paths = [str(claims[run.name].path.relative_to(request.root)) for run in wanted]
            status = _run_process(request, wanted, paths, settings, log, stop)
            lost = {run.name for run in wanted if not claims[run.name].is_ours()}
            text = failures.end_of(request.root / log, start) if log else ""
            _end(request, wanted, lost, status, settings, _Log(log, text, stop.received), outcome)
    finally:
        for claim in claims.values():
            claim.release()
    return outcome


def _log_of(request: Request, runs: list[Run], settings: Settings) -> str:
    """The log of the evaluation: a job's own output, else a new file; relative to the project's folder."""
    if settings.in_job:
        return stderr_file(request.root)
    folder = Path("logs") / (runs[0].path if len(runs) == 1 else runs[0].path.rsplit("/", 1)[0])
    (request.root / folder).mkdir(parents=True, exist_ok=True)
    return str(folder / f"local_{os.getpid()}.log")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _claim(request: Request, runs: Mapping[str, Run], outcome: Outcome) -> dict[str, Claim]:
    """Take the locks of the runs. Runs that another process holds count as failed, with exit status 75."""
    claims = {}
    for name, run in runs.items():
        base = folder_of(request, run) / LOCK
        claim = acquire(base, wait=False)
        if claim is None:
            say(f"{run.path} is being evaluated by {owner_of(base)}; nothing is done here")
            outcome.status = BUSY
            outcome.failed.append(name)
        else:
            claims[name] = claim
    return claims


# -- before ------------------------------------------------------------------------------------------------------------
def _begin(request: Request, runs: list[Run], settings: Settings, log: str, outcome: Outcome) -> list[Run]:
    """The runs to evaluate, of those whose locks are held; removes the records of their last try."""
    judge, wanted = Judge(request), []
    for run in runs:
        forced = settings.force or is_forced(request.root, run)
        judgement = judge.judge(run)
        failed = failed_before(request, run, settings.after)
        if not forced and judgement.is_whole and not _runs_again(judgement, settings.mode):
            _say_skipped(run, judgement, request)
            if _is_refused(judgement, settings.mode):
                outcome.failed.append(run.name)
                outcome.status = 1
            elif settings.keep:
                artifacts.keep(request, run)
        elif not forced and failed:
            why = failures.TEXTS.get(failed, failed)
            say(f"== {run.path} failed in a job before this one ({why}) and is not repeated")
            outcome.failed.append(run.name)
            outcome.status = 1
        else:
            wanted.append(run)
            if judgement.state == "stale" and not forced:
                set_aside(folder_of(request, run) / "summary.json", "stale")
                set_aside(folder_of(request, run) / QUESTIONS_FILE, "stale")
            _clear(request, run, forced, log)
    if wanted:
        place, examples = wanted[0].path.rsplit("/", 1)[0], wanted[0].arguments["num_fewshot"]
        configurations = wanted[0].folder if len(wanted) == 1 else f"{len(wanted)} configurations"
        say(f"== {place}, {configurations}: model {request.model_or_default}, {examples} examples in the prompt")
        say(f"   log: {log}")
    return wanted


def _runs_again(judgement: Judgement, mode: str) -> bool:
    """Whether a whole result is evaluated again without --force; see Modes."""
    if judgement.other_model:
        return False
    return (mode == "named" and judgement.state == "complete") or (mode == "demo" and judgement.state == "stale")


def _is_refused(judgement: Judgement, mode: str) -> bool:
    """Whether it is a failure to keep this whole result, because the user asked for something else; see Modes."""
    if mode == "named":
        return judgement.other_model or judgement.state != "complete"
    return judgement.other_model and mode == "job"


def _say_skipped(run: Run, judgement: Judgement, request: Request) -> None:
    if judgement.other_model:
        model = judgement.summary and judgement.summary.model
        say(f"== {run.path} is complete, but of model {model}, not {request.model}; --force runs it again")
    elif judgement.state == "stale":
        say(f"== {run.path} is {judgement.detail}; skipped, --force runs it again")
    else:
        say(f"== {run.path} is complete, skipped" + (f" ({judgement.detail})" if judgement.detail else ""))


def _clear(request: Request, run: Run, forced: bool, log: str) -> None:
    """Remove the records of the last try, and write job.json for this process."""
    folder = folder_of(request, run)
    remove(folder / "failure.json", *folder.glob("progress.rank*.json"))
    if request.shard is not None:
        remove(folder / DONE_FILE)
        record_job(folder, failures.current_job(), log)
        return
    set_aside_foreign(folder / "summary.json", run)
    if forced:
        shutil.rmtree(folder / "answers", ignore_errors=True)
        if (folder / "summary.json").exists():
            (folder / "summary.json").replace(folder / "summary.previous.json")
        remove(folder / FORCE_FILE)  # last: if the job ends before this, the next evaluation begins again
    before = Records.of(folder)
    division = {"shards": before.shards, "gpus": before.gpus} if before.shards else {}
    record_job(folder, failures.current_job(), log, **division)


# -- the process -------------------------------------------------------------------------------------------------------
def _run_process(
    request: Request, runs: list[Run], claims: list[str], settings: Settings, log: str, stop: StopSignal
) -> int:
    """Run the evaluation process; returns its exit status."""
    options = evaluation_words(request, runs, settings.batch_size)
    options += ["--traces"] if settings.traces else []
    command = [*_launcher(settings.gpus), str(request.code_root / "eval.py"), *options]
    environment = {**settings.environment, "FAST_DLLM_CLAIMS": os.pathsep.join(claims)}
    if settings.in_job:
        return stop.run(command, environment)
    return run_and_watch(command, environment, request.root, runs, request.root / log)


def _launcher(gpus: int) -> list[str]:
    """The program that starts eval.py in as many processes as there are GPUs."""
    with_gpu = has_gpu()
    if gpus > 1 and not with_gpu:
        return ["torchrun", "--standalone", "--nproc_per_node", str(gpus)]  # accelerate --cpu starts one alone
    # All values are given, so that a user's `accelerate config` changes none of them.
    command = ["accelerate", "launch", "--quiet", "--num_processes", str(gpus), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if not with_gpu:
        return [*command, "--cpu"]
    return [*command, "--multi_gpu", "--main_process_port", "0"] if gpus > 1 else command  # port 0: a free one


# -- after -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Log:
    """The evaluation's log: its path, the end of what this evaluation wrote, and whether this process got SIGTERM."""

    path: str
    text: str
    received_sigterm: bool


def _end(
    request: Request, runs: list[Run], lost: set, status: int, settings: Settings, log: _Log, outcome: Outcome
) -> None:
    """Sort the runs into done, failed and not started, and write failure.json for the first that is not done.

    lost: the names of runs whose lock another process has taken over. The exit status of the process decides about a
    run only if it is the only run, and no signal ended the process.
    """
    was_stopped = status == failures.INTERRUPTED or log.received_sigterm
    has_failed = False
    for run in runs:
        folder, fault = folder_of(request, run), _fault_of_new_result(request, run)
        if (status == 0 or len(runs) > 1 or was_stopped) and run.name not in lost and not fault:
            outcome.done.append(run.name)
            remove(folder / "failure.json", *(folder.glob("progress.rank*.json") if request.shard is None else ()))
            if settings.keep:
                artifacts.keep(request, run)
        elif has_failed:
            outcome.not_started.append(run.name)
        else:
            has_failed = True
            outcome.failed.append(run.name)
            if run.name in lost:
                owner = owner_of(folder / LOCK)
                say(
                    f"{run.path} was taken over by {owner} while this process could not be seen to live; "
                    "it is left to that one"
                )
                outcome.status = BUSY
            else:
                outcome.status, outcome.failure_class = _record_failure(run, folder, status, fault, log)
    if status == failures.INTERRUPTED:
        outcome.status = status  # Ctrl-C ends the command, even if this result was complete already


def _fault_of_new_result(request: Request, run: Run) -> str:
    """Why this evaluation left no complete result; "" if it left one, newer than job.json."""
    folder = folder_of(request, run)
    if request.shard is not None:
        return "" if is_newer(folder / DONE_FILE, folder / "job.json") else "the shard is not answered"
    return fault_of_new(folder, run)


def _record_failure(run: Run, folder: Path, status: int, fault: str, log: _Log) -> tuple[int, str]:
    """Write failure.json; returns (exit status, failure class)."""
    if status == 0:
        say(f"eval.py ended without an error, but left no complete summary: {fault}")
        status = NO_SUMMARY
    # accelerate's launcher turns every exit status into 1; eval.py's own line says that the input was wrong
    if re.search(r"^eval\.py: error: ", log.text, re.MULTILINE):
        status = 2
    name = failures.classify(status, log.text, log.received_sigterm)
    failures.write_failure(folder, name, status, log.path, log.text)
    if name != "interrupted":  # the user knows
        say(f"{run.path}: {failures.TEXTS[name]} (exit status {status})")
    return status, name
