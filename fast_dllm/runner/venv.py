"""The venv: built once, however many jobs on however many nodes want it at the same moment.

    <venv>.d/<key>.<number>/    one build. A venv cannot be moved, so each is built where it stays
        owner, heartbeat        who builds, and whether it lives: the folder is a claim (spec/locks.py)
        build.log               what the installers wrote
        complete                the key, written last; or `failed`, an exit status
    <venv>                      a link to the newest complete one, for users: source .venv/bin/activate

The key is a hash of the requirements and the build of PyTorch, for CPUs or with CUDA. A builder that died keeps its
folder, and another process makes the next one: the worst that a wrong guess about a slow builder can do is a second,
equally good venv.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Iterator, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner import venv_build
from fast_dllm.runner.environment import has_gpu
from fast_dllm.runner.venv_build import CPU, CUDA, BuildError, say
from fast_dllm.spec.locks import RELEASED, Claim, claims_of, latest_claim, number_of, owner_of, wait_for_end

KEY_DIGITS = 16
UNUSED_SECONDS = 14 * 86400.0
REPORT_SECONDS = 20.0
COMPLETE, FAILED = "complete", "failed"
LINES_OF_A_FAILURE = 15


def ensure(code_root: Path, project_root: Path, for_jobs: bool = False) -> Path | None:
    """The complete venv for the requirements in `code_root`, built where there is none; None after a failed build.

    code_root has pyproject.toml and constraints.txt: in a job it is the snapshot of the code. for_jobs: see
    `torch_build_wanted`. Progress and the reason of a failure go to stderr.
    """
    place = location(project_root)
    base = _base(code_root, project_root, for_jobs)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        build = _find_or_build(base, code_root, project_root)
    except OSError as error:
        say(f"cannot write to {base.parent}: {error.strerror or error}")
        return None
    if build is None:
        return None
    with contextlib.suppress(OSError):  # another member of the group may have built it
        os.utime(build / COMPLETE)
    try:
        _publish(place, build)
    except OSError as error:
        say(f"{place} does not lead to it: {error.strerror or error}")
    return build


def find_complete(code_root: Path, project_root: Path, for_jobs: bool = False) -> Path | None:
    """The complete venv for the requirements in `code_root`, if there is one; for_jobs: see `torch_build_wanted`."""
    return _complete_build(_base(code_root, project_root, for_jobs))


def builds_of(code_root: Path, project_root: Path, for_jobs: bool = False) -> list[Path]:
    """The builds for the requirements in `code_root`, complete or not, the latest first."""
    return claims_of(_base(code_root, project_root, for_jobs))


def environment_of(venv: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which the programs of `venv` come first."""
    environment = dict(environ)
    environment["VIRTUAL_ENV"] = str(venv)
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}"
    # ~/.local and a caller's PYTHONHOME would put other versions in front of the venv's
    environment["PYTHONNOUSERSITE"] = "1"
    environment.pop("PYTHONHOME", None)
    return environment


def python_for_checks(code_root: Path, project_root: Path) -> str | None:
    """A Python for the doctor's quick part: the venv's, else one from 3.8 on that has the module venv; else None."""
    for for_jobs in (False, True):
        build = find_complete(code_root, project_root, for_jobs)
        if build:
            return str(build / "bin" / "python")
    return venv_build.find_python(8, "venv")


# -- which one ---------------------------------------------------------------------------------------------------------
def location(project_root: Path) -> Path:
    """The path that users know, such as .venv: a link to the newest build."""
    named, home = os.environ.get("FAST_DLLM_VENV"), os.environ.get("HOME")
    if named:
        return Path(os.path.abspath(Path(project_root, named)))  # noqa: PTH100 (without following links)
    if home and Path(home, "scratch").is_dir():
        return Path(home, "scratch", "Fast-dLLM", "v2", ".venv")
    return Path(project_root, ".venv")


def requirements_key(code_root: Path, torch_build: str) -> str:
    """The name of builds with these requirements. A changed lint rule in pyproject.toml is no reason to build again."""
    wanted, lines = False, []
    for line in (Path(code_root) / "pyproject.toml").read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("["):
            wanted = line.startswith("[project")
        if wanted:
            lines.append(line)
    lines.append((Path(code_root) / "constraints.txt").read_text(encoding="utf-8"))
    return f"{hashlib.sha256(''.join(lines).encode()).hexdigest()[:KEY_DIGITS]}-{torch_build}"


def torch_build_wanted(for_jobs: bool = False) -> str:
    """CUDA where an NVIDIA GPU is seen or Slurm has given the job one, else CPU; FAST_DLLM_TORCH decides otherwise.

    for_jobs: what the jobs will want that this machine submits: CUDA on a cluster's login node. Raises UsageError.
    """
    wanted = os.environ.get("FAST_DLLM_TORCH", "")
    if wanted:
        if wanted not in (CPU, CUDA):
            raise UsageError(f"FAST_DLLM_TORCH must be {CPU} or {CUDA}, not {wanted!r}")
        return wanted
    allocated = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if allocated not in ("", "-1", "NoDevFiles") or has_gpu() or (for_jobs and shutil.which("sbatch")):
        return CUDA
    return CPU


