"""sbatch/baseline.sh: the plain model on several tasks, one after the other, as one job or by hand.

As a job it first copies the code and continues from the copy, so that later edits change nothing. It is continued like
any other job (job.py has the steps of a job, chain.py the continuation).
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner import snapshot, submission, venv
from fast_dllm.runner.chain import Chain, cancel, decide, submit_successor
from fast_dllm.runner.environment import evaluation_environment, stderr_file
from fast_dllm.runner.evaluation import BUSY, TERMINATED, Settings, StopSignal, evaluate
from fast_dllm.runner.job import activate, gpu_is_lost
from fast_dllm.runner.messages import say
from fast_dllm.runner.output import print_summary
from fast_dllm.runner.records import force, missing_runs
from fast_dllm.runner.resources import SubmitOptions
from fast_dllm.runner.sbatch import JobScript
from fast_dllm.spec.request import Request

CONFIGURATION = "plain"


@dataclass(frozen=True)
class BaselineOptions:
    """What to evaluate. request: `plain` on one or several tasks. submission: how to submit each task, or None.

    words: the command line, to start the copy of the code with.
    """

    request: Request
    chain: Chain
    force: bool = False
    snapshot: str | None = None
    submission: SubmitOptions | None = None
    words: tuple[str, ...] = ()


def is_batch_job() -> bool:
    """Whether this process is the script of a batch job, not a command that was typed inside an allocation."""
    return bool(os.environ.get("SLURM_JOB_ID")) and os.environ.get("SLURM_TASK_PID") == str(os.getpid())


def run_baseline(options: BaselineOptions) -> int:
    """Evaluate all tasks that have no result; returns the exit status."""
    request, in_job = options.request, is_batch_job()
    if options.submission is not None:
        if in_job:
            option = next(word for word in options.words if word.startswith(("--shards", "--gpu", "--hours")))
            raise UsageError(f"{option} submits jobs of its own: bash sbatch/baseline.sh, not sbatch")
        return _submit_each(options, options.submission)
    if in_job and options.snapshot is None:
        _go_on_from_snapshot(options)
    if options.force:
        force(request)
    if not missing_runs(request, options.chain.after):
        return _run_tasks(options, {}, in_job=False, successor="")
    if not in_job:
        folder = venv.ensure(request.code_root, request.root)
        if folder is None:
            return 1
        environment = evaluation_environment(venv.environment_of(folder, os.environ), request.code_root)
        return _run_tasks(options, environment, in_job=False, successor="")
    return _run_as_job(options)


def _run_as_job(options: BaselineOptions) -> int:
    """The steps of a batch job, as in job.py; returns the exit status."""
    request, chain = options.request, options.chain
    job = os.environ["SLURM_JOB_ID"]
    say(f"job {job} on {socket.gethostname()}: {' '.join(request.tasks)}, code {options.snapshot}")
    log = stderr_file(request.root)
    decision = decide(request, chain, log)
    if not decision.goes_on:
        return decision.exit_status
    successor = submit_successor(request, chain, decision.stalled, _script(options))
    if gpu_is_lost(request, chain, log):
        return 1
    environment = activate(request, chain, log)
    if environment is None:
        cancel([successor] if successor else [])
        return 1
    return _run_tasks(options, environment, in_job=True, successor=successor)


def _script(options: BaselineOptions) -> JobScript:
    """The call of sbatch for a job that does the same work with the same resources."""
    request = options.request
    words = ["--task", ",".join(request.tasks)]
    words += ["--limit", str(request.limit)] if request.limit is not None else []
    words += ["--model", request.model_or_default, *request.words_of_confirmation(*request.tasks)]
    name = os.environ.get("SLURM_JOB_NAME") or "baseline"
    return JobScript(name, "baseline.sh", tuple(words), options.snapshot, keep_resources=True)


def _run_tasks(options: BaselineOptions, environment: Mapping[str, str], in_job: bool, successor: str) -> int:
    """Evaluate the tasks in order, then once more those that another process was evaluating."""
    request = options.request
    settings = Settings(environment, keep=True, after=options.chain.after, in_job=in_job)
    tasks, failed, goes_on = list(request.tasks), [], False
    with StopSignal() as stop:
        for is_second_time in (False, True):
            busy = []
            for task in tasks:
                outcome = evaluate(request, task, [CONFIGURATION], settings, stop)
                for name in outcome.done:
                    print_summary(request.root, request.run(task, name))
                goes_on = outcome.may_be_continued
                if stop.received:
                    # A task that ended well at this moment is not the last one, so the successor stays.
                    return _end(successor, TERMINATED, goes_on or not outcome.failure_class)
                if outcome.status == BUSY and not is_second_time:
                    busy.append(task)
                elif outcome.status:
                    failed.append(task)
            tasks = busy  # by now the other process may be done, or dead
    if failed:
        say(f"baseline.sh: failed: {' '.join(failed)}")
        return _end(successor, 1, goes_on)
    return _end(successor, 0, False)


def _end(successor: str, status: int, goes_on: bool) -> int:
    """Returns the status. Cancels the successor if the work is done or should not be continued."""
    if successor and (status == 0 or not goes_on):
        cancel([successor])
    return status


def _go_on_from_snapshot(options: BaselineOptions) -> None:
    """Copy the code and replace this process by the same command of the copy; does not return."""
    request = options.request
    try:
        code = snapshot.ensure(request.root, request.experiment, request.model_or_default)
    except snapshot.SnapshotError as error:
        say(f"baseline.sh: {error}")
        sys.exit(1)
    script = f".snapshots/{code}/sbatch/baseline.sh"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp("bash", ["bash", script, "--snapshot", code, *options.words])


def _submit_each(options: BaselineOptions, how: SubmitOptions) -> int:
    """Submit each task's plain configuration as run.sh does; returns the last exit status that is not 0, or 0."""
    status = 0
    for task in options.request.tasks:
        status = submission.run_submission(options.request.only(task, [CONFIGURATION]), how) or status
    return status
