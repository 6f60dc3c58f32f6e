"""A run in shares as jobs: one array that answers them, and the job that waits for it and finishes the run.

Nothing here may be lost or done twice, and nothing polls; docs/design.md, "Shares as jobs", says how.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from typing import Mapping

from fast_dllm.errors import UsageError
from fast_dllm.record.judgement import Judge, set_aside_foreign
from fast_dllm.runner import jobs
from fast_dllm.runner.costs import START_SECONDS, cost_of, questions
from fast_dllm.runner.failures import own_job, write_failure
from fast_dllm.runner.resources import Resources
from fast_dllm.runner.sbatch import quoted, sbatch_command, submit, tell_refused
from fast_dllm.runner.slurm import as_hours, as_time, read_queue
from fast_dllm.runner.states import FORCE_FILE, State, is_forced
from fast_dllm.spec.files import read_json, remove
from fast_dllm.spec.locks import lock_is_held
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.shares import (
    AT_ONCE,
    DONE_FILE,
    MOST,
    SHARES_FOLDER,
    array_numbers,
    array_words,
    division,
    names_of,
    share_folder,
)

AUTO = "auto"
FINISHING_SECONDS = 3600.0  # of the job that finishes a run: where shares left it more, it is continued


# -- the plan ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Part:
    """What of a run is to be submitted. action: (submit, skip, or the jobs to cancel first; why). shards: 0: the run as
    one job. missing: the shares that are neither answered nor in the queue. finishes: with the job that finishes it.
    alive: the jobs in the queue that this one waits for beside those of the missing shares."""

    action: tuple[str, str]
    shards: int = 0
    missing: tuple[int, ...] = ()
    finishes: bool = False
    alive: tuple[str, ...] = ()

    @property
    def num_jobs(self) -> int:
        return len(self.missing) + self.finishes if self.shards else 1

    def settings(self, wall: float) -> list[str]:
        """For `submit`, of a job's wall time in seconds."""
        if not self.shards:
            return []
        words = [f"--shards={self.shards}", f"--missing={array_words(self.missing)}"]
        words += [f"--alive={':'.join(self.alive)}"] if self.finishes else []
        words += ["--finishes"] if self.finishes else []
        return words if math.isinf(wall) else [*words, f"--finishing_time={as_time(min(wall, FINISHING_SECONDS))}"]


def action(state: State, force: bool) -> tuple[str, str]:
    """(submit, skip, or the jobs to cancel first; why), of a run as a whole."""
    if state.state in ("running", "queued", "blocked"):
        ids = " ".join(bases(state)) if any(job.shares for job in state.jobs) else state.job
        return (f"cancel {ids}" if force else "skip", state.detail)
    if state.judgement.is_whole and state.state == state.judgement.state:
        if force:
            return "submit", state.detail or "complete, forced"
        detail = state.detail if "--force" in state.detail else f"{state.detail or 'complete'} (--force runs it again)"
        return "skip", detail
    return "submit", state.detail


def bases(state: State) -> tuple[str, ...]:
    """The jobs of a run as scancel takes them: of an array its own number."""
    return tuple(dict.fromkeys(job.job_id.partition("_")[0] for job in state.jobs))


def submitted_with(request: Request, run: Run) -> tuple[int, int]:
    """(shards, GPUs of a job) of the run's last submission; 0 shards where it was one job."""
    told = read_json(request.root / "results" / run.path / "job.json")[0] or {}
    shards, gpus = told.get("shards"), told.get("gpus")
    return (shards if isinstance(shards, int) else 0), (gpus if isinstance(gpus, int) else 1)


