"""What a public repository carries: parsed, and held to what is here."""

from __future__ import annotations

import re
import subprocess
import sys

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
