"""pyproject.toml names what the code imports, and nothing that no code uses."""

from __future__ import annotations

import ast
import functools
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from golden_models import ROOT
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVELOPMENT = ("tests", "docs")  # folders whose programs may also use what is declared for development
COMMANDS = {"ruff", "mypy"}  # used by tests/run.sh, imported by nobody


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(texts: list[str]) -> set[str]:
    """Distributions of these requirements; of one with extras also what these bring."""
    names = set()
    for text in texts:
        requirement = Requirement(text)
        names.add(normal(requirement.name))
        for extra in requirement.extras:
            brought = map(Requirement, metadata.requires(requirement.name))
            names |= {normal(one.name) for one in brought if one.marker and one.marker.evaluate({"extra": extra})}
    return names


@functools.cache
def imported_by(path: Path) -> set[str]:
    """Names of the packages that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(str(node.module))
    return {name.partition(".")[0] for name in modules}


packages_distributions = functools.cache(metadata.packages_distributions)


def imported(paths: list[Path]) -> dict[str, str]:
    """Distributions that these files import -> one of the files."""
    ours = {path.stem for path in [*ROOT.iterdir(), *(ROOT / "benchmarks").iterdir(), *ROOT.glob("tests/**/*.py")]}
    names = {}
    for path in paths:
        for module in imported_by(path) - sys.stdlib_module_names - ours:
            names.update({normal(name): str(path) for name in packages_distributions().get(module, [module])})
    return names


def sources(development: bool) -> list[Path]:
    folders = {"fast_dllm", "training", "benchmarks", "tasks", "experiments"}
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")] + [*ROOT.glob("*.py")]
    return [path for folder in DEVELOPMENT for path in (ROOT / folder).rglob("*.py")] if development else paths


def undeclared(paths: list[Path], texts: list[str]) -> dict[str, str]:
    allowed = declared(texts) | {"pip"}  # of the new venv's own Python (fast_dllm/runner/requirements.py)
    return {name: path for name, path in imported(paths).items() if name not in allowed}


def test_what_the_code_imports_is_declared():
    assert undeclared(sources(development=False), PROJECT["dependencies"]) == {}


def test_what_tests_and_documents_import_is_declared():
    everything = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert undeclared(sources(development=True), everything) == {}


def test_what_is_declared_is_used():
    used = set(imported(sources(development=False)))
    assert {normal(Requirement(text).name) for text in PROJECT["dependencies"]} - used - {"tomli"} == set()
    used |= set(imported(sources(development=True)))
    for path in (ROOT / "tests").rglob("*.py"):  # where one is imported only if it is there
        used |= set(map(normal, re.findall(r'importorskip\("(\w+)', path.read_text())))
    development = {normal(Requirement(text).name) for text in PROJECT["optional-dependencies"]["dev"]}
    assert development - used == COMMANDS


@pytest.mark.parametrize("name", ["numpy", "huggingface_hub", "tqdm"])
def test_an_import_without_a_declaration_is_found(name):
    others = [text for text in PROJECT["dependencies"] if Requirement(text).name != name]
    assert normal(name) in undeclared(sources(development=False), others)