def part_of(request: Request, state: State, options: argparse.Namespace) -> Part:
    """What of a run is to be submitted. Under `auto`, of a run that is not divided yet, without its shares: see
    `divide`."""
    what, why = action(state, options.force)
    whole = [job for job in state.jobs if not job.shares]
    alive: set[int] = set().union(*(job.shares for job in state.jobs))
    # it is there, or one job has all of it
    if options.shards is None or what.startswith("cancel") or (what == "skip" and not alive):
        return Part((what, why))
    if any(not job.waits for job in whole):
        return Part((what, why))
    before, gpus = submitted_with(request, state.run)
    count = before if options.shards == AUTO and (alive or not options.force) else options.shards
    if alive and (count, options.gpus) != (before, gpus):
        told = f"--shards {before}" + (f" --gpus {gpus}" if gpus > 1 else "")
        return Part(("skip", f"{why}; it was submitted with {told}, which goes on"))
    if count in (0, AUTO):
        return Part((what, why))
    return divide(request, state, options, count)


def divide(request: Request, state: State, options: argparse.Namespace, count: int) -> Part:
    """A run in `count` shares."""
    if count == 1:
        return Part(action(state, options.force))
    alive: set[int] = set().union(*(job.shares for job in state.jobs))
    forced, missing, judge = options.force or is_forced(request.root, state.run), [], Judge(request)
    for number, name in enumerate(names_of(division(count, options.gpus))):
        share = dataclasses.replace(request, share=name)
        if number not in alive and (forced or not jobs.share_is_done(share, state.run, judge)):
            missing.append(number)
    # one that waits already looks at its start which jobs are there
    finishes = not any(not job.shares for job in state.jobs)
    why = action(state, options.force)[1]
    if not missing and not finishes:
        return Part(("skip", why), count)
    told = f"shards {array_words(missing)} of {count}" if missing else f"all {count} shards answered or at work"
    found = tuple(dict.fromkeys(job.job_id.partition("_")[0] for job in state.jobs if job.shares))
    return Part(("submit", f"{why}; {told}"), count, tuple(missing), finishes, found)


def choose_count(request: Request, run: Run, resources: Resources, gpus: int, places: int) -> tuple[int, str]:
    """(N of `--shards auto`, why): as many that each is answered within one job, with the margin of the times that are
    known, no more than questions or places in the queue. Raises UsageError where nothing tells a time."""
    cost = cost_of(request, run, resources.gpu)
    if cost is None:
        what = f"{run.task.name} with {request.model_or_default} on {resources.gpu or 'this GPU'}"
        raise UsageError(f"--shards auto: nothing here tells how long {what} takes; --shards N")
    if resources.wall <= START_SECONDS:
        raise UsageError(
            f"--shards auto: a job of {as_hours(resources.wall)} has no time beside its start, for which "
            f"{as_hours(START_SECONDS)} are kept; --hours H"
        )
    needed = cost.shares(resources.wall, gpus)
    count = min(needed, max(1, min(questions(run) or MOST, places, MOST)))
    hours = f"{cost.about} {cost.seconds / 3600:.2g} GPU hours {cost.source}"
    told = f"{run.folder}: --shards {count}, {hours}, in jobs of {as_hours(resources.wall)}"
    return count, told + (f" ({needed} would each end in one job)" if needed > count else "")


