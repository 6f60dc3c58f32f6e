"""A new experiment is a copied folder with an edited policy: nothing outside it is touched, and everything takes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from golden_models import ROOT
from random_model import save_random_model

from fast_dllm.decoding import STEP_KINDS
from fast_dllm.runner import venv
from fast_dllm.spec.hashes import file_sha256

COPIED = ("sbatch", "fast_dllm", "tasks", "experiments")
FILES = ("eval.py", "generation_functions.py", "pyproject.toml", "constraints.txt")
EDITS = (  # a knob, and the line of the loop that reads it
    ('    refresh: str = "block"\n', '    refresh: str = "block"\n    tolerance: float = 0.25\n'),
    ("masked, options.threshold)", "masked, options.threshold - options.tolerance)"),
)
RUN = ["--model", "random", "--task", "toy_math", "--limit", "2", "--config", "k2_middle"]


def contents(root: Path) -> dict[str, str | None]:
    """Every file of the project's own, apart from what runs leave behind."""
    left = ("results", "logs", "artifacts", ".venv", ".locks")
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    named = {str(path.relative_to(root)): path for path in files}
    return {name: file_sha256(path) for name, path in named.items() if not name.startswith(left)}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("copied") / "project"
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    save_random_model(root / "random")
    return root


def venv_of_this_run() -> str:
    """Where this checkout's scripts keep their venv: the copy's requirements are the same, so it is not built again."""
    if venv.find_complete(ROOT, ROOT) is None:
        pytest.skip("the scripts' venv is not built yet: bash sbatch/venv.sh")
    return str(venv.location(ROOT))


def local(root: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["FAST_DLLM_VENV"] = venv_of_this_run()
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        ["bash", "sbatch/local.sh", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.slow
def test_a_copied_folder_with_a_knob_and_an_edited_line_runs(project):
    before = contents(project)
    subprocess.run(["cp", "-r", "experiments/00_baseline", "experiments/09_mine"], cwd=project, check=True)
    policy = project / "experiments" / "09_mine" / "generation_functions.py"
    text = policy.read_text()
    for old, new in EDITS:
        assert text.count(old) == 1
        text = text.replace(old, new)
    policy.write_text(text)

    words = ["--experiment", "09_mine", *RUN, "--model_args", "max_new_tokens=32"]
    done = local(project, *words, "--threshold", "0.8")
    assert done.returncode == 0, done.stdout + done.stderr
    done = local(project, *words[:-1], "max_new_tokens=32,tolerance=0.5", "--threshold", "0.8")
    assert done.returncode == 0, done.stdout + done.stderr

    folder = project / "results" / "09_mine" / "toy_math_limit_2"
    names = ["k2_middle+max_new_tokens=32+threshold=0.8", "k2_middle+max_new_tokens=32+threshold=0.8+tolerance=0.5"]
    assert sorted(path.name for path in folder.iterdir()) == names
    first, second = (json.loads((folder / name / "summary.json").read_text()) for name in names)
    assert [each["model_args"]["tolerance"] for each in (first, second)] == [0.25, 0.5]
    assert first["generation_code_sha256"] == file_sha256(policy)
    # a lower bar unmasks more a step: the edited line is what ran
    steps = [sum(each["throughput"]["forwards"].get(kind, 0) for kind in STEP_KINDS) for each in (first, second)]
    assert steps[1] < steps[0]

    refused = local(project, *words[:-1], "max_new_tokens=32,tolerence=0.5")
    assert refused.returncode == 2
    assert "tolerence" in refused.stderr
    assert "tolerance" in refused.stderr.replace("tolerence", "")
    after = contents(project)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert all(name.startswith("experiments/09_mine/") for name in changed), sorted(changed)
