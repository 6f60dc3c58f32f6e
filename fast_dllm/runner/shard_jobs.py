"""Runs a configuration in shards: a job array answers them, and one more job waits for it and finishes the run.

docs/design.md, "Shards as jobs", explains why nothing is lost or done twice without polling.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from typing import Mapping, Sequence

from fast_dllm.errors import UsageError
from fast_dllm.record.judgement import Judge, set_aside_foreign
from fast_dllm.record.shards import LOCK
from fast_dllm.runner.costs import START_SECONDS, estimate_of, questions
from fast_dllm.runner.failures import current_job, write_failure
from fast_dllm.runner.messages import quoted, say
from fast_dllm.runner.records import FORCE_FILE, Records, force, is_forced, record_job, shard_is_done
from fast_dllm.runner.resources import Resources, SubmitOptions
from fast_dllm.runner.sbatch import JobScript, say_refused, submit
from fast_dllm.runner.slurm import as_hours, as_time, read_queue
from fast_dllm.runner.states import State
from fast_dllm.spec.defaults import AUTO
from fast_dllm.spec.files import remove
from fast_dllm.spec.locks import is_held
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shard_names import (
    DONE_FILE,
    MAX_SHARDS,
    MAX_SHARDS_AT_ONCE,
    SHARDS_FOLDER,
    array_words,
    names_of,
    shard_folder,
    sharding,
)

FINISHING_SECONDS = 3600.0  # wall time of the job that finishes a run
QUEUE_TRIES, QUEUE_SECONDS = 3, 5


# -- the plan ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunPlan:
    """What to submit for a run.

    action: submit, wait (for a place in the queue), skip, or `cancel` with the jobs to cancel first. why: for people.
    shards: the number of shards; 0: the run is one job. missing: the shards that are neither answered nor queued.
    finishes: whether to submit the job that finishes the run too. alive: further jobs for that job to wait for.
    """

    action: str
    why: str
    shards: int = 0
    missing: tuple[int, ...] = ()
    finishes: bool = False
    alive: tuple[str, ...] = ()

    @property
    def num_jobs(self) -> int:
        return len(self.missing) + self.finishes if self.shards else 1


def action_of(state: State, force: bool) -> tuple[str, str]:
    """(action, why) for a run as a whole; see RunPlan."""
    if state.state in ("running", "queued", "blocked"):
        ids = " ".join(bases(state)) if any(job.shards for job in state.jobs) else state.job
        return (f"cancel {ids}" if force else "skip", state.detail)
    if state.judgement.is_whole and state.state == state.judgement.state:
        if force:
            return "submit", state.detail or "complete, forced"
        detail = state.detail if "--force" in state.detail else f"{state.detail or 'complete'} (--force runs it again)"
        return "skip", detail
    return "submit", state.detail


def bases(state: State) -> tuple[str, ...]:
    """The job ids of a run for scancel; an array has one."""
    return tuple(dict.fromkeys(job.job_id.partition("_")[0] for job in state.jobs))


def submitted_with(request: Request, run: Run) -> tuple[int, int]:
    """(shards, GPUs of a job) of the run's last submission; 0 shards if it was one job."""
    records = Records.of(request.root / "results" / run.path)
    return records.shards, records.gpus


def plan_of(request: Request, state: State, options: SubmitOptions) -> RunPlan:
    """What to submit for a run. For AUTO, a run without shards so far gets its shards later: see `divide`."""
    action, why = action_of(state, options.force)
    whole_jobs = [job for job in state.jobs if not job.shards]
    alive: set[int] = set().union(*(job.shards for job in state.jobs))
    if options.shards is None or action.startswith("cancel") or (action == "skip" and not alive):
        return RunPlan(action, why)
    if any(not job.waits for job in whole_jobs):  # one job has all of it
        return RunPlan(action, why)
    before, gpus = submitted_with(request, state.run)
    count = before if options.shards == AUTO and (alive or not options.force) else options.shards
    if alive and (count, options.gpus) != (before, gpus):
        words = f"--shards {before}" + (f" --gpus {gpus}" if gpus > 1 else "")
        return RunPlan("skip", f"{why}; it was submitted with {words}, which goes on")
    if not isinstance(count, int) or count == 0:
        return RunPlan(action, why)
    return divide(request, state, options, count)


