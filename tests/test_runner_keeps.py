"""What the scripts never write over: the lab's earlier results, another model's, what another process just finished."""

from __future__ import annotations

import json

import pytest
from golden_models import SHARED
from script_project import CONFIGS, Project
from test_jobs import BASELINE, baseline, evaluated, log_of, plain, tasks_of

JOB = ["--config", "k2_middle", "--limit", "5", "--model", "tiny"]
TOLD = "from an earlier runner: 73.6%, which code is not recorded; --force runs it again"


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "lab's project")


def earlier(config="k2_middle", **changes):
    """A summary of the form that the lab's runner before this one wrote."""
    return {
        "task": "gsm8k",
        "config": config,
        "timestamp": "20260119_005349",
        "accuracy": 0.7361637604245641,
        "throughput": {"tokens_generated": 431492, "total_time_s": 12888.3, "tokens_per_s": 33.48},
        "git": {"commit": "c" * 40, "branch": "main", "dirty": True},
        "model_args": {"model_path": "Efficient-Large-Model/Fast_dLLM_v2_7B", "reuse_k": 2, "use_block_cache": True},
        "eval_params": {"num_fewshot": 0, "batch_size": "1", "limit": None},
    } | changes


def write_earlier(project, config="k2_middle", top="results", task="gsm8k", **changes):
    path = project.folder(config, task=task, top=top) / "summary.json"
    path.write_text(json.dumps(earlier(config, **changes), indent=2))
    return path


# -- the lab's earlier results -----------------------------------------------------------------------------------------
def test_an_earlier_result_is_complete_and_told_apart(project):
    path = write_earlier(project)
    project.summary("k1_first")
    before = path.read_bytes()
    assert project.run("--status", "--check", "k2_middle").returncode == 0
    status = json.loads(project.run("--status", "--json").stdout)
    by_name = {entry["config"]: entry for entry in status["configurations"]}
    assert (by_name["k2_middle"]["state"], by_name["k1_first"]["state"]) == ("earlier", "complete")
    assert by_name["k2_middle"]["accuracy"] == 0.7361637604245641
    assert status["completed"] == 2
    result = project.run("k2_middle")
    assert f"k2_middle: not submitted, {TOLD}" in result.stdout
    assert project.submitted() == []
    assert path.read_bytes() == before


def test_the_local_matrix_keeps_an_earlier_result_and_says_so(project):
    write_earlier(project, task="gsm8k_limit_5", eval_params={"limit": 5})
    result = project.bash(
        "sbatch/local.sh", "--limit", "5", "--matrix", "--model", "Efficient-Large-Model/Fast_dLLM_v2_7B"
    )
    assert result.returncode == 0, result.stderr
    assert evaluated(project) == [",".join(config for config in CONFIGS if config != "k2_middle")]
    assert "✓ k2_middle (from an earlier runner: 73.6%" in result.stdout


@pytest.mark.sampled(2)
@pytest.mark.parametrize("top", ["results", "artifacts"])
def test_an_earlier_result_is_overwritten_only_when_forced_and_kept_beside(project, top):
    path = write_earlier(project, top=top, task="gsm8k_limit_5", eval_params={"limit": 5})
    before = path.read_bytes()
    words = ["--config", "k2_middle", "--limit", "5"]
    assert project.job("10", *words) == 0
    assert project.evaluations() == []
    assert project.bash("sbatch/local.sh", *words, "--model", earlier()["model_args"]["model_path"]).returncode == 1
    assert project.evaluations() == []
    assert path.read_bytes() == before
    assert project.run("--limit", "5", "--force", "k2_middle").returncode == 0
    assert path.read_bytes() == before  # until the job begins
    assert project.job("1", *project.successor()[1]) == 0
    assert project.statuses("--limit", "5")["k2_middle"] == "✓ "
    assert path.with_name("summary.earlier.json").read_bytes() == before
    assert json.loads(path.read_text())["schema_version"] == 1


def test_an_earlier_result_of_other_settings_says_so(project):
    write_earlier(project, eval_params={"num_fewshot": 5, "limit": None})
    write_earlier(project, top="artifacts", config="k1_first", model_args={"model_path": "tiny"})
    statuses = project.statuses()
    assert ", which code is not recorded, num_fewshot 5; --force runs it again" in statuses["k2_middle"]
    assert statuses["k1_first"].startswith("✓ only in artifacts/, from an earlier runner: 73.6%, ")
    assert "model tiny" in statuses["k1_first"]
    assert project.statuses("--model", "a/b")["k1_first"] == "stale: it ran with model tiny, not a/b"


