"""The scripts with an experiment's own configurations and model arguments: what runs, and where its results are."""

from __future__ import annotations

import json

import pytest
from script_project import Project
from test_jobs import evaluated

SWEEP = {"compare_with": "t1.00", "configurations": {f"t{value:.2f}": {"threshold": value} for value in (0.5, 0.75, 1)}}
KNOBS = """
class Options(decoding.Options):
    reuse_k: int = 1
    layer_subset: str | None = None
    refresh: str = "block"
    tolerance: float = 0.2
"""


@pytest.fixture
def project(tmp_path):
    """With an experiment 04_sweep, which has a matrix and knobs of its own."""
    project = Project(tmp_path / "lab's project")
    folder = project.root / "experiments" / "04_sweep"
    folder.mkdir()
    (folder / "generation_functions.py").write_text(KNOBS)
    (folder / "matrix.json").write_text(json.dumps(SWEEP))
    return project


def command_of(project) -> dict[str, str]:
    """The options of the last evaluation."""
    words = project.evaluations()[-1].replace("\\,", ",").split()
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


# -- an experiment's own configurations --------------------------------------------------------------------------------
def test_status_and_submission_follow_the_experiments_matrix(project):
    words = ["--experiment", "04_sweep", "--limit", "5"]
    assert project.run(*words).returncode == 0
    assert project.submitted() == [f"04_sweep/gsm8k_limit_5/{name}" for name in SWEEP["configurations"]]
    assert (
        "--config t0.50 --model Efficient-Large-Model/Fast_dLLM_v2_7B --threshold 0.5 --continue 3"
        in (project.calls("sbatch")[0])
    )
    status = json.loads(project.run(*words, "--status", "--json").stdout)
    assert [entry["config"] for entry in status["configurations"]] == list(SWEEP["configurations"])
    assert (status["total"], status["compare_with"]) == (3, "t1.00")
    # the matrix that was submitted runs
    (project.root / "experiments" / "04_sweep" / "matrix.json").write_text("edited")
    script, options = project.successor(0)
    assert project.job("1", *options, script=script) == 0
    command = command_of(project)
    assert (command["--configurations"], command["--output_path"]) == ("t0.50", "results/04_sweep/gsm8k_limit_5/")


def test_local_runs_the_matrix_and_then_its_report(project):
    result = project.bash("sbatch/local.sh", "--experiment", "04_sweep", "--demo", "--limit", "7")
    assert result.returncode == 0, result.stderr
    assert evaluated(project) == ["t0.50,t0.75,t1.00"]
    assert command_of(project)["--model_args"] == "model_path=tiny,show_speed=True,experiment_name=04_sweep"
    assert result.stdout.endswith("--experiment 04_sweep --task toy_math --limit 7\n")
    words = ["sbatch/local.sh", "--experiment", "04_sweep", "--limit", "7", "--task", "gsm8k"]
    result = project.bash(*words, "--matrix")
    assert result.stdout.endswith("--experiment 04_sweep --task gsm8k --limit 7\n")
    result = project.bash(*words)
    again = "what these results show: bash sbatch/run.sh --report --experiment 04_sweep --task gsm8k --limit 7\n"
    assert result.stderr.endswith(again)
    before = len(evaluated(project))
    fault = "fail:eval.py: cannot load model: the hub does not answer"
    assert project.bash(*words, "--matrix", "--threshold", "0.7", FAKE_EVAL=fault).returncode == 1
    assert len(evaluated(project)) == before + 1  # no configuration after the first is tried without a model
    result = project.bash(*words, "--threshold", "0.5", FAKE_EVAL="fail:x")
    assert result.returncode == 1
    assert "what these results show" not in result.stderr  # there are none


def test_a_broken_matrix_or_another_matrixs_configuration_is_one_line_and_exit_2(project):
    before = project.written()
    result = project.run("--experiment", "04_sweep", "k1_first")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no configuration named 'k1_first'; valid: t0.50 t0.75 t1.00 plain" in result.stderr
    unknown_knob = '{"compare_with": "a", "configurations": {"a": {"tolerence": 1}}}'
    for script, text, named in (
        ("run.sh", "{", "not valid JSON"),
        ("run.sh", unknown_knob, "valid ones: threshold, "),
        ("local.sh", unknown_knob, "valid ones: threshold, "),
    ):
        (project.root / "experiments" / "04_sweep" / "matrix.json").write_text(text)
        result = project.bash(f"sbatch/{script}", "--experiment", "04_sweep")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"{script}: experiments/04_sweep/matrix.json: ")
        assert named in result.stderr
    assert project.written() == before