def divide(request: Request, state: State, options: SubmitOptions, count: int) -> RunPlan:
    """What to submit for a run in `count` shards."""
    action, why = action_of(state, options.force)
    if count == 1:
        return RunPlan(action, why)
    alive: set[int] = set().union(*(job.shards for job in state.jobs))
    forced, missing, judge = options.force or is_forced(request.root, state.run), [], Judge(request)
    for number, name in enumerate(names_of(sharding(count, options.gpus))):
        shard = dataclasses.replace(request, shard=name)
        if number not in alive and (forced or not shard_is_done(shard, state.run, judge)):
            missing.append(number)
    # If a finishing job waits already, it reads the queue when it starts.
    finishes = all(job.shards for job in state.jobs)
    if not missing and not finishes:
        return RunPlan("skip", why, count)
    what = f"shards {array_words(missing)} of {count}" if missing else f"all {count} shards answered or at work"
    waits_for = tuple(dict.fromkeys(job.job_id.partition("_")[0] for job in state.jobs if job.shards))
    return RunPlan("submit", f"{why}; {what}", count, tuple(missing), finishes, waits_for)


def choose_count(request: Request, run: Run, resources: Resources, gpus: int, places: int) -> tuple[int, str]:
    """(the number of shards for `--shards auto`, why).

    Each shard should be answered in one job, with the margin of the estimated time. There are at most as many shards as
    questions, and as places in the queue. Raises UsageError if no time is known.
    """
    cost = estimate_of(request, run, resources.gpu)
    if cost is None:
        what = f"{run.task.name} with {request.model_or_default} on {resources.gpu or 'this GPU'}"
        raise UsageError(f"--shards auto: nothing here tells how long {what} takes; --shards N")
    if resources.wall <= START_SECONDS:
        raise UsageError(
            f"--shards auto: a job of {as_hours(resources.wall)} has no time beside its start, for which "
            f"{as_hours(START_SECONDS)} are kept; --hours H"
        )
    needed = cost.shards(resources.wall, gpus)
    count = min(needed, max(1, min(questions(run) or MAX_SHARDS, places, MAX_SHARDS)))
    hours = f"{cost.about} {cost.seconds / 3600:.2g} GPU hours {cost.source}"
    text = f"{run.folder}: --shards {count}, {hours}, in jobs of {as_hours(resources.wall)}"
    return count, text + (f" ({needed} would each end in one job)" if needed > count else "")


# -- the submission ----------------------------------------------------------------------------------------------------
def submit_shards(
    request: Request,
    run: Run,
    plan: RunPlan,
    script: JobScript,
    options: SubmitOptions,
    settings: Mapping[str, str],
    wall: float,
) -> int:
    """Submit a run's missing shards and the job that finishes it; returns the exit status: 75 if there is no place.

    script: the run's job. settings: variables for sbatch. wall: seconds of a job.
    """
    folder = request.root / "results" / run.path
    if not plan.alive:
        set_aside_foreign(folder / "summary.json", run)
    if options.force or is_forced(request.root, run):
        begin_again(request.only(run.task.name, [run.name]), run)
    record = {"shards": plan.shards, "gpus": options.gpus}
    text = sharding(plan.shards, options.gpus)
    shard_folders = {number: shard_folder(folder, f"{number}-of-{text}") for number in plan.missing}
    for records_folder in shard_folders.values():
        remove(records_folder / DONE_FILE, records_folder / "failure.json")
    waits_for = list(plan.alive)
    if plan.missing:
        job, reply = submit(_array(script, plan).command(), settings)
        if not job:
            return say_refused(run.folder, reply)
        for number, records_folder in shard_folders.items():
            record_job(records_folder, f"{job}_{number}", f"logs/{run.path}/slurm_{job}_{number}.log")
        print(f"  {run.folder}: job {job}[{array_words(plan.missing)}]")
        waits_for.append(job)
        record_job(folder, job, f"logs/{run.path}", **record)
    if not plan.finishes:
        return 0
    job, reply = submit(script.command(_after_all(waits_for)), _short(settings, wall))
    if not job:
        say(f"run.sh: {run.folder}: the job that finishes it is missing; run.sh submits it when it is run again")
        return say_refused(run.folder, reply)
    record_job(folder, job, f"logs/{run.path}/slurm_{job}.log", **record)
    print(f"  {run.folder}: job {job} finishes it")
    return 0


