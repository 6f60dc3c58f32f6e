"""sbatch/baseline.sh with the real eval.py and the embedded model on the five benchmarks' made-up questions."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from benchmark_hub import HUB, MMLU_SUBGROUPS, write_hub
from script_project import ROOT, Project

TASKS = ("mmlu", "gpqa_main_n_shot", "gsm8k", "minerva_math", "ifeval")
# In front of every Python of the run: the hub's answer to someone who has not been given access to GPQA.
GATED = """
import datasets
load = datasets.load_dataset
def refuse(path, *arguments, **options):
    if path == "Idavidrein/gpqa":
        raise datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{path}' is a gated dataset on the Hub. You must be authenticated to access it."
        )
    return load(path, *arguments, **options)
datasets.load_dataset = refuse
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The repository's own code and the data sets in one folder; `accelerate` is that of this Python."""
    project = Project(tmp_path_factory.mktemp("baseline") / "project", slurm=False)
    for name in ("fast_dllm", "tasks", "models/tiny", "experiments/00_baseline"):
        shutil.copytree(ROOT / name, project.root / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "eval.py", project.root)
    write_hub(project.root)
    launcher = project.state / "bin" / "fake_accelerate"
    launcher.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n')
    project.environment |= {"HF_HUB_OFFLINE": "1", "NLTK_DATA": str(HUB.parent / "nltk_data")}
    return project


def baseline(project, *options, **extra):
    return project.bash("sbatch/baseline.sh", "--limit", "2", "--model", "tiny", *options, timeout=900, **extra)


@pytest.fixture(scope="module")
def summaries(project):
    done = baseline(project)
    assert done.returncode == 0, done.stderr
    folder = project.root / "results" / "00_baseline"
    return {task: json.loads((folder / f"{task}_limit_2" / "plain" / "summary.json").read_text()) for task in TASKS}


def test_every_task_has_a_summary_in_the_settings_of_the_published_scores(summaries):
    for task, summary in summaries.items():
        settings = (summary["config"], summary["model_args"]["threshold"], summary["chat_template"])
        assert settings == ("plain", 1, True), task
        assert summary["num_fewshot"] == (5 if task == "mmlu" else 0)
        assert summary["num_samples"] == summary["num_samples_expected"]
        assert 0 <= summary["accuracy"] <= 1
        assert summary["accuracy_stderr"] is not None
    assert {task: summary["metric"] for task, summary in summaries.items()} == {
        "mmlu": "acc,none",
        "gpqa_main_n_shot": "acc,none",
        "gsm8k": "exact_match,flexible-extract",
        "minerva_math": "math_verify,none",
        "ifeval": "prompt_level_strict_acc,none",
    }


def test_groups_have_their_subgroups_and_subtasks(summaries):
    mmlu = summaries["mmlu"]["subtasks"]
    assert set(mmlu) == {f"mmlu_{name}" for name in {*MMLU_SUBGROUPS, *MMLU_SUBGROUPS.values()}}
    assert sum(mmlu[f"mmlu_{name}"]["num_samples"] for name in set(MMLU_SUBGROUPS.values())) == 2 * 57
    assert [value["num_samples"] for value in summaries["minerva_math"]["subtasks"].values()] == [2] * 7
    assert not summaries["gsm8k"]["subtasks"]


def test_what_it_cost_is_told_of_both_kinds_of_task(summaries):
    for task, requests in (("mmlu", 4 * 2 * 57), ("gpqa_main_n_shot", 4 * 2)):
        cost = summaries[task]["throughput"]
        assert cost["scored_requests"] == requests
        assert cost["requests_per_second"] == pytest.approx(requests / cost["seconds_scoring"])
        assert "new_tokens" not in cost
    # the four letters of an mmlu question share one forward
    assert summaries["mmlu"]["throughput"]["forwards"] == {"score": 2 * 57}
    for task, requests in (("gsm8k", 2), ("minerva_math", 2 * 7), ("ifeval", 2)):
        cost = summaries[task]["throughput"]
        assert cost["requests"] == requests
        assert cost["tokens_per_second"] == pytest.approx(cost["new_tokens"] / cost["seconds_generating"])
        assert cost["forwards"]["full"] > 0


def test_without_access_to_gpqa_it_says_how_to_get_it_and_does_the_rest(project, summaries, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(GATED)
    module = project.root / "fast_dllm" / "runner" / "environment.py"
    text = module.read_text()
    assert text.count('["PYTHONPATH"] = str(code_root)') == 1
    module.write_text(
        text.replace('["PYTHONPATH"] = str(code_root)', f'["PYTHONPATH"] = "{tmp_path}:" + str(code_root)')
    )
    done = baseline(project, "--force", "--task", "gpqa_main_n_shot,gsm8k")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "no access to the data set" in line]
    assert "ask for it on its page of the hub, then: hf auth login" in line
    assert "baseline.sh: failed: gpqa_main_n_shot\n" in done.stderr
    results = project.root / "results" / "00_baseline"
    assert not (results / "gpqa_main_n_shot_limit_2" / "plain" / "summary.json").exists()
    assert (results / "gsm8k_limit_2" / "plain" / "summary.json").exists()