def test_plain_and_ranges_of_layers_can_be_named_beside_any_matrix_and_keep_what_was_given(project):
    for experiment in ("00_baseline", "04_sweep"):
        words = ["--experiment", experiment, "--limit", "5", "--config", "plain,k2_8-19"]
        assert list(project.statuses(*words)) == ["plain", "k2_8-19"]
    assert project.bash("sbatch/local.sh", *words, "--threshold", "0.8").returncode == 0
    assert evaluated(project) == ["plain+threshold=0.8,k2_8-19+threshold=0.8"]
    assert set(project.statuses(*words, "--threshold", "0.8").values()) == {"✓ model tiny"}


# -- model arguments ---------------------------------------------------------------------------------------------------
def test_what_is_changed_stands_in_the_names_of_job_logs_results_and_artifacts(project):
    words = ["--limit", "5", "--model", "tiny", "--model_args", "threshold=.80,small_block_size=16", "k2_middle"]
    folder = "00_baseline/gsm8k_limit_5/k2_middle+small_block_size=16+threshold=0.8"
    assert project.run(*words).returncode == 0
    assert project.submitted() == [folder]
    [call] = project.calls("sbatch")
    assert f"--job-name={folder} --output=logs/{folder}/slurm_%j.log" in call
    script, options = project.successor()
    assert project.job("1", *options, script=script) == 0
    for top in ("results", "artifacts"):
        assert (project.root / top / folder / "summary.json").exists()
    assert (project.root / "logs" / folder).is_dir()
    assert command_of(project)["--configurations"] == folder.split("/")[-1]
    assert project.statuses(*words) == {folder.split("/")[-1]: "✓ "}
    assert project.statuses("--limit", "5")["k2_middle"] == "pending"
    # in another order and another way to write it, it is the same run
    again = [
        "--limit",
        "5",
        "--model",
        "tiny",
        "--threshold",
        "0.8",
        "--model_args",
        "small_block_size=16",
        "k2_middle",
    ]
    assert "not submitted, complete" in project.run(*again).stdout
    # the job that would continue it asks for the same
    assert "--model_args small_block_size=16 " in call
    assert "--threshold 0.8 " in call


def test_what_is_given_and_equals_the_configurations_own_changes_no_name(project):
    words = ["--model_args", "threshold=0.90,reuse_k=2,layer_subset=middle,bd_size=none,use_block_cache=true"]
    assert list(project.statuses(*words, "k2_middle")) == ["k2_middle"]
    assert list(project.statuses("--experiment", "04_sweep", "--threshold", "0.75"))[1] == "t0.75"
    assert list(project.statuses("--threshold", "1", "plain")) == ["plain"]


def test_the_examples_in_the_prompt_count_where_they_are_not_the_tasks_own(project):
    assert list(project.statuses("--task", "mmlu", "k1_first", "--num_fewshot", "5")) == ["k1_first"]
    assert list(project.statuses("k1_first", "--num_fewshot", "5")) == ["k1_first+num_fewshot=5"]
    assert project.bash("sbatch/local.sh", "--limit", "5", "--num_fewshot", "3").returncode == 0
    assert command_of(project)["--num_fewshot"] == "3"
    assert list(project.statuses("--limit", "5", "--num_fewshot", "3", "plain").values()) == ["✓ model tiny"]


def test_an_experiments_knobs_are_accepted_and_others_are_listed(project):
    words = ["--experiment", "04_sweep", "--status", "--model_args"]
    assert "t0.50+tolerance=0.3 (pending)" in project.run(*words, "tolerance=0.30").stdout
    result = project.run(*words, "tolerence=0.3")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.endswith("reuse_k, layer_subset, refresh, tolerance, graphs\n")
    result = project.run("--status", "--model_args", "tolerance=0.3")
    assert (result.returncode, "tolerance" in result.stderr.split("valid ones: ")[1]) == (2, False)


def test_how_forwards_run_is_given_and_names_no_folder(project):
    """It changes no token: a complete result stays one."""
    graphs = "graphs=off,seed=3"
    assert project.bash("sbatch/local.sh", "--limit", "5", "--model_args", graphs).returncode == 0
    assert "graphs=off" in command_of(project)["--model_args"].split(",")
    assert project.statuses("--limit", "5", "--model_args", graphs, "plain") == {"plain+seed=3": "✓ model tiny"}
    assert project.statuses("--limit", "5", "--model_args", "seed=3", "plain") == {"plain+seed=3": "✓ model tiny"}
    result = project.run("--status", "--model_args", "graphs=on")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "graphs must be one of auto, off, compiled, not 'on'" in result.stderr


