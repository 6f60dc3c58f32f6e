"""Plans what run.sh submits and submits it: which configurations, with which resources, within the queue's limits."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Iterator

from fast_dllm.runner import shard_jobs, slurm, snapshot, venv
from fast_dllm.runner.costs import estimate_of
from fast_dllm.runner.messages import quoted, say
from fast_dllm.runner.records import force, record_job
from fast_dllm.runner.resources import Resources, SubmitOptions, decide, source_of_limits
from fast_dllm.runner.sbatch import NO_PLACE_STATUS, JobScript, say_refused, submit
from fast_dllm.runner.shard_jobs import RunPlan, as_words
from fast_dllm.runner.slurm import as_hours
from fast_dllm.runner.states import State, examine
from fast_dllm.spec.defaults import AUTO
from fast_dllm.spec.locks import Claim, acquire
from fast_dllm.spec.request import Request
from fast_dllm.spec.tasks import TASKS, task_folder


@dataclass(frozen=True)
class SubmissionPlan:
    """What to do with each configuration. request: names the model that the jobs load."""

    request: Request
    planned: list[tuple[State, RunPlan]]
    resources: Resources | None

    @property
    def settings(self) -> dict[str, str]:
        return self.resources.settings if self.resources else {}

    @property
    def wall(self) -> float:
        return self.resources.wall if self.resources else math.inf


def say_run(text: str) -> None:
    say(f"run.sh: {text}")


def run_submission(request: Request, options: SubmitOptions) -> int:
    """Submit what is missing, under a lock, so that two users at once submit nothing twice; returns the exit status."""
    if options.dry_run:
        return submit_missing(request, options, None)
    if not shutil.which("sbatch"):
        say_run("no sbatch here, so this is no Slurm cluster; sbatch/local.sh evaluates on this machine")
        return 1
    folder = request.root / "logs" / request.experiment / task_folder(request.task, request.limit)
    claim = acquire(folder / ".submit", wait=True)
    try:
        return submit_missing(request, options, claim)
    except snapshot.SnapshotError as error:
        say_run(f"{error}; nothing more is submitted; run it again")
        return 1
    finally:
        if claim is not None:
            claim.release()


def submit_missing(request: Request, options: SubmitOptions, claim: Claim | None) -> int:
    """Plan under the lock, where what another run.sh has just submitted is seen, and submit. claim: None: dry run."""
    plan = make_plan(request, options)
    if plan is None:
        return 1
    status = submitted = waiting = 0
    code: str | None = None
    for state, run_plan in plan.planned:
        folder = state.run.folder
        if run_plan.action != "submit":
            print(f"  {folder}: not submitted, {run_plan.why}")
            waiting += run_plan.action == "wait"
            if run_plan.action.startswith("cancel"):
                say(f"  {folder}: --force does not run it twice; first: s{run_plan.action}")
                status = 1
            continue
        if code is None:
            code = snapshot.name_of(request.root, request.experiment, request.model_or_default)
            if claim is not None:
                if not passes_quick_check(request):
                    return 1
                code = snapshot.ensure(request.root, request.experiment, request.model_or_default)
        if claim is None:
            print(f"  {folder}: would be submitted ({run_plan.why})")
        elif not claim.is_ours():
            say_run("another run.sh took this one for dead and goes on")
            return 1
        result = submit_run(plan, state, run_plan, options, code)
        submitted += result == 0
        waiting += result == NO_PLACE_STATUS  # others had taken the place meanwhile
        status = status if result in (0, NO_PLACE_STATUS) else 1
    if waiting:
        how = "would be " if options.dry_run else ""
        say_run(f"{submitted} of {submitted + waiting} {how}submitted, {waiting} wait for a place: run it again")
    return status


def passes_quick_check(request: Request) -> bool:
    """Run the doctor's quick checks; returns whether the jobs may be submitted. Warnings are shown and stop nothing."""
    python = venv.python_for_checks(request.code_root, request.root)
    if python is None:
        say_run("no Python >= 3.8 with the venv module here, so nothing is checked before the submission")
        return True
    words = ["--task", request.task, "--model", request.model_or_default]
    command = [python, "-B", "-m", "fast_dllm.doctor", "--quick", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(request.root))
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    for line in lines:
        if not line.startswith("ok "):
            say(line)
    if any(line.startswith("fail ") for line in lines):
        say_run(f"nothing is submitted; python -m fast_dllm.doctor {' '.join(words)} says more")
        return False
    if done.returncode:
        say_run("the check before the submission failed; submitting all the same")
    return True