def print_commands(plan: RunPlan, script: JobScript, settings: Mapping[str, str], wall: float) -> None:
    """Print the commands that would submit a run in shards, for --dry-run."""
    waits_for = list(plan.alive)
    if plan.missing:
        print(f"    {quoted([*as_words(settings), *_array(script, plan).command()])}")
        waits_for.append("ARRAY")
    if plan.finishes:
        print(f"    {quoted([*as_words(_short(settings, wall)), *script.command(_after_all(waits_for))])}")


def _array(script: JobScript, plan: RunPlan) -> JobScript:
    at_once = f"%{MAX_SHARDS_AT_ONCE}" if len(plan.missing) > MAX_SHARDS_AT_ONCE else ""
    return dataclasses.replace(script, array=array_words(plan.missing) + at_once)


def _after_all(jobs: Sequence[str]) -> str:
    return f"afterany:{':'.join(jobs)}" if jobs else ""


def _short(settings: Mapping[str, str], wall: float) -> Mapping[str, str]:
    """The settings of the job that finishes a run: an hour at most. If that is not enough, the job is continued."""
    if math.isinf(wall):
        return settings
    return {**settings, "SBATCH_TIMELIMIT": as_time(min(wall, FINISHING_SECONDS))}


def as_words(settings: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def begin_again(request: Request, run: Run) -> None:
    """Carry out --force for a run in shards now: no process works on it, and several jobs will start it."""
    folder = request.root / "results" / run.path
    force(request)  # in case this is interrupted
    if (folder / "summary.json").exists():
        (folder / "summary.json").replace(folder / "summary.previous.json")
    for name in ("answers", SHARDS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    record_job(folder, "", "")  # newer than the summary in artifacts/, which is of the last run
    remove(folder / FORCE_FILE)


# -- within the jobs ---------------------------------------------------------------------------------------------------
def wait_for_shards(request: Request, script: JobScript) -> bool:
    """In the job that finishes a run: whether shards are at work, and another job waits for them now.

    script: a job like this one. Where the queue cannot be asked, or that job cannot be submitted, this one ends as one
    that is continued: failure.json says node failure, and UsageError is raised.
    """
    [run] = request.runs()
    for number in range(QUEUE_TRIES):
        if number:
            time.sleep(QUEUE_SECONDS)
        queued, fault = read_queue(request.root, [run.path])
        if not fault:
            break
    bases_at_work = dict.fromkeys(job.job_id.partition("_")[0] for job in queued.get(run.path, []) if job.shards)
    if fault:
        fault = f"squeue failed, so it is not known whether shards are still answered: {fault}"
    elif not bases_at_work:
        return False
    else:
        job, reply = submit(script.command(_after_all(list(bases_at_work))), {})
        if job:
            say(f"shards are still answered, by jobs {' '.join(bases_at_work)}; job {job} waits for them")
            record = dict(zip(("shards", "gpus"), submitted_with(request, run)))
            folder = request.root / "results" / run.path
            record_job(folder, job, script.log.replace("%j", job), **record)
            return True
        fault = f"the job that waits for the shards could not be submitted: {reply}"
    log = script.log.replace("%j", current_job())
    write_failure(request.root / "results" / run.path, "node_failure", 1, log, fault)
    raise UsageError(fault)


def is_last(request: Request) -> bool:
    """Whether every shard is answered and its job at its end, so that this one can finish the run."""
    [run] = request.runs()
    folder, judge = request.root / "results" / run.path, Judge(request)
    return all(
        shard_is_done(dataclasses.replace(request, shard=name), run, judge)
        and not is_held(shard_folder(folder, name) / LOCK)
        for name in names_of(str(request.shard).rpartition("-of-")[2])
    )


def waiting_jobs(request: Request) -> list[str]:
    """The jobs that wait for the shards of a run: once it is complete, they have nothing to do."""
    [run] = request.runs()
    queued = read_queue(request.root, [run.path])[0].get(run.path, [])
    return [job.job_id for job in queued if job.waits and not job.shards]