def test_a_foreign_file_is_no_earlier_result(project):
    cases = [
        ({"task": "mmlu"}, "it is of task 'mmlu'"),
        ({"config": "another"}, "it is of configuration 'another'"),
        ({"config": None}, "it is of configuration 'null'"),
        ({"accuracy": None}, "the accuracy is 'null'"),
        ({"accuracy": "0.7"}, "the accuracy is '\"0.7\"'"),
        ({"accuracy": 73.6}, "the accuracy is '73.6'"),
        ({"eval_params": {"limit": 10}}, "it has limit '10'"),
        ({"model_args": {"experiment_name": "01_other"}}, "it is of experiment '01_other'"),
        ({"num_samples": 1319}, "schema version '', not 1"),  # of this code, with its schema version lost
    ]
    for config, (changes, _) in zip(CONFIGS, cases, strict=True):
        (project.folder(config) / "summary.json").write_text(json.dumps(earlier(config) | changes))
    assert list(project.statuses().values()) == [f"corrupt: {reason}" for _, reason in cases]


@pytest.mark.skipif(not (SHARED / "lab").is_dir(), reason=f"no folder {SHARED.name}/lab beside this checkout")
@pytest.mark.parametrize(
    ("folder", "words", "accuracies"),
    [
        ("january/gsm8k", [], {"k1_first": "80.4%", "k2_middle": "73.6%", "k3_last": "67.7%"}),
        ("january/mmlu", ["--task", "mmlu"], {"k1_first": "66.5%", "k3_last": "66.5%"}),
        ("february_16/gsm8k_limit_10", ["--limit", "10"], {"k1_first": "60.0%", "k2_last": "10.0%", "k3_last": "0.0%"}),
    ],
)
def test_the_labs_own_results_are_complete_and_nothing_is_submitted(project, folder, words, accuracies):
    task = folder.split("/")[1]
    for config in CONFIGS:
        data = (SHARED / "lab" / folder / config / "summary.json").read_bytes()
        (project.folder(config, task=task, top="artifacts") / "summary.json").write_bytes(data)
        (project.folder(config, task=task) / "summary.json").write_bytes(data)
    statuses = project.statuses(*words)
    assert all(state.startswith("✓ from an earlier runner: ") for state in statuses.values()), statuses
    for config, accuracy in accuracies.items():
        assert f": {accuracy}, " in statuses[config]
    assert "Completed: 9 / 9" in project.run("--status", *words).stdout
    assert project.run(*words).returncode == 0
    assert project.submitted() == []


# -- another model's ---------------------------------------------------------------------------------------------------
@pytest.mark.sampled(3)
@pytest.mark.parametrize("words", [[], ["--matrix"], ["--config", "k1_first,plain"]])
def test_local_overwrites_no_result_of_another_model_without_force(project, words):
    project.bash("sbatch/local.sh", "--limit", "5", "--config", "plain,k1_first", "--model", "tiny")
    files = [project.folder(name, "gsm8k_limit_5") / "summary.json" for name in ("plain", "k1_first")]
    before = [file.read_bytes() for file in files]
    (project.root / "mine").mkdir()
    (project.root / "mine" / "config.json").write_text("{}")
    result = project.bash("sbatch/local.sh", "--limit", "5", *words, "--model", "mine")
    assert result.returncode == (0 if words == ["--matrix"] else 1)
    assert "is complete, but of model tiny, not /" in result.stderr
    assert [file.read_bytes() for file in files] == before
    assert project.bash("sbatch/local.sh", "--limit", "5", *words, "--model", "mine", "--force").returncode == 0
    assert any(file.read_bytes() != old for file, old in zip(files, before, strict=True))


def test_local_overwrites_no_result_of_other_code_without_force(project):
    words = ["sbatch/local.sh", "--limit", "5", "--config", "plain"]
    project.bash(*words)
    summary = project.folder("plain", "gsm8k_limit_5") / "summary.json"
    before = summary.read_bytes()
    with (project.root / "experiments/00_baseline/generation_functions.py").open("a") as file:
        file.write("# another idea\n")
    result = project.bash(*words)
    assert result.returncode == 1
    assert "plain is stale: generation code changed since it ran; skipped, --force runs it again" in result.stderr
    assert summary.read_bytes() == before
    assert project.bash(*words, "--force").returncode == 0
    assert summary.read_bytes() != before


