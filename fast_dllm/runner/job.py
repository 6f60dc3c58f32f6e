"""What one job does. `sbatch/_job.sh` answers one configuration of one task, or one shard of it.

The steps, in order:
  1. if the run is complete, copy its summary to artifacts/ and end
  2. if this job continues another one, decide from that job's end whether to go on (chain.py)
  3. submit the job that continues this one if Slurm ends it
  4. check that the GPU can be used
  5. find or build the venv
  6. evaluate under the run's lock: accelerate launch eval.py; SIGTERM is passed on (evaluation.py)
  7. classify the end, and copy the summary to artifacts/
  8. cancel the job of step 3, unless it should continue this one
If the run is in shards, the job that ends last also evaluates the whole run (shard_jobs.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from dataclasses import dataclass
from typing import Mapping

from fast_dllm.runner import artifacts, shard_jobs, venv
from fast_dllm.runner.chain import Chain, cancel, decide, record_failure, submit_successor
from fast_dllm.runner.environment import evaluation_environment, has_gpu, stderr_file
from fast_dllm.runner.evaluation import Outcome, Settings, StopSignal, evaluate
from fast_dllm.runner.failures import current_job
from fast_dllm.runner.messages import say
from fast_dllm.runner.records import missing_runs
from fast_dllm.runner.sbatch import JobScript
from fast_dllm.spec.request import Request, Run


@dataclass(frozen=True)
class JobOptions:
    """What one job answers, and how.

    request: one run, or one shard of it. snapshot: the name of the code's copy; None: the project's own code. shards:
    the number of shards of the run; None: it has none. gpus: of this job.
    """

    request: Request
    chain: Chain
    snapshot: str | None = None
    shards: int | None = None
    gpus: int = 1

    @property
    def run(self) -> Run:
        [run] = self.request.runs()
        return run

    @property
    def finishes_shards(self) -> bool:
        """Whether this job answers no shard of a divided run, but finishes it."""
        return self.shards is not None and self.request.shard is None

    def script(self) -> JobScript:
        """The call of sbatch for a job that does the same work."""
        run = self.run
        words = self.request.words(run.task.name, run.name)
        words += ["--gpus", str(self.gpus)] if self.gpus > 1 else []
        words += ["--shards", str(self.shards)] if self.shards is not None else []
        return JobScript(
            name=run.path,
            script="_job.sh",
            words=tuple(words),
            snapshot=self.snapshot,
            log=f"logs/{run.path}/slurm_%j.log",
            array=os.environ["SLURM_ARRAY_TASK_ID"] if self.request.shard else "",
            gpus=self.gpus,
        )


def run_job(options: JobOptions) -> int:
    """Do all steps of a job (see above); returns its exit status."""
    request, run, chain = options.request, options.run, options.chain
    say(
        f"job {current_job()} on {socket.gethostname()}: {run.path}, code {options.snapshot or 'of the project folder'}"
    )
    if not missing_runs(request):
        say(f"{run.path} is complete, nothing to do")
        artifacts.keep(request, run)  # the job before may have ended between its last answer and this
        return 0
    (request.root / "logs" / run.path).mkdir(parents=True, exist_ok=True)  # of the job that continues this one
    log = stderr_file(request.root)
    decision = decide(request, chain, log)
    if not decision.goes_on:
        return decision.exit_status
    successor = submit_successor(request, chain, decision.stalled, options.script())
    if gpu_is_lost(request, chain, log):
        return 1  # the successor goes on, perhaps on another node
    if options.finishes_shards:
        script = options.script().with_words(["--continue", str(chain.further_jobs)])
        if shard_jobs.wait_for_shards(request, script):
            cancel([successor] if successor else [])
            return 0
    environment = activate(request, chain, log)
    if environment is None:
        cancel([successor] if successor else [])
        return 1
    with StopSignal() as stop:
        settings = Settings(environment, keep=True, gpus=options.gpus, after=(), in_job=True)
        outcome = evaluate(request, run.task.name, [run.name], settings, stop)
        if outcome.status == 0 and request.shard is not None:
            outcome = _finish_if_last(request, run, settings, stop, outcome)
    if successor and (outcome.status == 0 or not outcome.may_be_continued):
        cancel([successor])  # it would start only to see that there is nothing to continue
    return outcome.status


def _finish_if_last(request: Request, run: Run, settings: Settings, stop: StopSignal, outcome: Outcome) -> Outcome:
    """Evaluate the whole run if all its shards are answered. If that fails, the waiting job does it."""
    if not shard_jobs.is_last(request):
        return outcome
    run_request = dataclasses.replace(request, shard=None)
    if evaluate(run_request, run.task.name, [run.name], settings, stop).status == 0:
        cancel(shard_jobs.waiting_jobs(run_request))
    return outcome


def gpu_is_lost(request: Request, chain: Chain, log: str) -> bool:
    """Whether nvidia-smi does not see the GPU that Slurm gave this job. If so, writes failure.json."""
    if not os.environ.get("SLURM_JOB_GPUS") or not shutil.which("nvidia-smi") or has_gpu():
        return False
    host = socket.gethostname()
    record_failure(request, chain, "node_failure", f"nvidia-smi sees no GPU on {host}", log)
    say(f"Slurm gave this job a GPU, but nvidia-smi sees none on {host}")
    return True


def activate(request: Request, chain: Chain, log: str) -> Mapping[str, str] | None:
    """Find or build the venv; returns the environment variables of an evaluation. None after a failure.json."""
    folder = venv.ensure(request.code_root, request.root)
    if folder is None:
        record_failure(request, chain, "venv", "", log)
        return None
    return evaluation_environment(venv.environment_of(folder, os.environ), request.code_root)
