"""The snapshot: named by its content, made whole or not at all, and looked at again before it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from script_project import Project

from fast_dllm.runner import snapshot

ENSURE = """
import sys
from pathlib import Path
from fast_dllm.runner import snapshot
print(snapshot.ensure(Path(sys.argv[1]), "00_baseline", "7B"))
"""


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "lab's project")


def command(project):
    return [sys.executable, "-c", ENSURE, str(project.root)]


def ask(project, model="7B", make=snapshot.ensure):
    return project.root / ".snapshots" / make(project.root, "00_baseline", model)


def git(project, *words) -> str:
    command = ["git", "-C", project.root, "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_snapshot_holds_what_a_job_reads_and_nothing_else(project):
    (project.root / "sbatch" / "cluster.env").write_text("SBATCH_ACCOUNT=secret\n")
    (project.root / "fast_dllm" / "__pycache__").mkdir(exist_ok=True)
    (project.root / "fast_dllm" / "__pycache__" / "errors.cpython-38.pyc").write_text("")
    (project.root / "experiments" / "replays.json").write_text("{}")
    folder = ask(project)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"eval.py", "pyproject.toml", "constraints.txt", "sbatch/_job.sh", "fast_dllm/runner/__main__.py"}
    expected |= {"tasks/tasks.json", "experiments/00_baseline/generation_functions.py", "experiments/replays.json"}
    assert expected | {"snapshot.json"} <= files
    other = [name for name in files if name.startswith(("models", "experiments/01", "results")) or "pycache" in name]
    assert other == []
    assert "sbatch/cluster.env" not in files
    assert (ask(project, "tiny") / "models" / "tiny" / "config.json").is_file()
    assert [path.name for path in (project.root / ".snapshots").iterdir() if path.name.startswith(".")] == []


def test_to_ask_for_the_name_writes_nothing(project):
    before = project.written()
    folder = ask(project, "7B", snapshot.name_of)
    assert project.written() == before
    assert ask(project) == folder


def test_equal_code_shares_a_snapshot_and_changed_code_has_another(project):
    first = ask(project)
    assert ask(project) == first
    code = project.root / "experiments" / "00_baseline" / "generation_functions.py"
    code.write_text("def generate(): return 'edited'\n")
    second = ask(project)
    assert second != first
    assert "edited" in (second / "experiments/00_baseline/generation_functions.py").read_text()
    assert "edited" not in (first / "experiments/00_baseline/generation_functions.py").read_text()


@pytest.mark.parametrize("damage", ["changed", "purged", "added", "state", "all"])
def test_a_snapshot_that_was_damaged_is_made_anew_when_it_is_used(project, damage):
    folder = ask(project)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    policy = folder / "experiments/00_baseline/generation_functions.py"
    if damage == "changed":
        policy.write_text("def generate(): return 'edited'\n")
    elif damage == "purged":
        policy.unlink()
    elif damage == "added":
        (folder / "fast_dllm" / "runner" / "json.py").write_text("")
    elif damage == "state":
        (folder / "snapshot.json").write_text("{")
    else:
        for path in files:
            path.unlink()
    assert ask(project) == folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_its_files_are_as_young_as_its_last_use(project):
    old = time.time() - 90 * 86400
    for path in (project.root / "fast_dllm").rglob("*.py"):
        os.utime(path, (old, old))
    folder = ask(project)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "snapshot.json"]
    assert min(path.stat().st_mtime for path in files) > time.time() - 3600
    for path in files:
        os.utime(path, (old, old))
    assert ask(project) == folder
    assert min(path.stat().st_mtime for path in files) > time.time() - 3600
    assert os.access(folder / "sbatch" / "_job.sh", os.X_OK) == os.access(project.root / "sbatch" / "_job.sh", os.X_OK)


def test_whatever_a_branch_is_called_the_record_is_read_again(project):
    (project.root / ".gitignore").write_text("results/\nlogs/\n.snapshots/\n")
    git(project, "init", "-q", "-b", 'fix-"x"')
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    folder = ask(project)
    state = json.loads((folder / "snapshot.json").read_text())
    assert (state["git_branch"], state["git_dirty"]) == ('fix-"x"', False)
    assert state["git_commit"] == git(project, "rev-parse", "HEAD")
    (project.root / "experiments" / "00_baseline" / "a file").write_text("changed")
    assert json.loads((ask(project) / "snapshot.json").read_text())["git_dirty"] is True
    git(project, "commit", "-qam", "y")
    assert ask(project) not in (folder, None)


def test_many_at_once_make_one_whole_snapshot(project):
    environment = os.environ | {"PYTHONPATH": str(project.root), "PYTHONDONTWRITEBYTECODE": "1"}
    processes = [
        subprocess.Popen(command(project), cwd=project.root, env=environment, stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1
    assert {process.returncode for process in processes} == {0}
    assert len(list((project.root / ".snapshots").iterdir())) == 1
    ask(project)


@pytest.fixture
def here(project, monkeypatch):
    """The module in this process, where every file that is copied is edited at once as often as this list says."""
    edits, original = [], snapshot.shutil.copymode

    def edit(source, target):
        original(source, target)
        if edits and source.name == "eval.py":
            target.write_text(edits.pop())

    monkeypatch.setattr(snapshot.shutil, "copymode", edit)
    monkeypatch.setattr(snapshot.time, "sleep", lambda seconds: None)
    return edits


def test_a_file_that_changes_while_it_is_copied_is_noticed_and_copied_again(project, here):
    here.append("another text")
    name = snapshot.ensure(project.root, "00_baseline", "7B")
    assert (project.root / ".snapshots" / name / "eval.py").read_text() == (project.root / "eval.py").read_text()


def test_where_files_change_all_the_time_nothing_is_left_and_a_line_says_so(project, here):
    here.extend(["another text"] * snapshot.TRIES)
    with pytest.raises(snapshot.SnapshotError, match=r"a file changed while the code was copied: .*/eval\.py"):
        snapshot.ensure(project.root, "00_baseline", "7B")
    assert list((project.root / ".snapshots").iterdir()) == []
    (project.root / "eval.py").unlink()
    with pytest.raises(snapshot.SnapshotError, match=r"a file is missing, .*eval\.py"):
        snapshot.name_of(project.root, "00_baseline", "7B")