def submit_run(plan: SubmissionPlan, state: State, run_plan: RunPlan, options: SubmitOptions, code: str) -> int:
    """Submit one configuration as planned; returns the exit status: 75 if the user has as many jobs as allowed."""
    request, run = plan.request, state.run
    words = [*request.words(run.task.name, run.name), "--continue", str(options.further_jobs)]
    words += ["--gpus", str(options.gpus)] if options.gpus > 1 else []
    words += ["--shards", str(run_plan.shards)] if run_plan.shards else []
    script = JobScript(
        run.path, "_job.sh", tuple(words), snapshot=code, log=f"logs/{run.path}/slurm_%j.log", gpus=options.gpus
    )
    if options.dry_run:
        if run_plan.shards:
            shard_jobs.print_commands(run_plan, script, plan.settings, plan.wall)
        else:
            print(f"    {quoted([*as_words(plan.settings), *script.command()])}")
        return 0
    (request.root / "logs" / run.path).mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and loses the log
    if run_plan.shards:
        return shard_jobs.submit_shards(request, run, run_plan, script, options, plan.settings, plan.wall)
    if options.force:
        force(request.only(run.task.name, [run.name]))
    job, reply = submit(script.command(), plan.settings)
    if not job:
        return say_refused(run.folder, reply)
    record_job(request.root / "results" / run.path, job, f"logs/{run.path}/slurm_{job}.log")
    print(f"  {run.folder}: job {job}")
    return 0


# -- the plan ----------------------------------------------------------------------------------------------------------
def make_plan(request: Request, options: SubmitOptions) -> SubmissionPlan | None:
    """What to do with each configuration. Raises UsageError.

    If Slurm does not tell the queue, a dry run plans without it; otherwise the result is None.
    """
    if TASKS[request.task].is_scored and len(request.names) > 1:
        say(
            f"{request.task} is scored by log-likelihood, in one full forward: layer reuse cannot change its scores. "
            f"One configuration suffices: {request.matrix.compare_with}"
        )
    original_request, request = request, dataclasses.replace(request, model=request.model_or_default)
    states, fault = examine(request)
    if fault and options.dry_run:
        say_run(f"the cluster cannot be asked, so this plan knows no queued or running job: {fault}")
    elif fault:
        say_run(f"squeue failed, so nothing is submitted: {fault}; sbatch/local.sh evaluates on this machine")
        return None
    plans, resources = [shard_jobs.plan_of(request, state, options) for state in states], None
    if any(run_plan.action == "submit" for run_plan in plans):
        present = gpu_types_of_table(request, states)
        runs = [state.run for state, run_plan in zip(states, plans) if run_plan.action == "submit"]
        resources = decide(request, runs, options, present)
        for line in resources.notes:
            say_run(line)
        others = sorted(present - {resources.gpu}) if resources.gpu else []
        if others:
            say_run(
                f"the table will be mixed: other configurations are on {', '.join(others)}, these on {resources.gpu}"
            )
        plans = divide_automatically(request, states, plans, options, resources)
        plans = wait_for_places(request, plans, options, resources)
        say_costs(request, list(zip(states, plans)), resources, options)
    say_blocked(original_request, states)
    return SubmissionPlan(request, list(zip(states, plans)), resources)


