"""Explains why a job is pending: which of Slurm's reasons do not end by waiting, and what to do about them."""

from __future__ import annotations

import re

from fast_dllm.runner.slurm import Job

AGAIN = "scancel {job}, then run.sh again"
MEND = "scancel {job}, change what it asks for (--gpu, SBATCH_ settings), then run.sh again"
# (pattern of Slurm's reason, what it means, what to do). The first match counts. The reasons are those of Slurm 22.05
# to 24.11 (slurm.schedmd.com/job_reason_codes.html). Reasons that end when another job ends (Grp limits except
# minutes, PerUser limits, RunMinutes) are not in this table.
_BLOCKED = (
    (r"(QOS|Assoc)MaxWallDurationPerJobLimit|QOSTimeLimit|AssociationTimeLimit",
     "its wall time is longer than its QOS or account allows", AGAIN),
    (r"PartitionTimeLimit", "its wall time is longer than its partition allows",
     "scancel {job}, then run.sh again with --hours within what scontrol show partition says"),
    (r"(QOS|Assoc)Grp\w*(?<!Run)Minutes(Limit)?|(QOS|Assoc)Max\w*MinutesPerJob(Limit)?|(QOS|Assoc)GrpWall(Limit)?"
     r"|QOSUsageThreshold", "the account's hours do not cover its whole wall time",
     "scancel {job}, then run.sh again with a shorter one (--hours), another account, or SBATCH_QOS=embers"),
    (r"(QOS|Assoc)(Max|Min)\w*Per(Job|Node)(Limit)?|QOSMin\w+|(QOS|Association)ResourceLimit|PartitionNodeLimit"
     r"|PartitionConfig", "it asks for more or less than one job may have", MEND),
    (r"InvalidAccount|AccountNotAllowed", "its account is not valid here", AGAIN),
    (r"InvalidQOS|QOSNotAllowed", "its QOS is not valid here", AGAIN),
    (r"BadConstraints", "no node has what it asks for", MEND),
    (r"DependencyNeverSatisfied", "the job that it waits for can no longer end as it needs", AGAIN),
    (r"ReservationDeleted", "its reservation is gone", AGAIN),
    (r"JobHeldUser", "held by its owner", "scontrol release {job}"),
    (r"JobHeldAdmin", "held by the administrators", "ask them"),
    (r"(?i)BlockMaxError|JobHoldMaxRequeue|JobLaunchFailure|launch.failed.requeued.held",
     "held after failed starts", AGAIN),
)  # fmt: skip
_WAITS = (
    (r"ReqNodeNotAvail, Reserved for maintenance|Reservation|.*[Mm]aintenance.*",
     "maintenance ahead: it starts afterwards, since its wall time reaches into it (a shorter one may start before)"),
)  # fmt: skip


def blocked(job: Job) -> tuple[str, str] | None:
    """(what the reason means, what to do) for a pending job that waiting does not start; None for any other job."""
    if job.state != "PENDING":
        return None
    for pattern, says, remedy in _BLOCKED:
        if re.fullmatch(pattern, job.reason):
            return says, remedy.format(job=job.job_id)
    return None


def waiting(job: Job) -> str:
    """Why a pending job waits: Slurm's reason, or an explanation if the reason alone does not help."""
    words = (says for pattern, says in _WAITS if re.fullmatch(pattern, job.reason))
    return next(words, job.reason)
