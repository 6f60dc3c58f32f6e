"""What a Slurm cluster adds to what can go wrong: the queue's answer, quotas, and files that a purge takes away."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fast_dllm.doctor.checks import GIB, Finding, Situation
from fast_dllm.errors import UsageError
from fast_dllm.runner.gpus import why_not
from fast_dllm.runner.resources import account_and_qos, script_option, source_of_limits
from fast_dllm.runner.roofline import GPUS, sizes_of
from fast_dllm.runner.slurm import as_hours, gpu_type, own_jobs

SLURM_SECONDS = 30
PURGE_DAYS = 60  # PACE deletes files on scratch that nobody touched for so long (docs/reference/pace-cluster.md)
WARN_DAYS = 45
FULL_PERCENT = 90


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


def check_quota(situation: Situation) -> Iterator[Finding]:
    """The percentages that pace-quota shows; elsewhere what `quota -q` says, which is nothing while all is well."""
    if shutil.which("pace-quota"):
        status, output = ask(["pace-quota"], situation, SLURM_SECONDS)
        shares = {
            line.strip(): max(map(float, re.findall(r"([\d.]+) ?%", line)), default=0) for line in output.splitlines()
        }
        full = [" ".join(line.split()) for line, share in shares.items() if share >= FULL_PERCENT]
        if status:
            yield Finding("warn", f"quota: pace-quota failed: {' '.join(output.split())[:200]}")
        elif full:
            yield from (
                Finding("warn", f"quota: {line}; make room (docs/reference/pace-cluster.md, Storage)") for line in full
            )
        else:
            yield Finding("ok", f"quota: pace-quota shows nothing above {FULL_PERCENT}%")
    elif shutil.which("quota"):
        status, output = ask(["quota", "-q"], situation, SLURM_SECONDS)
        over = " ".join(output.split())
        yield Finding("warn", f"quota: {over}; make room") if over else Finding("ok", "quota: nothing over its limit")
    else:
        for place in (Path.home(), Path.home() / "scratch"):
            if place.is_dir():
                disk = shutil.disk_usage(place)  # of its own quota, where the file system tells that
                share, told = 100 * disk.used / disk.total, f"{disk.free / GIB:.1f} GiB free, as far as its disk tells"
                level, hint = ("warn", "; make room") if share >= FULL_PERCENT else ("ok", "")
                yield Finding(level, f"quota: {place}: {told}{hint}")


def check_slurm(situation: Situation) -> Iterator[Finding]:
    """Slurm's answer to the job that run.sh would submit, with cluster.env's account, QOS and GPU; none is queued."""
    if not shutil.which("sbatch"):
        yield Finding("ok", "Slurm: none here; sbatch/local.sh evaluates on this machine")
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
    if not shutil.which("sbatch"):
        return
    try:
        account, qos = account_and_qos(situation.root, situation.environment)
    except UsageError as error:
        yield Finding("fail", f"account: {error}")
    else:
        name = account.account if account else situation.environment.get("SBATCH_ACCOUNT") or "not named"
        own = [job for job in own_jobs() or [] if job.qos == qos.name]
        limits = [f"jobs of at most {as_hours(qos.wall)}"] if qos.wall < math.inf else []
        if qos.submitted is not None:
            limits.append(f"{qos.submitted} of a user queued and running, you have {len(own)}")
        told = f"account {name}, QOS {qos.name}: {', '.join(limits) or 'no limits known'}{source_of_limits()}"
        unknown = account is None and not situation.environment.get("SBATCH_ACCOUNT")
        hint = "; write yours as SBATCH_ACCOUNT into sbatch/cluster.env (pace-quota shows it)"
        yield Finding("warn", told + hint) if unknown else Finding("ok", told)
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


def places_to_keep(situation: Situation) -> dict[str, Path]:
    """What cannot be had again without a download or a build."""
    model = situation.model_folder
    if situation.is_hub_model and model.parent.name == "snapshots":
        model = model.parent.parent  # with the name of the revision, and the files that the snapshot's links lead to
    places = {} if situation.model == "tiny" else {"model": model}
    places["data"] = situation.data_cache
    places["venv"] = situation.builds_folder  # with the uv and the Python that it may have been built with
    return {name: path for name, path in places.items() if path.is_dir()}


def keep(situation: Situation) -> Iterator[Finding]:
    """Touch what a purge of scratch would take, so that its days begin anew; what links lead to, too."""
    for name, path in places_to_keep(situation).items():
        touched, refused = 0, 0
        for file in files_in(path):
            try:
                os.utime(file)
                touched += 1
            except PermissionError:
                refused += 1
        yield Finding("ok", f"{name}: {touched} files in {path} touched; {PURGE_DAYS} days from now on")
        if refused:
            yield Finding("warn", f"{name}: {refused} files in {path} are somebody else's, who has to touch them")


def files_in(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (file for file in (Path(place, name) for name in names) if file.is_file())


def on_scratch(path: Path) -> bool:
    return any("scratch" in part for part in path.resolve().parts)


def check_purge(situation: Situation) -> Iterator[Finding]:
    """The days since files on scratch were last touched: the model, the data, the venv and the results."""
    places = {"model": situation.model_folder, "data": situation.data_cache, "results": situation.root / "results"}
    if situation.venv:
        places["venv"] = situation.venv
        yield from findings_on_venv_files(situation.venv)
    places = {name: path for name, path in places.items() if path.exists() and on_scratch(path)}
    for name, path in places.items():
        days = days_untouched(path)
        told = f"{name}: {path.resolve()} on scratch, a file in it untouched for {days} of {PURGE_DAYS} days"
        if days < WARN_DAYS:
            yield Finding("ok", told)
        else:
            touch = "bash sbatch/prefetch.sh --keep"
            if name == "results":
                touch = f"find -L {path.resolve()} -type f -exec touch -a -c {{}} +"
            yield Finding("warn", f"{told}; {touch}, or keep what matters elsewhere")
    if not places:
        yield Finding("ok", "purge: neither model, data, venv nor results are on a scratch disk")


def days_untouched(folder: Path) -> int:
    """Of the file in `folder` that nobody has read or written for the longest time; 0 without files."""
    oldest = now = time.time()
    for file in files_in(folder):
        state = file.stat()  # of what a link leads to: the hub's cache keeps files in blobs/
        oldest = min(oldest, max(state.st_atime, state.st_mtime))
    return int((now - oldest) / 86400)


def findings_on_venv_files(venv: Path) -> Iterator[Finding]:
    """Files that packages installed and a purge took away: the venv looks whole, and an import fails hours later."""
    for packages in venv.glob("lib/python3.*/site-packages"):
        gone = 0
        for package in metadata.distributions(path=[str(packages)]):
            files = [file for file in package.files or () if file.suffix != ".pyc"]
            gone += sum(not Path(file.locate()).exists() for file in files)
        if gone:
            yield Finding(
                "fail", f"venv: {gone} files of its packages are gone; rm -r {venv}, then bash sbatch/venv.sh"
            )
