"""Decides what the jobs of one submission ask Slurm for: account, QOS, GPU, and a wall time that the QOS allows.

The command line takes precedence over the environment (with sbatch/cluster.env), and that over sbatch/_job.sh. The
decision is given to sbatch in SBATCH_ variables, so that a job that continues another one has the same.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner import slurm
from fast_dllm.runner.costs import estimate_of
from fast_dllm.runner.gpus import choose_gpu, count_of, memory_for
from fast_dllm.runner.slurm import KNOWN_FROM, KNOWN_QOS, Association, Qos, as_hours, as_time, read_time
from fast_dllm.spec.defaults import AUTO
from fast_dllm.spec.request import Request, Run

WHERE = "SBATCH_ACCOUNT in sbatch/cluster.env"


@dataclass(frozen=True)
class Resources:
    """What the jobs ask for.

    account, qos: with the limits that Slurm reports or that are known. gpu: its type, or "". wall: seconds of a job.
    settings: further variables for sbatch. notes: the decisions, one line each, for people.
    """

    account: Association | None
    qos: Qos
    gpu: str
    gpus: int
    wall: float
    settings: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SubmitOptions:
    """How to submit jobs, as the command line says it.

    further_jobs: how many jobs may continue one that Slurm ended. hours: a number, AUTO or None. gpu: types, or None.
    gpus: of each job. shards: into how many a run is divided, AUTO, or None for a run that is one job.
    """

    force: bool = False
    dry_run: bool = False
    further_jobs: int = 3
    hours: str | None = None
    gpu: str | None = None
    gpus: int = 1
    shards: int | str | None = None

    @property
    def num_processes(self) -> int:
        """The processes that answer a run, as far as their number is given: those of all its shards."""
        return self.gpus * (self.shards if isinstance(self.shards, int) else 1)


def script_option(code_root: Path, name: str) -> str:
    """The value of an #SBATCH option in sbatch/_job.sh."""
    text = (code_root / "sbatch" / "_job.sh").read_text(encoding="utf-8")
    match = re.search(rf"^#SBATCH --{name}=(\S+)$", text, re.MULTILINE)
    assert match, f"sbatch/_job.sh names no --{name}"
    return match[1]


def check_hours(text: str) -> float | None:
    """The seconds that `--hours` asks for; None for `auto`. Raises UsageError."""
    if text == AUTO:
        return None
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,3})?", text, re.ASCII) or float(text) * 60 < 1:
        raise UsageError(f"--hours must be a number of hours of at least a minute, or auto, not {text!r}")
    return float(text) * 3600


def decide(request: Request, runs: list[Run], options: SubmitOptions, present: Iterable[str] = ()) -> Resources:
    """The resources of the jobs of these runs. present: GPU types of the table's other results and jobs.

    Raises UsageError if Slurm would refuse the jobs, or accept and never start them.
    """
    notes: list[str] = []
    settings: dict[str, str] = {}
    account, qos = account_and_qos(request.code_root, os.environ)
    if account and not os.environ.get("SBATCH_ACCOUNT"):
        settings["SBATCH_ACCOUNT"] = account.account
        which = "the only one you have" if len(slurm.associations() or ()) == 1 else "your default one"
        notes.append(f"account {account.account}, {which}")
    longest, limiter = qos.wall, qos.name
    if account and account.wall < longest:
        longest, limiter = account.wall, f"account {account.account}"
    gres = os.environ.get("SBATCH_GRES") or script_option(request.code_root, "gres")

    def wall_on(gpu: str) -> float:
        return _wall(request, runs, options, gpu, limiter, longest)[0]

    if options.gpu:
        wanted = {**settings, "SBATCH_QOS": qos.name}
        gpu, lines = choose_gpu(request, options.gpu, present, lambda each: {**wanted, **_time(wall_on(each))})
        notes += lines
        gres = settings["SBATCH_GRES"] = f"gpu:{gpu}:1"
        settings.update(memory_for(gpu, script_option(request.code_root, "mem")))
    gpu = slurm.gpu_type(gres)
    if options.gpus > 1:
        gres = settings["SBATCH_GRES"] = ":".join(["gpu", *([gpu] if gpu else []), str(options.gpus)])
        settings.update(memory_of(options.gpus, settings, script_option(request.code_root, "mem")))
    wall, line = _wall(request, runs, options, gpu, limiter, longest)
    notes += [line] if line else []
    if line or options.hours:
        settings.update(_time(wall))
    return Resources(account, qos, gpu, count_of(gres), wall, settings, tuple(notes))


