"""Checks of the disks: free space, quota, the purge of scratch; and touching files that should survive it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from fast_dllm.doctor.situation import GIB, Finding, Situation
from fast_dllm.runner.slurm import ask

LOW_SPACE = 1 * GIB
PURGE_DAYS = 60  # PACE deletes files on scratch that nobody touched for so long (docs/reference/pace-cluster.md)
WARN_DAYS = 45
FULL_PERCENT = 90


def existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_disk(situation: Situation) -> Iterator[Finding]:
    """That there is room, by writing: a quota does not show in the free space."""
    places = {
        "results": situation.root / "results",
        "logs": situation.root / "logs",
        "data cache": situation.data_cache,
        "venv": situation.builds_folder,
    }
    for name, path in places.items():
        if path.is_symlink() and not path.exists():
            target = os.readlink(path)
            yield Finding("fail", f"{name}: {path} leads to {target}, which is gone; mkdir -p {target}")
            continue
        folder = existing(path)
        free = shutil.disk_usage(folder).free
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            unused = name == "data cache" and not any(situation.data_sets.values())  # as far as is known
            fault = f"cannot write to {folder}: {error.strerror}; make room there or change the place"
            yield Finding("warn" if unused else "fail", f"{name}: {fault}")
            continue
        level, hint = ("warn", "; make room") if free < LOW_SPACE else ("ok", "")
        yield Finding(level, f"{name}: {free / GIB:.1f} GiB free in {folder}{hint}")


def check_quota(situation: Situation) -> Iterator[Finding]:
    """The percentages that pace-quota shows; elsewhere what `quota -q` says, which is nothing while all is well."""
    if shutil.which("pace-quota"):
        worked, output = ask("pace-quota")
        shares = {
            line.strip(): max(map(float, re.findall(r"([\d.]+) ?%", line)), default=0) for line in output.splitlines()
        }
        full = [" ".join(line.split()) for line, share in shares.items() if share >= FULL_PERCENT]
        if not worked:
            yield Finding("warn", f"quota: pace-quota failed: {' '.join(output.split())[:200]}")
        elif full:
            yield from (
                Finding("warn", f"quota: {line}; make room (docs/reference/pace-cluster.md, Storage)") for line in full
            )
        else:
            yield Finding("ok", f"quota: pace-quota shows nothing above {FULL_PERCENT}%")
    elif shutil.which("quota"):
        over = " ".join(ask("quota", "-q")[1].split())
        yield Finding("warn", f"quota: {over}; make room") if over else Finding("ok", "quota: nothing over its limit")
    else:
        for place in (Path.home(), Path.home() / "scratch"):
            if place.is_dir():
                disk = shutil.disk_usage(place)  # of its own quota, where the file system tells that
                share, text = 100 * disk.used / disk.total, f"{disk.free / GIB:.1f} GiB free, as far as its disk tells"
                level, hint = ("warn", "; make room") if share >= FULL_PERCENT else ("ok", "")
                yield Finding(level, f"quota: {place}: {text}{hint}")


def places_to_keep(situation: Situation) -> dict[str, Path]:
    """The folders that a purge would make a user download or build again, by name."""
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
        text = f"{name}: {path.resolve()} on scratch, a file in it untouched for {days} of {PURGE_DAYS} days"
        if days < WARN_DAYS:
            yield Finding("ok", text)
        else:
            touch = "bash sbatch/prefetch.sh --keep"
            if name == "results":
                touch = f"find -L {path.resolve()} -type f -exec touch -a -c {{}} +"
            yield Finding("warn", f"{text}; {touch}, or keep what matters elsewhere")
    if not places:
        yield Finding("ok", "purge: neither model, data, venv nor results are on a scratch disk")


def days_untouched(folder: Path) -> int:
    """The largest number of days since a file in `folder` was last read or written; 0 without files."""
    oldest = now = time.time()
    for file in files_in(folder):
        state = file.stat()  # of what a link leads to: the hub's cache keeps files in blobs/
        oldest = min(oldest, max(state.st_atime, state.st_mtime))
    return int((now - oldest) / 86400)


def findings_on_venv_files(venv: Path) -> Iterator[Finding]:
    """Files that packages installed and a purge took away: the venv looks whole, and an import fails hours later."""
    for packages in venv.glob("lib/python3.*/site-packages"):
        num_missing = 0
        for package in metadata.distributions(path=[str(packages)]):
            files = [file for file in package.files or () if file.suffix != ".pyc"]
            num_missing += sum(not Path(file.locate()).exists() for file in files)
        if num_missing:
            yield Finding(
                "fail", f"venv: {num_missing} files of its packages are gone; rm -r {venv}, then bash sbatch/venv.sh"
            )
