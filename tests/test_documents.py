"""Every command in the documents runs, or is marked as needing the cluster; every link leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
from script_project import Project

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.runner import failures
from fast_dllm.runner.parsers import run_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs/experiments.md", "docs/operations.md", "docs/reference/pace-cluster.md", "docs/arguments.md")
BLOCK = re.compile(r"^```(\S[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind):
    found = []
    for document in DOCUMENTS:
        for number, match in enumerate(BLOCK.finditer((ROOT / document).read_text())):
            if match[1] == kind:
                marks = [pytest.mark.slow] if "--demo" in match[2] else []
                found.append(pytest.param(match[2], id=f"{document}-{number}", marks=marks))
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("commands", blocks("bash"))
def test_the_commands_run(commands, tmp_path):
    project = Project(tmp_path / "project")
    del project.environment["FAST_DLLM_VENV"]
    result = project.bash("-euo", "pipefail", "-c", commands)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("commands", blocks("bash cluster"))
def test_what_needs_the_cluster_is_at_least_bash_and_names_files_that_exist(commands):
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)
    for path in re.findall(r"\S+\.(?:sh|example)\b", commands):
        assert (ROOT / path).exists(), path


def test_blocks_of_both_kinds_were_found():
    assert len(blocks("bash")) >= 5
    assert len(blocks("bash cluster")) >= 5


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *DOCUMENTS])
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text()):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists(), target


def test_every_option_of_the_runner_is_documented():
    names = [name for action in run_parser()._actions for name in action.option_strings if name.startswith("--")]
    assert len(names) >= 20
    text = (ROOT / "docs/operations.md").read_text()
    assert [name for name in names if name not in text] == []


def test_every_model_argument_is_documented_with_its_default():
    table = (ROOT / "docs/arguments.md").read_text()
    defaults = ModelArguments.parse().as_dict()
    assert len(defaults) >= 15
    for name, default in defaults.items():
        row = next((line for line in table.splitlines() if re.match(rf"\| .*`{name}`", line)), "")
        assert row, name
        assert str(default) in row.split("|")[2] or default is None, row


def test_every_reason_for_a_failure_is_explained():
    texts = [text.split("(")[0].strip() for text in failures.TEXTS.values()]
    assert len(texts) >= 15
    table = (ROOT / "docs/operations.md").read_text()
    assert [text for text in texts if text not in table] == []