def test_wrong_model_args_are_one_line_exit_2_and_nothing_written(project):
    before = project.written()
    cases = [
        ("run.sh", "--model_args", "threshold"),
        ("run.sh", "--model_args", "seed=1,seed=2"),
        ("run.sh", "--model_args", "layer_subset=$(touch pwned)"),
        ("run.sh", "--model_args", "layer_subset=../.."),
        ("run.sh", "--threshold", "0.8", "--model_args", "threshold=0.8"),
        ("local.sh", "--model_args", "model_path=tiny"),
        ("local.sh", "--model_args", "threshold=nan"),
    ]
    for script, *words in cases:
        result = project.bash(f"sbatch/{script}", *words)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), words
    assert project.written() == before


# -- what a result ran with --------------------------------------------------------------------------------------------
def sweep_summary(project, **arguments):
    model_args = {"model_path": "tiny", "threshold": 0.5, "refresh": "block", "tolerance": 0.2} | arguments
    changes = {"experiment": "04_sweep", "generation_code_sha256": None, "model_args": model_args}
    path = project.summary("t0.50", **changes)
    content = json.loads(path.read_text())
    from fast_dllm.spec.hashes import policy_sha256

    content["generation_code_sha256"] = policy_sha256(project.root, "04_sweep")
    content["model_args"] = {name: value for name, value in model_args.items() if value != "absent"}
    path.unlink()
    (project.folder("t0.50", experiment="04_sweep") / "summary.json").write_text(json.dumps(content))
    return project.statuses("--experiment", "04_sweep")["t0.50"]


def test_every_argument_is_compared_and_the_one_that_differs_is_named(project):
    assert sweep_summary(project) == "✓ model tiny"
    assert sweep_summary(project, tolerance=0.3) == "stale: it ran with tolerance 0.3, not 0.2"
    assert sweep_summary(project, bd_size=16) == "stale: it ran with bd_size 16, not None"
    assert sweep_summary(project, use_block_cache=False) == "stale: it ran with use_block_cache False, not True"
    # a result of before `refresh` was a knob ran with rows
    assert sweep_summary(project, refresh="absent") == "stale: it ran with refresh rows, not block"


def test_an_engine_that_is_neither_todays_nor_replayed_is_told(project):
    project.summary("k1_first")
    project.summary("k1_middle", decoding_sha256="deadbeef")
    project.summary("k1_last", decoding_sha256=None)
    project.summary("k2_first", decoding_sha256="deadbeef", generation_code_sha256="0" * 64)
    told = "✓ engine changed, replay not recorded"
    expected = {"k1_first": "✓ ", "k1_middle": told, "k1_last": told}
    statuses = project.statuses()
    assert {name: statuses[name] for name in expected} == expected
    assert statuses["k2_first"] == "stale: generation code changed since it ran"
    replays = project.root / "experiments" / "replays.json"
    replays.write_text('{"schema_version": 1, "replayed": {"deadbeef": ["01_other"]}}')
    assert project.statuses()["k1_middle"] == told
    replays.write_text('{"schema_version": 1, "replayed": {"deadbeef": ["00_baseline"]}}')
    assert project.statuses()["k1_middle"] == "✓ "
    # what decodes was edited: recorded engines stay, today's of before is none any more
    with (project.root / "fast_dllm" / "sampling.py").open("a") as file:
        file.write("EDITED = True\n")
    assert project.statuses()["k1_first"] == told
    assert project.statuses()["k1_middle"] == "✓ "
    replays.write_text("{}")
    result = project.run("--status")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_a_model_folder_with_a_quote_in_its_path_is_not_stale_for_ever(project):
    folder = project.root / 'my "best" model'
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    project.summary("k1_first", model_args={"model_path": str(folder), "threshold": 0.9})
    assert project.statuses("--model", folder.name)["k1_first"] == "✓ "


def test_the_report_has_the_options_of_its_module(project):
    """The stand-in for the venv's Python says what the report was called with."""
    words = ["--experiment", "00_baseline,04_sweep", "--task", "mmlu", "--limit", "3", "--against", "04_sweep/t0.5"]
    for index in (0, 2, len(words)):
        result = project.run(*words[:index], "--report", *words[index:], "--fail-on", "alarm")
        assert result.stdout == f"{' '.join(words)} --fail-on alarm\n", result.stderr
    assert project.run("--report").stdout == "\n", "every task that has results"
    assert "--report" in project.run("--help").stdout
    assert project.calls("sbatch") == []
