"""Asks Slurm for jobs, for the limits of a QOS and for a user's accounts. Limits and accounts are asked for once."""

from __future__ import annotations

import functools
import math
import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.spec.shard_names import array_numbers

SECONDS = 30  # how long to wait for a program's answer


def ask(*command: str, settings: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Run a program of Slurm or of the system; returns (whether it worked, its output).

    settings: SBATCH_ variables for sbatch. The SLURM_ variables of a surrounding job are removed then, because sbatch
    would take them for settings; and the output is that of both streams, on one line.
    """
    environment = None
    if settings is not None:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
        environment = {**variables, **settings}
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {SECONDS} s"
    except OSError as error:
        return False, str(error)
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    if done.returncode == 0 and settings is None:
        return True, out
    return done.returncode == 0, " ".join((err + out).split())


def lines_of(*command: str) -> list[list[str]] | None:
    """The lines of a program's output, split at each `|`; None if the program is missing or fails."""
    if not shutil.which(command[0]):
        return None
    worked, text = ask(*command)
    return [line.split("|") for line in text.splitlines() if line.strip()] if worked else None


def user() -> str:
    """The user's name as Slurm has it: by user id, not from the environment."""
    return pwd.getpwuid(os.getuid()).pw_name


# -- times -------------------------------------------------------------------------------------------------------------
def read_time(text: str) -> float | None:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Infinity where there is no limit; None for a text that is no time.
    """
    if text.upper() in ("", "UNLIMITED", "INFINITE", "NONE"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        return None
    days, *parts = match.groups()
    first, second, third = (int(part) if part else 0 for part in parts)
    if days is not None:
        return int(days) * 86400.0 + first * 3600 + second * 60 + third
    if parts[2] is not None:
        return first * 3600.0 + second * 60 + third
    return first * 60.0 + second


def as_time(seconds: float) -> str:
    """HH:MM:SS, as sbatch takes it."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


def as_hours(seconds: float) -> str:
    """A time for people: "8 h", "3 days", "50 min"."""
    if seconds >= 86400 and seconds % 86400 == 0:
        return f"{seconds / 86400:.0f} day{'s' * (seconds > 86400)}"
    return f"{seconds / 3600:.3g} h" if seconds >= 5400 or seconds % 3600 == 0 else f"{seconds / 60:.0f} min"


# -- limits and accounts -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Qos:
    """A quality of service. wall: the most seconds of a job. submitted: the most jobs of a user, queued and running.

    None: no limit.
    """

    name: str
    wall: float = math.inf
    submitted: int | None = None


# The limits on PACE, used if Slurm does not report them (docs/reference/pace-cluster.md).
KNOWN_QOS = (Qos("inferno", 3 * 86400, 500), Qos("embers", 8 * 3600, 50))
KNOWN_FROM = "users' notes of 2026, docs/reference/pace-cluster.md"


@dataclass(frozen=True)
class Association:
    """An account of this user, with its limits. qos: the QOS that it allows; empty if Slurm names none."""

    account: str
    qos: tuple[str, ...]
    wall: float = math.inf
    submitted: int | None = None


@functools.lru_cache(maxsize=None)
def all_qos() -> tuple[Qos, ...] | None:
    """Every QOS with its limits; None if Slurm does not answer."""
    lines = lines_of("sacctmgr", "-nP", "show", "qos", "format=Name,MaxWall,MaxSubmitPU")
    if lines is None:
        return None
    return tuple(Qos(line[0], _limit(line[1]), _count(line[2])) for line in lines if len(line) == 3)


@functools.lru_cache(maxsize=None)
def associations() -> tuple[Association, ...] | None:
    """The accounts of this user on this cluster, each once; None if Slurm does not answer."""
    command = ("sacctmgr", "-nP", "show", "assoc", f"user={user()}", "format=Cluster,Account,QOS,MaxWall,MaxSubmit")
    lines = lines_of(*command)
    if lines is None:
        return None
    if len({line[0] for line in lines}) > 1:  # clusters of one site can share an accounting database
        here = next((line[0] for line in lines_of("scontrol", "show", "config") or () if "ClusterName" in line[0]), "")
        lines = [line for line in lines if line[0] == here.partition("=")[2].strip()] or lines
    accounts: dict[str, Association] = {}
    for _, *line in lines:
        if len(line) == 4:  # an account with several partitions has several lines
            names = tuple(name for name in line[1].split(",") if name)
            accounts.setdefault(line[0], Association(line[0], names, _limit(line[2]), _count(line[3])))
    return tuple(accounts.values())


def default_account() -> str:
    """The account of this user's jobs that name none; "" if Slurm does not say."""
    lines = lines_of("sacctmgr", "-nP", "show", "user", user(), "format=DefaultAccount") or []
    return next((line[0].strip() for line in lines if line[0].strip()), "")


@functools.lru_cache(maxsize=None)
def needs_account() -> bool:
    """Whether Slurm refuses jobs without an account; True if it does not say."""
    for line in lines_of("scontrol", "show", "config") or ():
        name, _, value = line[0].partition("=")
        if name.strip() == "AccountingStorageEnforce":
            return not {word.strip() for word in value.split(",")} <= {"none", "nojobs", "nosteps", ""}
    return True


def _limit(text: str) -> float:
    """Seconds; infinity for no limit and for a text that is no time."""
    seconds = read_time(text)
    return math.inf if seconds is None else seconds


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


# -- jobs --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """A job in the queue. left, limit: seconds of its wall time. gpu: the type that it asked for, or "". folder: where
    it was submitted."""

    job_id: str
    state: str
    reason: str
    left: float = math.inf
    limit: float = math.inf
    gpu: str = ""
    account: str = ""
    qos: str = ""
    name: str = ""
    folder: str = ""

    @property
    def shards(self) -> set[int]:
        """The shards that it answers: its numbers in an array."""
        return array_numbers(self.job_id)

    @property
    def waits(self) -> bool:
        """Whether the job waits for another one to end."""
        return self.state == "PENDING" and self.reason.startswith("Dependency")


def _last_complaint(text: str) -> str:
    """The last of the errors that a Slurm program printed; those before it tell what the program tried first."""
    return re.split(r"\b\w+: (?:error|fatal): ", text)[-1].strip()


def _ask_queue(*filters: str) -> tuple[list[Job], str]:
    """(jobs, why squeue failed or "")."""
    worked, text = ask("squeue", "--noheader", *filters, "--format=%i|%T|%r|%L|%l|%b|%a|%q|%j|%Z")
    if not worked:
        return [], _last_complaint(text) or "it said nothing"
    jobs = []
    for fields in (line.split("|", 9) for line in text.splitlines()):
        if len(fields) == 10:
            job_id, state, reason, left, limit, gres, *rest = fields
            jobs.append(Job(job_id, state, reason, _limit(left), _limit(limit), gpu_type(gres), *rest))
    return jobs, ""


def gpu_type(gres: str) -> str:
    """The GPU type in gres/gpu:a100:1 or gpu:a100:1; "" if none is named."""
    match = re.search(r"gpu[:/]([A-Za-z_]\w*)", gres)
    return match[1].lower() if match else ""


def read_queue(root: Path, names: Iterable[str]) -> tuple[dict[str, list[Job]], str]:
    """(name -> jobs of this project, why the queue is not known or ""). Jobs of other folders are left out."""
    if not shutil.which("squeue"):
        return {}, ""
    jobs, fault = _ask_queue(f"--name={','.join(names)}")
    queued: dict[str, list[Job]] = {}
    for job in jobs:
        if job.folder == str(root):
            queued.setdefault(job.name, []).append(job)
    return queued, fault


def why_no_answer() -> str:
    """Why Slurm's controller does not answer; "" if it answers, or if there is no squeue to ask it."""
    return read_queue(Path(), ["none"])[1]


def user_jobs() -> list[Job] | None:
    """All jobs of this user, of all projects; each job of an array is one. None if squeue does not answer."""
    jobs, fault = _ask_queue("--array", f"--user={user()}")
    return None if fault else jobs


def read_ended(job_ids: list[str]) -> dict[str, str]:
    """Job id -> "state|exit code" from the accounting database, for jobs that ended without a record."""
    if not job_ids or not shutil.which("sacct"):
        return {}
    worked, text = ask("sacct", "-X", "-n", "-P", "-j", ",".join(job_ids), "-o", "JobID,State,ExitCode")
    lines = (line.split("|", 1) for line in text.splitlines() if "|" in line) if worked else ()
    return {job_id: state for job_id, state in lines if job_id}
