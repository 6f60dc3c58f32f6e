"""sbatch/prefetch.sh with a pretended hub: what is fetched, and what is said when it cannot be."""

import pytest
from script_project import Project

HUB = """
import os
def snapshot_download(name):
    problem = os.environ.get("HUB_PROBLEM")
    if problem:
        raise OSError(problem)
    return "/cache/" + name
"""
LM_EVAL = """
from huggingface_hub import snapshot_download
class TaskManager:
    def __init__(self, include_path):
        assert include_path.endswith("/tasks")
    def load(self, names):
        snapshot_download(names[0])
        return {"tasks": dict.fromkeys(names)}
"""


@pytest.fixture
def project(tmp_path):
    project = Project(tmp_path / "project")
    (project.root / "huggingface_hub.py").write_text(HUB)
    (project.root / "lm_eval").mkdir()
    (project.root / "lm_eval" / "__init__.py").write_text("")
    (project.root / "lm_eval" / "tasks.py").write_text(LM_EVAL)
    return project


def test_the_model_and_each_task_are_fetched(project):
    result = project.bash("sbatch/prefetch.sh", "--task", "gsm8k,mmlu")
    assert result.returncode == 0, result.stderr
    assert "/cache/Efficient-Large-Model/Fast_dLLM_v2_7B" in result.stderr
    assert result.stderr.count("data of 1 task(s) is here") == 2
    assert "GiB free" in result.stderr


def test_the_cache_that_the_clusters_settings_name_is_the_one(project):
    (project.root / "sbatch" / "cluster.env").write_text(f"HF_HOME={project.state}/elsewhere\n")
    result = project.bash("sbatch/prefetch.sh", "--model", "tiny")
    assert f"cache: {project.state}/elsewhere, " in result.stderr


def test_for_ifeval_the_sentence_data_comes_too(project):
    result = project.bash("sbatch/prefetch.sh", "--task", "ifeval,gsm8k", "--model", "tiny")
    assert result.returncode == 1
    assert "sentence data: hub not reachable" in result.stderr  # the pretended installer installs nothing
    assert result.stderr.count("data of 1 task(s) is here") == 2


@pytest.mark.parametrize(
    ("problem", "named"),
    [
        ("401 Client Error: Access to dataset Idavidrein/gpqa is restricted", "no access to the data set or model"),
        ("Max retries exceeded with url", "hub not reachable"),
        ("[Errno 122] Disk quota exceeded", "disk full or over quota"),
    ],
)
def test_what_could_not_be_fetched_is_named_with_the_reason_and_the_rest_goes_on(project, problem, named):
    result = project.bash(
        "sbatch/prefetch.sh", "--task", "gpqa_main_n_shot,gsm8k", "--model", "tiny", HUB_PROBLEM=problem
    )
    assert result.returncode == 1
    assert f"OSError: {problem}" in result.stderr
    assert f"task gpqa_main_n_shot: {named}" in result.stderr
    assert "Traceback" not in result.stderr
    assert "prefetch.sh: not fetched: task gsm8k" in result.stderr


def test_a_cache_that_is_too_small_is_said_before_the_download(project):
    df = project.state / "bin" / "df"
    df.write_text("#!/usr/bin/env bash\necho Filesystem\necho /dev/x 100 90 10485760 90% /\n")
    df.chmod(0o755)
    result = project.bash("sbatch/prefetch.sh")
    assert result.returncode == 2
    assert "20 GiB are needed" in result.stderr
    assert project.bash("sbatch/prefetch.sh", "--model", "tiny").returncode == 0  # which needs none


@pytest.mark.parametrize("words", [["--task", "x"], ["--model", "a b"]])
def test_a_wrong_word_is_one_line(project, words):
    result = project.bash("sbatch/prefetch.sh", *words)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
