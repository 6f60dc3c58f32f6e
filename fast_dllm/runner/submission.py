"""What run.sh submits: for each configuration whether, with what, and whether there is a place for it; and sbatch."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from typing import Iterator, Mapping

from fast_dllm.runner import jobs, slurm
from fast_dllm.runner.costs import cost_of
from fast_dllm.runner.request import Request
from fast_dllm.runner.resources import Resources, decide, source_of_limits
from fast_dllm.runner.slurm import as_hours
from fast_dllm.runner.states import State, examine
from fast_dllm.runner.tasks import TASKS

# sbatch's words for a user who has as many jobs as the QOS or the account allows
NO_PLACE = ("QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerAccountLimit")
NO_PLACE_STATUS = 75


def say(text: str) -> None:
    jobs.say(f"run.sh: {text}")


# -- the plan ----------------------------------------------------------------------------------------------------------
def plan(request: Request, options: argparse.Namespace) -> int:
    """For each configuration a line: name, folder, submit, wait (for a place), skip, or the job to cancel first; why;
    the settings for sbatch, quoted. Separated by tabs."""
    task = TASKS[request.task]
    if task.is_scored and len(request.names) > 1:
        jobs.say(
            f"{request.task} is scored by log-likelihood, in one full forward: layer reuse cannot change its scores. "
            f"One configuration suffices: {request.matrix.compare_with}"
        )
    asked, request = request, dataclasses.replace(request, model=request.model_or_default)
    states, fault = examine(request)
    if fault:
        say(f"squeue failed, so nothing is submitted: {fault}")
        return 1
    actions = [action(state, options.force) for state in states]
    submitted = [state for state, (what, _) in zip(states, actions) if what == "submit"]
    resources, places = None, len(submitted)
    if submitted:
        there = types_there(request, states)
        resources = decide(request, [state.run for state in submitted], options, there)
        for line in resources.told:
            say(line)
        others = sorted(there - {resources.gpu}) if resources.gpu else []
        if others:
            say(f"the table will be mixed: other configurations are on {', '.join(others)}, these on {resources.gpu}")
        places = free_places(request, resources, options)
        tell_costs(request, submitted[:places], resources, int(vars(options)["continue"]))
    for state, (what, why) in zip(states, actions):
        if what == "submit" and not places:
            what, why = "wait", "no place for it in the queue"
        elif what == "submit":
            places -= 1
        settings = [f"--set={name}={value}" for name, value in resources.settings.items()] if resources else []
        fields = [state.run.name, state.run.path, what, why, quoted(settings)]
        print("\t".join(field.replace("\t", " ").replace("\n", " ") for field in fields))
    tell_blocked(asked, states)
    return 0


def quoted(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))


def action(state: State, force: bool) -> tuple[str, str]:
    """(submit, skip, or the job to cancel first; why)."""
    if state.state in ("running", "queued", "blocked"):
        return (f"cancel {state.job}" if force else "skip", state.detail)
    if state.state in ("complete", "stale", "earlier"):
        if force:
            return "submit", state.detail or "complete, forced"
        detail = state.detail if "--force" in state.detail else f"{state.detail or 'complete'} (--force runs it again)"
        return "skip", detail
    return "submit", state.detail


def types_there(request: Request, states: list[State]) -> set[str]:
    """GPU types of what is complete, queued or running of the whole table, whatever part of it was asked for."""
    if set(request.names) != set(request.matrix.names):
        whole = dataclasses.replace(request, names=request.matrix.names)
        states = examine(whole)[0]
    return {state.gpu for state in states if state.gpu}


def free_places(request: Request, resources: Resources, options: argparse.Namespace) -> int:
    """How many of the jobs fit beside those that the user has, all of them counted, those of an array one by one.

    A job submits at its start the one that continues it: a place is kept for that, and for those of the jobs of this
    project that have not started yet.
    """
    account, qos, each = resources.account, resources.qos, 2 if int(vars(options)["continue"]) else 1
    limits = [(qos.name, qos.submitted)] + ([(account.account, account.submitted)] if account else [])
    known = [(name, limit) for name, limit in limits if limit is not None]
    own = slurm.own_jobs() if known else None
    least = sys.maxsize
    for name, limit in known if own is not None else ():
        counted = [one for one in own or () if name in (one.qos, one.account)]
        to_come = [one for one in counted if one.pending and not one.waits and one.folder == str(request.root)]
        free = max(0, limit - len(counted))
        fit = max(free - (each - 1) * len(to_come), 0) // each or min(free, 1)
        if fit < min(least, len(request.names)):
            kept = ", and each keeps a place for the job that continues it" if each == 2 else ""
            taken = f"{name} takes {limit} jobs of a user, queued and running{source_of_limits()}"
            say(f"{taken}; you have {len(counted)}{kept}")
        least = min(least, fit)
    return least


# -- what it costs -----------------------------------------------------------------------------------------------------
def tell_costs(request: Request, states: list[State], resources: Resources, continued: int) -> None:
    if not states or math.isinf(resources.wall):
        return
    count, wall = len(states), resources.wall
    many, gpus = f"{count} job{'s' * (count > 1)}", resources.gpus * count
    kind = f"{resources.gpus} {resources.gpu or 'GPU'}" + (" each" if count > 1 else "")
    text = f"{many}, {kind}, {as_hours(wall)} of wall time: {wall / 3600 * gpus:.4g} GPU hours at most"
    text += "" if resources.qos.name == "embers" else " (the account must cover all of them before the jobs start)"
    costs = [cost_of(request, state.run, resources.gpu) for state in states]
    known = [cost for cost in costs if cost]
    if len(known) == count:
        hours = sum(cost.seconds for cost in known) / 3600 * resources.gpus
        told = f"{known[0].about} {hours:.2g}" if hours >= 0.1 else "less than 0.1"
        text += f"; {told}, {', '.join(dict.fromkeys(cost.source for cost in known))}"
        longest = max(cost.wall for cost in known)
        if longest > wall:
            jobs_each = math.ceil(longest / wall)
            text += f". One may take {as_hours(longest)}, that is {jobs_each} jobs"
            text += f": --continue {jobs_each - 1}" if jobs_each > continued + 1 else ", each continuing the one before"
    say(text)


# -- what blocks -------------------------------------------------------------------------------------------------------
def tell_blocked(request: Request, states: list[State]) -> None:
    """The submission that puts right what waits in vain."""
    found = [state for state in states if state.state == "blocked" and "scancel" in state.detail]
    if found:
        words = ["bash", "sbatch/run.sh", *request.words_of_all([state.run.name for state in found])]
        ids = " ".join(state.job for state in found)
        say(f"what is blocked never starts; submitted anew: scancel {ids}; {quoted(words)}")


# -- sbatch ------------------------------------------------------------------------------------------------------------
def sbatch_command(options: argparse.Namespace, words: list[str]) -> list[str]:
    """options: text (the job's name), log ("": the script's own), dependency, resources, snapshot, script."""
    command = ["sbatch", "--parsable", f"--job-name={options.text}"]
    command += [f"--output={options.log}"] if options.log else []
    if options.dependency:
        command += [f"--dependency={options.dependency}", "--kill-on-invalid-dep=yes"]
        command += jobs.resources_of_job() if options.resources else []
    folder = f".snapshots/{options.snapshot}/" if options.snapshot else ""
    command += [f"{folder}sbatch/{options.script}"] + (["--snapshot", options.snapshot] if folder else [])
    return command + words


def submit(command: list[str], settings: Mapping[str, str]) -> tuple[str, str]:
    """(the job's id or "", what sbatch said)."""
    worked, text = slurm.ask(*command, settings=settings)
    # warnings come first; the id may have the cluster's name behind it
    return (text.split()[-1].split(";")[0], text) if worked and text else ("", text)


def has_no_place(said: str) -> bool:
    """sbatch refused for this alone, that the user has as many jobs as allowed."""
    return any(words in said for words in NO_PLACE)


def submit_run(request: Request, options: argparse.Namespace) -> int:
    """One configuration, as the plan says. Exit status 75 where the user has as many jobs as allowed."""
    [run] = request.runs()
    settings = dict(text.split("=", 1) for text in options.set)
    options.text, options.log, options.script = run.path, f"logs/{run.path}/slurm_%j.log", "_job.sh"
    request = dataclasses.replace(request, model=request.model_or_default)
    words = [*request.words(run.task.name, run.name), "--continue", vars(options)["continue"]]
    command = sbatch_command(options, words)
    if options.dry_run:
        assigned = [f"{name}={value}" for name, value in settings.items()]
        print(f"    {quoted([*assigned, *command])}")
        return 0
    (request.root / "logs" / run.path).mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and loses the log
    if options.force:
        jobs.force(request)
    job, said = submit(command, settings)
    if not job and has_no_place(said):
        print(f"  {run.folder}: not submitted, no place for it in the queue")
        return NO_PLACE_STATUS
    if not job:
        jobs.say(f"  {run.folder}: sbatch failed: {said}")
        return 1
    jobs.record_job(request.root / "results" / run.path, job, f"logs/{run.path}/slurm_{job}.log")
    print(f"  {run.folder}: job {job}")
    return 0


def submit_successor(options: argparse.Namespace, words: list[str]) -> Iterator[tuple[str, str]]:
    """SUCCESSOR and REFUSED, for continue.sh."""
    job, said = submit(sbatch_command(options, words), {})
    yield "SUCCESSOR", job
    hint = " (you have as many jobs as your QOS allows; run.sh submits it once there is a place)"
    hint = hint if has_no_place(said) else ""
    yield "REFUSED", "" if job else f"{said}{hint}"