def divide_automatically(
    request: Request, states: list[State], plans: list[RunPlan], options: SubmitOptions, resources: Resources
) -> list[RunPlan]:
    """The plans, with the number of shards that `--shards auto` chooses for each new one."""
    if options.shards != AUTO:
        return plans
    is_new = [run_plan.action == "submit" and not run_plan.shards for run_plan in plans]
    continued = options.further_jobs > 0
    # Each configuration gets an equal number of the free places: half are for continuations, one for the finishing job.
    free = [max(free - reserved, 0) for *_, free, reserved in free_places(request, resources, continued)]
    most = min((max(1, places // (1 + continued) // sum(is_new) - 1) for places in free), default=sys.maxsize)
    divided = []
    for state, run_plan, new in zip(states, plans, is_new):
        if new:
            count, reason = shard_jobs.choose_count(request, state.run, resources, options.gpus, most)
            say_run(reason)
            run_plan = shard_jobs.divide(request, state, options, count)
        divided.append(run_plan)
    return divided


def gpu_types_of_table(request: Request, states: list[State]) -> set[str]:
    """The GPU types of all complete, queued and running configurations of the table, also those not in the request."""
    if set(request.names) != set(request.matrix.names):
        states = examine(dataclasses.replace(request, names=request.matrix.names))[0]
    return {state.gpu for state in states if state.gpu}


# -- places in the queue -----------------------------------------------------------------------------------------------
def limits(resources: Resources) -> list[tuple[str, int]]:
    """(name of the QOS or account, the most jobs of a user), for those with a limit."""
    all_limits = [(resources.qos.name, resources.qos.submitted)]
    all_limits += [(resources.account.account, resources.account.submitted)] if resources.account else []
    return [(name, limit) for name, limit in all_limits if limit is not None]


def free_places(request: Request, resources: Resources, continued: bool) -> Iterator[tuple[str, int, int, int, int]]:
    """(QOS or account, most jobs of a user, jobs that the user has, free places, how many of these are reserved).

    Each job of an array counts. A job submits its continuation when it starts, so one place is reserved for each job of
    this project that has not started yet. Yields nothing if Slurm does not tell the limits or the jobs.
    """
    limits_known = limits(resources)
    jobs = slurm.user_jobs() if limits_known else None
    if jobs is None:
        return
    for name, limit in limits_known:
        counted = [job for job in jobs if name in (job.qos, job.account)]
        not_started = [
            job for job in counted if job.state == "PENDING" and not job.waits and job.folder == str(request.root)
        ]
        yield name, limit, len(counted), max(0, limit - len(counted)), len(not_started) if continued else 0


def wait_for_places(
    request: Request, plans: list[RunPlan], options: SubmitOptions, resources: Resources
) -> list[RunPlan]:
    """The plans, with `wait` for those for which the queue has no place.

    Each job also needs a place for its continuation, except the first one to be submitted.
    """
    continued = options.further_jobs > 0
    numbers = [number for number, run_plan in enumerate(plans) if run_plan.action == "submit"]
    waiting: set[int] = set()
    for name, limit, taken, free, reserved in free_places(request, resources, continued):
        places, without_place = max(free - reserved, 0), []
        for number in numbers:
            needed = plans[number].num_jobs
            if needed * (1 + continued) <= places:
                places -= needed * (1 + continued)
            elif number == numbers[0] and needed <= free:
                places = 0
            else:
                without_place.append(number)
        if without_place:
            text = ", and each keeps a place for the job that continues it" if continued else ""
            largest = max(plans[number].num_jobs for number in without_place)
            text += f"; {largest} at once never fit: fewer --shards" if largest > limit else ""
            say_run(
                f"{name} takes {limit} jobs of a user, queued and running{source_of_limits()}; you have {taken}{text}"
            )
        waiting.update(without_place)
    return [
        dataclasses.replace(run_plan, action="wait", why="no place for it in the queue") if n in waiting else run_plan
        for n, run_plan in enumerate(plans)
    ]


# -- what it costs -----------------------------------------------------------------------------------------------------
def say_costs(
    request: Request, planned: list[tuple[State, RunPlan]], resources: Resources, options: SubmitOptions
) -> None:
    """Print one line: the GPU hours that the jobs take at most, and the time that they are expected to take."""
    planned = [(state, run_plan) for state, run_plan in planned if run_plan.action == "submit"]
    if not planned or math.isinf(resources.wall):
        return
    wall, count = resources.wall, sum(len(run_plan.missing) if run_plan.shards else 1 for _, run_plan in planned)
    finishing = sum(run_plan.finishes for _, run_plan in planned)
    many = f"{count} job{'s' * (count > 1)}" if count else ""
    if finishing:
        many += f"{' and ' if count else ''}{finishing} short one{'s' * (finishing > 1)}"
    kind = f"{resources.gpus} {resources.gpu or 'GPU'}" + (" each" if count + finishing > 1 else "")
    hours = (count * wall + finishing * min(wall, shard_jobs.FINISHING_SECONDS)) / 3600 * resources.gpus
    text = f"{many}, {kind}, {as_hours(wall)} of wall time: {hours:.4g} GPU hours at most"
    text += "" if resources.qos.name == "embers" else " (the account must cover all of them before the jobs start)"
    known = [(estimate_of(request, state.run, resources.gpu), run_plan) for state, run_plan in planned]
    costs = [(cost, run_plan) for cost, run_plan in known if cost]
    if len(costs) == len(planned):
        fractions = (len(plan.missing) / plan.shards if plan.shards else 1.0 for _, plan in costs)
        spent = sum(cost.seconds * fraction for (cost, _), fraction in zip(costs, fractions))
        spent *= resources.gpus / options.gpus / 3600
        expected = f"{costs[0][0].about} {spent:.2g}" if spent >= 0.1 else "less than 0.1"
        text += f"; {expected}, {', '.join(dict.fromkeys(cost.source for cost, _ in costs))}"
        longest = max(cost.wall((plan.shards or 1) * options.gpus) for cost, plan in costs)
        if longest > wall:
            jobs_each = math.ceil(longest / wall)
            text += f". One may take {as_hours(longest)}, that is {jobs_each} jobs"
            enough = jobs_each <= options.further_jobs + 1
            text += ", each continuing the one before" if enough else f": --continue {jobs_each - 1}"
    say_run(text)


# -- what blocks -------------------------------------------------------------------------------------------------------
def say_blocked(request: Request, states: list[State]) -> None:
    """Print the command that replaces jobs that will never start."""
    blocked = [state for state in states if state.state == "blocked" and "scancel" in state.detail]
    if blocked:
        words = ["bash", "sbatch/run.sh", *request.words_of_all([state.run.name for state in blocked])]
        ids = " ".join(state.job for state in blocked)
        say_run(f"what is blocked never starts; submitted anew: scancel {ids}; {quoted(words)}")
