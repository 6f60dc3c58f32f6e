"""What a Slurm cluster adds to what can go wrong: the queue's answer, quotas, and files that a purge takes away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fast_dllm.checks import Finding, Situation

SLURM_SECONDS = 30
PURGE_DAYS = 60  # PACE deletes files on scratch that nobody touched for so long (docs/reference/pace-cluster.md)
WARN_DAYS = 45
FULL_PERCENT = 90


def gpu_of_jobs(situation: Situation) -> str:
    """What jobs ask Slurm for: SBATCH_GRES, else the job script's own."""
    script = (situation.root / "sbatch" / "_job.sh").read_text()
    return situation.environment.get("SBATCH_GRES") or re.findall(r"^#SBATCH --gres=(\S+)$", script, re.MULTILINE)[0]


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
            touch = f"find -L {path.resolve()} -type f -exec touch -a -c {{}} +"
            yield Finding("warn", f"{told}; {touch}, or keep what matters elsewhere")
    if not places:
        yield Finding("ok", "purge: neither model, data, venv nor results are on a scratch disk")


def days_untouched(folder: Path) -> int:
    """Of the file in `folder` that nobody has read or written for the longest time; 0 without files."""
    oldest = now = time.time()
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            if file.is_file():
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
