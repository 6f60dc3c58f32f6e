"""What run.sh submits: for each configuration whether, with what, and whether there is a place for it; and sbatch."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import Iterator

from fast_dllm.runner import arrays, jobs, slurm
from fast_dllm.runner.arrays import Part, as_words
from fast_dllm.runner.costs import cost_of
from fast_dllm.runner.resources import Resources, decide, source_of_limits
from fast_dllm.runner.sbatch import quoted, sbatch_command, submit, tell_refused
from fast_dllm.runner.slurm import as_hours
from fast_dllm.runner.states import State, examine
from fast_dllm.spec.request import Request
from fast_dllm.spec.tasks import TASKS


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
    parts, resources = [arrays.part_of(request, state, options) for state in states], None
    if any(part.action[0] == "submit" for part in parts):
        there = types_there(request, states)
        runs = [state.run for state, part in zip(states, parts) if part.action[0] == "submit"]
        resources = decide(request, runs, options, there)
        for line in resources.told:
            say(line)
        others = sorted(there - {resources.gpu}) if resources.gpu else []
        if others:
            say(f"the table will be mixed: other configurations are on {', '.join(others)}, these on {resources.gpu}")
        parts = wait_for_places(request, divided(request, states, parts, options, resources), options, resources)
        tell_costs(request, list(zip(states, parts)), resources, options)
    for state, part in zip(states, parts):
        settings = [f"--set={name}={value}" for name, value in resources.settings.items()] if resources else []
        settings += part.settings(resources.wall) if resources else []
        fields = [state.run.name, state.run.path, *part.action, quoted(settings)]
        print("\t".join(field.replace("\t", " ").replace("\n", " ") for field in fields))
    tell_blocked(asked, states)
    return 0


def divided(
    request: Request, states: list[State], parts: list[Part], options: argparse.Namespace, resources: Resources
) -> list[Part]:
    """The parts with the shares that `--shards auto` chooses for them."""
    if options.shards != arrays.AUTO:
        return parts
    new = [part.action[0] == "submit" and not part.shards for part in parts]
    continued = bool(int(vars(options)["continue"]))
    # of those that are free an equal part for each, a place for the job that finishes it, and for what continues them
    free = [max(free - to_come, 0) for *_, free, to_come in free_places(request, resources, continued)]
    most = min((max(1, places // (1 + continued) // sum(new) - 1) for places in free), default=sys.maxsize)
    found = []
    for state, part, is_new in zip(states, parts, new):
        if is_new:
            count, told = arrays.choose_count(request, state.run, resources, options.gpus, most)
            say(told)
            part = arrays.divide(request, state, options, count)
        found.append(part)
    return found


def types_there(request: Request, states: list[State]) -> set[str]:
    """GPU types of what is complete, queued or running of the whole table, whatever part of it was asked for."""
    if set(request.names) != set(request.matrix.names):
        whole = dataclasses.replace(request, names=request.matrix.names)
        states = examine(whole)[0]
    return {state.gpu for state in states if state.gpu}


def limits(resources: Resources) -> list[tuple[str, int]]:
    """(name of a QOS or account, jobs of a user that it takes)."""
    found = [(resources.qos.name, resources.qos.submitted)]
    found += [(resources.account.account, resources.account.submitted)] if resources.account else []
    return [(name, limit) for name, limit in found if limit is not None]


def free_places(request: Request, resources: Resources, continued: bool) -> Iterator[tuple[str, int, int, int, int]]:
    """(QOS or account, jobs of a user that it takes, those that the user has, how many more are free, how many of these
    are to be kept): all of them counted, those of an array one by one. A job submits at its start the one that
    continues it: places are kept for those of the jobs of this project that have not started yet. Nothing where Slurm
    does not say."""
    known = limits(resources)
    own = slurm.own_jobs() if known else None
    for name, limit in known if own is not None else ():
        counted = [one for one in own or () if name in (one.qos, one.account)]
        to_come = [one for one in counted if one.pending and not one.waits and one.folder == str(request.root)]
        yield name, limit, len(counted), max(0, limit - len(counted)), len(to_come) if continued else 0


def wait_for_places(
    request: Request, parts: list[Part], options: argparse.Namespace, resources: Resources
) -> list[Part]:
    """The parts, of which those wait that have no place in the queue beside what is there; each job needs another one
    for the job that continues it. The first that is to be submitted is content without."""
    continued = bool(int(vars(options)["continue"]))
    submitted = [number for number, part in enumerate(parts) if part.action[0] == "submit"]
    waiting: set[int] = set()
    for name, limit, taken, free, to_come in free_places(request, resources, continued):
        left, lacking = max(free - to_come, 0), []
        for number in submitted:
            needed = parts[number].num_jobs
            if needed * (1 + continued) <= left:
                left -= needed * (1 + continued)
            elif number == submitted[0] and needed <= free:
                left = 0
            else:
                lacking.append(number)
        if lacking:
            kept = ", and each keeps a place for the job that continues it" if continued else ""
            largest = max(parts[number].num_jobs for number in lacking)
            kept += f"; {largest} at once never fit: fewer --shards" if largest > limit else ""
            say(f"{name} takes {limit} jobs of a user, queued and running{source_of_limits()}; you have {taken}{kept}")
        waiting.update(lacking)
    wait = ("wait", "no place for it in the queue")
    return [dataclasses.replace(part, action=wait) if n in waiting else part for n, part in enumerate(parts)]


# -- what it costs -----------------------------------------------------------------------------------------------------
def tell_costs(
    request: Request, planned: list[tuple[State, Part]], resources: Resources, options: argparse.Namespace
) -> None:
    planned = [(state, part) for state, part in planned if part.action[0] == "submit"]
    if not planned or math.isinf(resources.wall):
        return
    wall, count = resources.wall, sum(len(part.missing) if part.shards else 1 for _, part in planned)
    finishing = sum(part.finishes for _, part in planned)
    many = f"{count} job{'s' * (count > 1)}" if count else ""
    if finishing:
        many += f"{' and ' if count else ''}{finishing} short one{'s' * (finishing > 1)}"
    kind = f"{resources.gpus} {resources.gpu or 'GPU'}" + (" each" if count + finishing > 1 else "")
    hours = (count * wall + finishing * min(wall, arrays.FINISHING_SECONDS)) / 3600 * resources.gpus
    text = f"{many}, {kind}, {as_hours(wall)} of wall time: {hours:.4g} GPU hours at most"
    text += "" if resources.qos.name == "embers" else " (the account must cover all of them before the jobs start)"
    known = [(cost_of(request, state.run, resources.gpu), part) for state, part in planned]
    costs = [(cost, part) for cost, part in known if cost]
    if len(costs) == len(planned):
        fractions = (len(part.missing) / part.shards if part.shards else 1.0 for _, part in costs)
        spent = sum(cost.seconds * fraction for (cost, _), fraction in zip(costs, fractions))
        spent *= resources.gpus / options.gpus / 3600
        told = f"{costs[0][0].about} {spent:.2g}" if spent >= 0.1 else "less than 0.1"
        text += f"; {told}, {', '.join(dict.fromkeys(cost.source for cost, _ in costs))}"
        longest = max(cost.wall((part.shards or 1) * options.gpus) for cost, part in costs)
        if longest > wall:
            jobs_each, continued = math.ceil(longest / wall), int(vars(options)["continue"])
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
def submit_run(request: Request, options: argparse.Namespace) -> int:
    """One configuration, as the plan says. Exit status 75 where the user has as many jobs as allowed."""
    [run] = request.runs()
    settings = dict(text.split("=", 1) for text in options.set)
    options.text, options.log, options.script = run.path, f"logs/{run.path}/slurm_%j.log", "_job.sh"
    request = dataclasses.replace(request, model=request.model_or_default)
    words = [*request.words(run.task.name, run.name), "--continue", vars(options)["continue"]]
    words += ["--gpus", str(options.gpus)] if options.gpus > 1 else []
    if options.missing or options.finishes:
        return arrays.submit_shares(request, options, words, settings)
    command = sbatch_command(options, words)
    if options.dry_run:
        print(f"    {quoted([*as_words(settings), *command])}")
        return 0
    (request.root / "logs" / run.path).mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and loses the log
    if options.force:
        jobs.force(request)
    job, said = submit(command, settings)
    if not job:
        return tell_refused(run.folder, said)
    jobs.record_job(request.root / "results" / run.path, job, f"logs/{run.path}/slurm_{job}.log")
    print(f"  {run.folder}: job {job}")
    return 0
