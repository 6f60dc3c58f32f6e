"""Checks of Python, its packages and the venv."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from fast_dllm.doctor.situation import Finding, Situation
from fast_dllm.runner import venv
from fast_dllm.spec.tasks import TASKS

if TYPE_CHECKING:
    from packaging.markers import Marker
    from packaging.requirements import Requirement


def check_python(situation: Situation) -> Iterator[Finding]:
    """This Python and its packages against pyproject.toml, lm_eval's extras included."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((situation.root / "pyproject.toml").read_text())["project"]
    version = ".".join(map(str, sys.version_info[:3]))
    if version in SpecifierSet(project["requires-python"]):
        yield Finding("ok", f"Python {version}: {sys.prefix}")
    else:
        yield Finding(
            "fail", f"Python {version}: {project['requires-python']} is needed; bash sbatch/venv.sh finds one"
        )
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate()]
    faults = list(package_faults(wanted))
    if faults:
        build = "bash sbatch/venv.sh, then activate what it prints"
        yield Finding("fail", f"packages: {'; '.join(faults)}; {build}")
    else:
        yield Finding("ok", f"packages: {', '.join(f'{one.name} {metadata.version(one.name)}' for one in wanted)}")


def package_faults(wanted: list[Requirement]) -> Iterator[str]:
    """What is absent or outside its range; a requirement's extras are followed into that package's requirements."""
    from packaging.requirements import Requirement

    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield f"{one.name} is not installed"
            continue
        if not one.specifier.contains(version, prereleases=True):
            yield f"{one.name} {version} is not {one.specifier}"
        for extra in one.extras:
            parts = [Requirement(text) for text in metadata.requires(one.name) or ()]
            yield from package_faults([part for part in parts if part.marker and belongs_to(extra, part.marker)])


def belongs_to(extra: str, marker: Marker) -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def check_sandbox(situation: Situation) -> Iterator[Finding]:
    """What the programs that a model writes may do on this machine; the node of a job may have another sandbox."""
    names = [task for task in situation.tasks if TASKS[task].code]
    if not names:
        return
    from fast_dllm.evaluate.sandbox import find_sandbox

    sandbox = find_sandbox()
    what = f"programs of the model ({', '.join(names)}): "
    if sandbox.missing:
        yield Finding("warn", f"{what}here {sandbox.name}: {sandbox.missing}")
    else:
        yield Finding("ok", f"{what}in a sandbox ({sandbox.name})")


def check_venv(situation: Situation) -> Iterator[Finding]:
    if situation.venv:
        yield Finding("ok", f"venv: {situation.venv}")
        return
    last = situation.builds[0] if situation.builds else None
    command = "bash sbatch/venv.sh"
    if venv.torch_build_wanted() != venv.torch_build_wanted(for_jobs=True):
        command = f"FAST_DLLM_TORCH={venv.CUDA} {command}"  # what a job on a GPU needs, not what this node would take
    if last and (last / venv.FAILED).exists():
        yield Finding("warn", f"venv: its last build failed, see {last}/build.log; {command} tries again")
    elif last and (last / venv.COMPLETE).exists():
        yield Finding("warn", f"venv: the interpreter of {last} is gone; {command} builds another")
    else:
        yield Finding("warn", f"venv: none for these requirements; the first job builds it, or now: {command}")