def memory_of(gpus: int, settings: Mapping[str, str], asked: str) -> dict[str, str]:
    """The host memory of a job: that of one GPU, times `gpus`. Empty if the user has set it. asked: as in _job.sh."""
    if os.environ.get("SBATCH_MEM_PER_NODE"):
        return {}
    each = settings.get("SBATCH_MEM_PER_NODE")
    return {"SBATCH_MEM_PER_NODE": str(int(each) * gpus) if each else f"{int(asked.rstrip('G')) * gpus}G"}


def _time(wall: float) -> dict[str, str]:
    return {"SBATCH_TIMELIMIT": as_time(wall)}


# -- account and QOS ---------------------------------------------------------------------------------------------------
def account_and_qos(code_root: Path, environment: Mapping[str, str]) -> tuple[Association | None, Qos]:
    """The account and the QOS of the jobs, with their limits as far as they are known.

    The account is None if none is needed or Slurm does not answer. Raises UsageError if Slurm would refuse them.
    """
    name = environment.get("SBATCH_QOS") or script_option(code_root, "qos")
    return _account(name, environment.get("SBATCH_ACCOUNT")), _qos(name)


def _account(qos: str, account_name: str | None) -> Association | None:
    """The account that is named, else the only one, else the default one; None if none is needed or known."""
    accounts = slurm.associations()
    if accounts is None:
        return None
    names = ", ".join(one.account for one in accounts)
    wanted = account_name or (accounts[0].account if len(accounts) == 1 else slurm.default_account())
    if not wanted and not slurm.needs_account():
        return None
    if not accounts:
        raise UsageError(f"Slurm knows no account of {slurm.user()}; its owner (a PI) has to add you")
    if not wanted:
        raise UsageError(f"no account is named; write one of yours as {WHERE}: {names}")
    account = next((one for one in accounts if one.account == wanted.lower()), None)
    if account is None:
        raise UsageError(f"account {wanted} is none of yours, which are {names} ({WHERE})")
    if account.qos and qos not in account.qos:
        raise UsageError(f"account {account.account} may not use QOS {qos}, only {', '.join(account.qos)} (SBATCH_QOS)")
    return account


def _qos(name: str) -> Qos:
    """The QOS with its limits, from Slurm or from KNOWN_QOS. Raises UsageError if Slurm has no such QOS."""
    reported = slurm.all_qos()
    for one in KNOWN_QOS if reported is None else reported:
        if one.name == name:
            return one
    if reported is not None:
        raise UsageError(f"no QOS {name!r} here (SBATCH_QOS); there is: {', '.join(one.name for one in reported)}")
    return Qos(name)


def source_of_limits() -> str:
    """A remark in brackets where the limits are not from Slurm."""
    return f" ({KNOWN_FROM}: sacctmgr does not answer)" if slurm.all_qos() is None else ""


# -- wall time ---------------------------------------------------------------------------------------------------------
def _wall(
    request: Request, runs: list[Run], options: SubmitOptions, gpu: str, limiter: str, longest: float
) -> tuple[float, str]:
    """(seconds of a job's wall time, a line if they are not those of the script or the user).

    longest: the most that the QOS or account named `limiter` allows. Raises UsageError.
    """
    limit = f"{limiter} ends jobs after {as_hours(longest)}{source_of_limits()}"
    if options.hours == AUTO:
        estimates = [estimate_of(request, run, gpu) for run in runs]
        known = [estimate.wall(options.num_processes) for estimate in estimates if estimate]
        if len(known) < len(estimates):
            what = f"{runs[0].task.name} with {request.model_or_default} on {gpu or 'this GPU'}"
            raise UsageError(f"--hours auto: nothing here tells how long {what} takes; --hours H")
        wall = min(max(known), longest)
        return wall, f"{as_hours(wall)} of wall time asked" + (f": {limit}" if wall < max(known) else "")
    time_limit = os.environ.get("SBATCH_TIMELIMIT")
    if options.hours:
        wall, source = check_hours(options.hours) or 0.0, f"--hours {options.hours}"
    elif time_limit:
        seconds, source = read_time(time_limit), f"SBATCH_TIMELIMIT={time_limit}"
        if seconds is None:
            raise UsageError(f"{source} is no time for Slurm; it takes H:MM:SS, minutes or days-hours")
        wall = seconds or math.inf  # for Slurm 0 is no limit
    else:
        wall, source = read_time(script_option(request.code_root, "time")) or 0.0, ""
    if wall <= longest:
        return wall, ""
    if source:
        raise UsageError(f"{source} does not fit, such a job never starts: {limit}; --hours {longest / 3600:g}")
    return longest, f"{limit}; {as_hours(longest)} asked, not {as_hours(wall)}"