# -- the submission ----------------------------------------------------------------------------------------------------
def submit_shares(request: Request, options: argparse.Namespace, words: list[str], settings: dict[str, str]) -> int:
    """A run's missing shares and the job that finishes it, as the plan says. Exit status 75 where there is no place."""
    [run] = request.runs()
    folder, words = request.root / "results" / run.path, [*words, "--shards", str(options.shards)]
    missing = sorted(array_numbers(f"0_{options.missing}"))
    waits_for = [job for job in options.alive.split(":") if job]
    short = {**settings, "SBATCH_TIMELIMIT": options.finishing_time} if options.finishing_time else settings
    numbers = options.missing + (f"%{AT_ONCE}" if len(missing) > AT_ONCE else "")
    array = sbatch_command(options, words, array=numbers)

    def finishing() -> list[str]:
        return sbatch_command(options, words, dependency=f"afterany:{':'.join(waits_for)}" if waits_for else "")

    if options.dry_run:
        if missing:
            print(f"    {quoted([*as_words(settings), *array])}")
            waits_for.append("ARRAY")
        if options.finishes:
            print(f"    {quoted([*as_words(short), *finishing()])}")
        return 0
    (request.root / "logs" / run.path).mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and loses the log
    if not waits_for:
        set_aside_foreign(folder / "summary.json", run)
    if options.force or is_forced(request.root, run):
        begin_again(request, run)
    record = {"shards": options.shards, "gpus": options.gpus}
    parts = {n: share_folder(folder, f"{n}-of-{division(options.shards, options.gpus)}") for n in missing}
    for part in parts.values():
        remove(part / DONE_FILE, part / "failure.json")
    if missing:
        job, said = submit(array, settings)
        if not job:
            return tell_refused(run.folder, said)
        for number, part in parts.items():
            jobs.record_job(part, f"{job}_{number}", f"logs/{run.path}/slurm_{job}_{number}.log")
        print(f"  {run.folder}: job {job}[{options.missing}]")
        waits_for.append(job)
        jobs.record_job(folder, job, f"logs/{run.path}", **record)
    if not options.finishes:
        return 0
    job, said = submit(finishing(), short)
    if not job:
        jobs.say(f"run.sh: {run.folder}: the job that finishes it is missing; run.sh submits it when it is run again")
        return tell_refused(run.folder, said)
    jobs.record_job(folder, job, f"logs/{run.path}/slurm_{job}.log", **record)
    print(f"  {run.folder}: job {job} finishes it")
    return 0


def as_words(settings: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def begin_again(request: Request, run: Run) -> None:
    """--force of a run in shares: at once, for nobody is at work on it and several begin it."""
    folder = request.root / "results" / run.path
    jobs.force(request)  # until the rest is done
    if (folder / "summary.json").exists():
        (folder / "summary.json").replace(folder / "summary.previous.json")
    for name in ("answers", SHARES_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    jobs.record_job(folder, "", "")  # what is kept in artifacts/ is of an earlier run
    remove(folder / FORCE_FILE)


# -- within the jobs ---------------------------------------------------------------------------------------------------
def wait_for_shares(request: Request, options: argparse.Namespace) -> dict[str, object]:
    """In the job that finishes a run. WAITS: yes where shares are at work, or wait to be continued: another one like it
    waits for these now. Where the queue cannot be asked, or that one not be submitted, the job ends as one that is
    continued. Raises UsageError then."""
    [run] = request.runs()
    for tries in range(3):
        if tries:
            time.sleep(5)
        queued, fault = read_queue(request.root, [run.path])
        if not fault:
            break
    found = dict.fromkeys(job.job_id.partition("_")[0] for job in queued.get(run.path, []) if job.shares)
    fault = fault and f"squeue failed, so it is not known whether shards are still answered: {fault}"
    if found and not fault:
        command = sbatch_command(options, options.words, dependency=f"afterany:{':'.join(found)}")
        job, said = submit(command, {})
        if job:
            jobs.say(f"shards are still answered, by jobs {' '.join(found)}; job {job} waits for them")
            record = dict(zip(("shards", "gpus"), submitted_with(request, run)))
            jobs.record_job(request.root / "results" / run.path, job, options.log.replace("%j", job), **record)
            return {"WAITS": "yes"}
        fault = f"the job that waits for the shards could not be submitted: {said}"
    if fault:
        log = options.log.replace("%j", own_job())
        write_failure(request.root / "results" / run.path, "node_failure", 1, log, fault)
        raise UsageError(fault)
    return {"WAITS": "no"}


def is_last(request: Request) -> bool:
    """Every share is answered and its job at its end, so that this one can finish the run."""
    [run] = request.runs()
    folder, judge = request.root / "results" / run.path, Judge(request)
    return all(
        jobs.share_is_done(dataclasses.replace(request, share=name), run, judge)
        and not lock_is_held(share_folder(folder, name) / ".lock")
        for name in names_of(str(request.share).rpartition("-of-")[2])
    )


def waiting(request: Request) -> list[str]:
    """The jobs that wait for the shares of a run: once it is complete, they have nothing to do."""
    [run] = request.runs()
    queued = read_queue(request.root, [run.path])[0].get(run.path, [])
    return [job.job_id for job in queued if job.waits and not job.shares]