def test_a_run_that_waits_its_turn_in_a_process_has_not_failed(project):
    """Several share a process that was killed; what it had not come to is pending, and only the first ended."""
    result = project.bash(
        "sbatch/local.sh", "--limit", "5", "--config", "k1_first,k1_middle", FAKE_EVAL="fail_at:k1_first"
    )
    assert result.returncode == 1
    for config in ("k2_first", "k2_middle"):
        folder = project.folder(config, "gsm8k_limit_5")
        (folder / "job.json").write_text('{"schema_version": 1, "job_id": "", "log": "logs/x.log"}')
    (project.folder("k2_first", "gsm8k_limit_5") / "answers").mkdir()
    statuses = project.statuses("--limit", "5")
    assert statuses["k1_first"].startswith("failed: code error")
    assert statuses["k2_first"] == "failed: ended without a result, log: logs/x.log"
    assert statuses["k2_middle"] == "pending"


# -- what another process finishes between the look and the lock -------------------------------------------------------
@pytest.fixture
def gap(project):
    """Called with a run's folder and its summary: whoever makes that run's lock finds it complete, finished by another
    process a moment before."""

    def stand_in(folder, text):
        source = project.state / "finished.json"
        source.write_text(text)
        with (project.root / "fast_dllm" / "spec" / "locks.py").open("a") as module:
            module.write(
                f"""

_acquire = acquire


def acquire(base, wait):
    if str(base) == {str(folder / ".lock")!r} and os.path.exists({str(source)!r}):
        os.replace({str(source)!r}, {str(folder / "summary.json")!r})
    return _acquire(base, wait)
"""
            )
        return source

    return stand_in


def finished(project, task, config="plain", limit=3):
    """A whole summary of a run, as an evaluation leaves it."""
    project.bash("sbatch/local.sh", "--model", "tiny", "--task", task, "--limit", str(limit), "--config", config)
    path = project.folder(config, f"{task}_limit_{limit}") / "summary.json"
    text = path.read_text()
    path.unlink()
    (project.state / "evaluations.log").unlink()
    for lock in path.parent.glob(".lock.*"):
        for file in lock.iterdir():
            file.unlink()
        lock.rmdir()
    (path.parent / "job.json").unlink()
    return path, text


def test_a_baseline_job_repeats_no_task_that_was_finished_between_its_look_and_its_lock(project, gap):
    path, text = finished(project, "gsm8k")
    source = gap(path.parent, text)
    assert baseline(project, "10", *BASELINE) == 0, log_of(project)
    assert not source.exists(), "nobody stood in the gap"
    assert tasks_of(project.evaluations()) == ["toy_math", "ifeval"]
    assert path.read_text() == text
    assert f"== 00_baseline/gsm8k_limit_3/{plain(project, 'gsm8k').name} is complete, skipped" in log_of(project)
    assert (project.root / "artifacts/00_baseline/gsm8k_limit_3/plain/summary.json").read_text() == text


def test_a_job_repeats_no_run_that_was_finished_between_its_look_and_its_lock(project, gap):
    path, text = finished(project, "gsm8k", "k2_middle", 5)
    source = gap(path.parent, text)
    assert project.job("10", *JOB, "--continue", "1") == 0, log_of(project)
    assert not source.exists()
    assert project.evaluations() == []
    assert path.read_text() == text
    assert len(project.calls("scancel")) == 1  # what would have continued it


def test_local_repeats_no_run_of_the_matrix_that_was_finished_between_its_look_and_its_lock(project, gap):
    path, text = finished(project, "gsm8k", "k2_middle", 5)
    source = gap(path.parent, text)
    assert project.bash("sbatch/local.sh", "--limit", "5", "--matrix").returncode == 0
    assert not source.exists()
    assert evaluated(project) == [",".join(config for config in CONFIGS if config != "k2_middle")]
    assert path.read_text() == text
    locks = list((project.root / "results").rglob(".lock.*"))
    assert len(locks) == 9
    assert all((lock / "released").exists() for lock in locks), "also the one that was not needed"


def test_the_gap_is_where_the_test_says(project, gap):
    """The tests above can fail: a scripts' copy that looks before its lock alone makes the run a second time."""
    module = project.root / "fast_dllm" / "runner" / "evaluation.py"
    text = module.read_text()
    decided = "if not forced and judgement.is_whole and not _runs_again(judgement, settings.mode):"
    assert text.count(decided) == 1
    module.write_text(text.replace(decided, "if False:"))
    path, summary = finished(project, "gsm8k", "k2_middle", 5)
    source = gap(path.parent, summary)
    project.job("10", *JOB)
    assert not source.exists()
    assert len(project.evaluations()) == 1
