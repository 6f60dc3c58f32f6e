"""Checks of the cluster: account, QOS, the jobs' GPU, and Slurm's answer to a job."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

from fast_dllm.doctor.situation import Finding, Situation
from fast_dllm.errors import UsageError
from fast_dllm.runner.gpus import why_not
from fast_dllm.runner.resources import account_and_qos, script_option, source_of_limits
from fast_dllm.runner.roofline import GPUS, sizes_of
from fast_dllm.runner.slurm import as_hours, ask, gpu_type, user_jobs, why_no_answer


def gpu_of_jobs(situation: Situation) -> str:
    """What jobs ask Slurm for: SBATCH_GRES, else the job script's own."""
    return situation.environment.get("SBATCH_GRES") or script_option(situation.root, "gres")


def check_cluster(situation: Situation) -> Iterator[Finding]:
    """The account, the GPU of the jobs, and Slurm's answer to a job; one line where Slurm is absent or silent."""
    if not shutil.which("sbatch"):
        yield Finding("ok", "Slurm: none here; sbatch/local.sh evaluates on this machine")
    elif fault := why_no_answer():
        yield Finding("fail", f"Slurm does not answer: {fault}; sbatch/local.sh evaluates on this machine")
    else:
        yield account_finding(situation)
        yield gpu_finding(situation)
        yield submission_finding(situation)


def submission_finding(situation: Situation) -> Finding:
    """Slurm's answer to the job that run.sh would submit, with cluster.env's account, QOS and GPU; none is queued."""
    worked, reply = ask("sbatch", "--test-only", str(situation.root / "sbatch" / "_job.sh"), settings={})
    reply = reply.replace("sbatch: ", "")
    if worked:
        return Finding("ok", f"Slurm: {reply or 'the job would be accepted'}")
    settings = [f"{name}={value}" for name, value in situation.environment.items() if name.startswith("SBATCH_")]
    used = "; ".join(settings) or "no SBATCH_ settings"
    return Finding("fail", f"Slurm: {reply} (with {used}); sbatch/cluster.env sets account and QOS")


def account_finding(situation: Situation) -> Finding:
    """The account and the QOS that run.sh would name, with the QOS's limits."""
    try:
        account, qos = account_and_qos(situation.root, situation.environment)
    except UsageError as error:
        return Finding("fail", f"account: {error}")
    name = account.account if account else situation.environment.get("SBATCH_ACCOUNT") or "not named"
    limits = [f"jobs of at most {as_hours(qos.wall)}"] if qos.wall < math.inf else []
    if qos.submitted is not None:
        num_jobs = sum(job.qos == qos.name for job in user_jobs() or ())
        limits.append(f"{qos.submitted} of a user queued and running, you have {num_jobs}")
    text = f"account {name}, QOS {qos.name}: {', '.join(limits) or 'no limits known'}{source_of_limits()}"
    if account is None and not situation.environment.get("SBATCH_ACCOUNT"):
        return Finding("warn", f"{text}; write yours as SBATCH_ACCOUNT into sbatch/cluster.env (pace-quota shows it)")
    return Finding("ok", text)


def gpu_finding(situation: Situation) -> Finding:
    """Whether the model can run on the GPU type that the jobs ask for."""
    gpu = gpu_type(gpu_of_jobs(situation))
    cards = [card for card in GPUS if card.slurm == gpu]
    if not cards:
        return Finding("warn", f"GPU of jobs: {gpu_of_jobs(situation)} is of no type that is known; --gpu names one")
    if reason := why_not(situation.model, situation.root, gpu):
        return Finding("fail", f"GPU of jobs: {gpu}: {reason}; bash sbatch/run.sh --gpu names another")
    sizes = sizes_of(situation.model, situation.root)
    weights = f"{sizes.total_bytes / 1e9:.1f} GB of weights" if sizes else "weights of a size that is not known"
    return Finding("ok", f"GPU of jobs: {gpu}, dtype=auto gives {cards[0].dtype}, {cards[0].memory} GB for {weights}")
