"""What a public repository carries: parsed, and held to what is here."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from golden_models import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps() -> list[dict]:
    return [step for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values() for step in job["steps"]]


def test_the_workflow_calls_the_projects_own_tests_on_pythons_that_it_supports():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for step in steps() if "run" in step]
    for command in commands:
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)
        for script in re.findall(r"bash (\S+\.sh)", command):
            assert (ROOT / script).is_file(), script
    assert "bash tests/run.sh" in commands
    oldest = project()["requires-python"].removeprefix(">=")
    assert jobs["suite"]["strategy"]["matrix"]["python"][0] == oldest == "3.10"  # as text: YAML's number 3.10 is 3.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ruff check", "ruff format", "shellcheck"])
def test_the_pre_commit_hooks_run_on_a_file(name, tmp_path):
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # the environment's own programs: their versions cannot differ from lint's
    [hook] = [each for each in repository["hooks"] if each["name"] == name]
    program = hook["entry"].split()[0]
    if subprocess.run(["bash", "-c", f"command -v {program}"], capture_output=True).returncode:
        pytest.skip(f"no {program} on this machine")
    good, bad = ("x = 1\n", "import os\nx  =  unknown_name\n") if "ruff" in name else ("#!/bin/sh\ntrue\n", "echo $x\n")
    if name == "ruff format":
        bad = "x = (\n"  # it mends what is only ugly; what it cannot read it refuses
    for text, fine in ((good, True), (bad, False)):
        file = tmp_path / ("a.py" if "ruff" in name else "a.sh")
        file.write_text(text)
        done = subprocess.run(f"{hook['entry']} {file}", shell=True, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode == 0) == fine, done.stdout + done.stderr