def _base(code_root: Path, project_root: Path, for_jobs: bool) -> Path:
    """The builds are <base>.0001, <base>.0002, ..."""
    return Path(f"{location(project_root)}.d") / requirements_key(code_root, torch_build_wanted(for_jobs))


def _complete_build(base: Path) -> Path | None:
    return next((build for build in reversed(claims_of(base)) if _is_complete(build)), None)


def _is_complete(build: Path) -> bool:
    """Whether it was completed and still has its interpreter, which a purge of scratch or a removed module can take."""
    try:
        key = (build / COMPLETE).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return False
    return key == build.name.rpartition(".")[0] and os.access(build / "bin" / "python", os.X_OK)


# -- building ----------------------------------------------------------------------------------------------------------
def _find_or_build(base: Path, code_root: Path, project_root: Path) -> Path | None:
    """Raises OSError where the folder of the builds cannot be written to."""
    while True:
        last = latest_claim(base)
        if not _complete_build(base) and last and not (last / RELEASED).exists():
            say(f"waiting for {last}, which is being built by {owner_of(base)}")
            wait_for_end(last, wait=True, report=_Report(last, "waiting"))
        build = _complete_build(base)
        if build:
            return build
        claim = Claim.after(base, last)
        if claim is None:  # another process was faster
            continue
        try:
            succeeded = _build(claim.path, base.name, code_root, project_root)
        finally:
            claim.release()
        if succeeded:
            _tidy(claim.path)
        elif not _complete_build(base):
            say(f"the build failed; its log is {claim.path}/build.log")
            return None


def _build(folder: Path, key: str, code_root: Path, project_root: Path) -> bool:
    builder = venv_build.Builder(folder, key.rpartition("-")[2], code_root, project_root, _Report(folder, "building"))
    try:
        builder.build()
    except BuildError as error:
        lines = builder.log.read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
        print(*lines, *([str(error)] if str(error) else []), sep="\n", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            (folder / FAILED).write_text("1\n")
        return False
    new = folder / f"{COMPLETE}.new"
    new.write_text(f"{key}\n")
    new.replace(folder / COMPLETE)
    return True


class _Report:
    """Says every REPORT_SECONDS how far a build is; called with the seconds that have passed."""

    def __init__(self, build: Path, what: str) -> None:
        self.build, self.what, self.next = build, what, REPORT_SECONDS

    def __call__(self, seconds: float) -> None:
        if seconds < self.next:
            return
        self.next = seconds + REPORT_SECONDS
        try:
            lines = (self.build / "build.log").read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        last = next((line for line in reversed(lines) if line.strip()), "")
        say(f"{self.what}, {seconds:.0f} s: {last[:100]}")


# -- removing old builds -----------------------------------------------------------------------------------------------
def _tidy(build: Path) -> None:
    """Remove failed and broken attempts before this build, and builds that nothing has used for two weeks."""
    for build_in_folder in _all_builds(build.parent):
        same_key = build_in_folder.name.rpartition(".")[0] == build.name.rpartition(".")[0]
        replaced = same_key and number_of(build_in_folder) < number_of(build) and not _is_complete(build_in_folder)
        if build_in_folder != build and (replaced or _seconds_unused(build_in_folder) > UNUSED_SECONDS):
            _remove(build_in_folder)


def _all_builds(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if re.fullmatch(rf"[0-9a-f]{{{KEY_DIGITS}}}(-[a-z]+)?\.[0-9]{{4,}}", path.name) and path.is_dir():
            yield path


def _seconds_unused(build: Path) -> float:
    """Seconds since a complete build was last used, or since an incomplete one last changed its heartbeat."""
    for mark in (COMPLETE, "heartbeat", "owner"):
        with contextlib.suppress(OSError):
            return time.time() - (build / mark).stat().st_mtime
    return 0.0


def _remove(build: Path) -> None:
    """Rename the build, then delete it: a builder that was wrongly taken for dead must not complete half a folder."""
    away = build.with_name(f".removed.{build.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(OSError):
        build.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def _publish(place: Path, build: Path) -> None:
    """Make the path that users know a link to the build."""
    if place.is_symlink() and os.readlink(place) == str(build):
        return
    if place.is_dir() and not place.is_symlink():
        with contextlib.suppress(OSError):
            place.rmdir()  # an empty folder
    if os.path.lexists(place) and not place.is_symlink():
        say(f"{place} was not made by these scripts and is left alone; they use {build}")
        return
    new = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.new")
    new.symlink_to(build)
    new.replace(place)
