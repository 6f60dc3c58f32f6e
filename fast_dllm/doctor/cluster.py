"""Checks of the cluster: account, QOS, the jobs' GPU, and Slurm's answer to a job."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator

from fast_dllm.doctor.situation import Finding, Situation
from fast_dllm.errors import UsageError
from fast_dllm.runner.gpus import why_not
from fast_dllm.runner.resources import account_and_qos, script_option, source_of_limits
from fast_dllm.runner.roofline import GPUS, sizes_of
from fast_dllm.runner.slurm import as_hours, gpu_type, user_jobs

SLURM_SECONDS = 30


def gpu_of_jobs(situation: Situation) -> str:
    """What jobs ask Slurm for: SBATCH_GRES, else the job script's own."""
    return situation.environment.get("SBATCH_GRES") or script_option(situation.root, "gres")


def ask(command: list[str], situation: Situation, seconds: int) -> tuple[int, str]:
    """Exit status and whole output of a command in the job's environment; 124 when it does not end in time."""
    # inside a job, sbatch would take that job's SLURM_ variables for settings
    environment = {
        name: value
        for name, value in situation.environment.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    try:
        done = subprocess.run(
            command, cwd=situation.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {seconds} s"
    return done.returncode, done.stdout


def why_no_answer(situation: Situation) -> str:
    """Why Slurm's controller does not answer in the job's environment; "" if it answers or there is no squeue."""
    if not shutil.which("squeue"):
        return ""
    status, output = ask(["squeue", "--noheader", "--name=none"], situation, SLURM_SECONDS)
    return "" if status == 0 else " ".join(output.split()) or "squeue failed and said nothing"


def check_slurm(situation: Situation) -> Iterator[Finding]:
    """Slurm's answer to the job that run.sh would submit, with cluster.env's account, QOS and GPU; none is queued."""
    if not shutil.which("sbatch"):
        yield Finding("ok", "Slurm: none here; sbatch/local.sh evaluates on this machine")
        return
    if fault := why_no_answer(situation):
        yield Finding("fail", f"Slurm does not answer: {fault}; sbatch/local.sh evaluates on this machine")
        return
    status, output = ask(["sbatch", "--test-only", "sbatch/_job.sh"], situation, SLURM_SECONDS)
    answer = " ".join(output.replace("sbatch: ", "").split())
    if status == 0:
        yield Finding("ok", f"Slurm: {answer or 'the job would be accepted'}")
        return
    set_up = "; ".join(f"{name}={value}" for name, value in situation.environment.items() if name.startswith("SBATCH_"))
    yield Finding(
        "fail", f"Slurm: {answer} (with {set_up or 'no SBATCH_ settings'}); sbatch/cluster.env sets account and QOS"
    )


def check_account(situation: Situation) -> Iterator[Finding]:
    """The account and the QOS that run.sh would name, with the QOS's limits; the GPU that its jobs would have."""
    if not shutil.which("sbatch") or why_no_answer(situation):  # check_slurm says so
        return
    try:
        account, qos = account_and_qos(situation.root, situation.environment)
    except UsageError as error:
        yield Finding("fail", f"account: {error}")
    else:
        name = account.account if account else situation.environment.get("SBATCH_ACCOUNT") or "not named"
        jobs_of_qos = [job for job in user_jobs() or [] if job.qos == qos.name]
        limits = [f"jobs of at most {as_hours(qos.wall)}"] if qos.wall < math.inf else []
        if qos.submitted is not None:
            limits.append(f"{qos.submitted} of a user queued and running, you have {len(jobs_of_qos)}")
        text = f"account {name}, QOS {qos.name}: {', '.join(limits) or 'no limits known'}{source_of_limits()}"
        unknown = account is None and not situation.environment.get("SBATCH_ACCOUNT")
        hint = "; write yours as SBATCH_ACCOUNT into sbatch/cluster.env (pace-quota shows it)"
        yield Finding("warn", text + hint) if unknown else Finding("ok", text)
    gpu = gpu_type(gpu_of_jobs(situation))
    cards = [card for card in GPUS if card.slurm == gpu]
    if not cards:
        yield Finding("warn", f"GPU of jobs: {gpu_of_jobs(situation)} is of no type that is known; --gpu names one")
    elif reason := why_not(situation.model, situation.root, gpu):
        yield Finding("fail", f"GPU of jobs: {gpu}: {reason}; bash sbatch/run.sh --gpu names another")
    else:
        sizes = sizes_of(situation.model, situation.root)
        weights = f"{sizes.total_bytes / 1e9:.1f} GB of weights" if sizes else "weights of a size that is not known"
        yield Finding(
            "ok", f"GPU of jobs: {gpu}, dtype=auto gives {cards[0].dtype}, {cards[0].memory} GB for {weights}"
        )
