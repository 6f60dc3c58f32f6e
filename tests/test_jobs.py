"""sbatch/_job.sh and its siblings with a pretended evaluation: results kept, failures named, jobs continued or not."""

import json
import signal
import subprocess
import time

import pytest
from script_project import Project

JOB = ["--config", "k2_middle", "--limit", "5", "--model", "tiny", "--continue", "2"]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "lab's project")


def output(project):
    return project.root / "results" / "00_baseline" / "gsm8k_limit_5" / "k2_middle"


def failure(project):
    return json.loads((output(project) / "failure.json").read_text())


def log_of(project, job_id="10"):
    return (project.root / "logs" / f"job_{job_id}.log").read_text()


def wait_until(check, seconds=20):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_job_leaves_a_complete_summary_and_a_copy_under_artifacts(project):
    assert project.job("10", *JOB) == 0, log_of(project)
    assert project.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"
    copy = project.root / "artifacts" / "00_baseline" / "gsm8k_limit_5" / "k2_middle" / "summary.json"
    assert copy.read_bytes() == (output(project) / "summary.json").read_bytes()
    assert not (output(project) / "failure.json").exists()


def test_the_evaluation_is_this_command(project):
    project.job("10", *JOB)
    [command] = project.evaluations()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == [
        "launch", "--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--cpu", str(project.root / "eval.py"),
        "--tasks", "gsm8k", "--batch_size", "1", "--num_fewshot", "0",
        "--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn", "--limit", "5", "--model_args",
        "model_path=tiny,threshold=0.9,show_speed=True,experiment_name=00_baseline,reuse_k=2,layer_subset=middle",
        "--output_path", "results/00_baseline/gsm8k_limit_5/k2_middle/",
    ]  # fmt: skip


def test_a_job_runs_the_code_that_was_submitted(project):
    project.run("--limit", "5", "k2_middle")
    command = (project.state / "ids" / "1" / "command").read_text()
    arguments = command.split("_job.sh ")[1].split()
    (project.root / "eval.py").write_text("edited")
    assert project.job("1", *arguments) == 0
    [snapshot] = (project.root / ".snapshots").iterdir()
    assert f".snapshots/{snapshot.name}/eval.py" in project.evaluations()[0]
    assert (snapshot / "eval.py").read_text() == ""


def test_a_complete_configuration_is_not_evaluated_again_unless_forced(project):
    project.job("10", *JOB)
    copy = project.root / "artifacts" / "00_baseline" / "gsm8k_limit_5" / "k2_middle" / "summary.json"
    copy.unlink()  # as if the first had been ended before it made it
    assert project.job("11", *JOB) == 0
    assert len(project.evaluations()) == 1
    assert copy.exists()
    (output(project) / "answers" / "old").mkdir()
    project.run("--limit", "5", "--model", "tiny", "--force", "k2_middle")
    assert project.job("12", *JOB) == 0
    assert len(project.evaluations()) == 2
    assert not (output(project) / "answers" / "old").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu_oom"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "host_oom"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=5.batch.", "host_oom"),
        ("OSError: [Errno 122] Disk quota exceeded: 'x'", "disk_quota"),
        ("OSError: [Errno 28] No space left on device", "disk_quota"),
        ("datasets.exceptions.DatasetNotFoundError: Dataset 'Idavidrein/gpqa' is a gated dataset", "dataset_access"),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error", "dataset_access"),
        ("requests.exceptions.ConnectionError: Max retries exceeded with url: /api", "hub_network"),
        ("huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach", "hub_network"),
        ("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)", "hub_network"),
        ("Traceback (most recent call last):\nZeroDivisionError: division by zero", "code_error"),
    ],
)
def test_a_failure_is_named_by_what_the_log_says(project, text, expected):
    assert project.job("10", *JOB, FAKE_EVAL=f"fail:{text}") == 1
    record = failure(project)
    assert (record["class"], record["exit_code"], record["job_id"]) == (expected, 1, "10")
    assert record["log"] == "logs/job_10.log"
    assert text.splitlines()[-1] in record["last_lines"]
    # nothing waits to continue it
    assert project.statuses("--limit", "5")["k2_middle"].startswith("failed: ")
    assert len(project.calls("scancel")) == 1


def test_the_record_holds_any_text(project):
    text = 'quote " backslash \\ tab \t bell \a escape \x1b[31m and \u2713'
    project.job("10", *JOB, FAKE_EVAL=f"fail:{text}")
    assert 'quote " backslash \\ tab   bell  escape [31m and \u2713' in failure(project)["last_lines"]


def test_words_of_an_earlier_run_in_the_same_log_do_not_name_this_failure(project):
    project.job("10", *JOB, FAKE_EVAL="fail:CUDA out of memory")
    assert failure(project)["class"] == "gpu_oom"
    project.job("10", *JOB, FAKE_EVAL="fail:ValueError: no")
    assert failure(project)["class"] == "code_error"


def test_wrong_input_keeps_its_exit_status(project):
    assert project.job("10", *JOB, FAKE_EVAL="wrong") == 2
    assert failure(project)["class"] == "wrong_input"


@pytest.mark.parametrize(("how", "status"), [("killed", 137), ("child_killed", 1)])
def test_a_killed_evaluation_is_no_code_error(project, how, status):
    """accelerate's launcher, killed itself or left alone with a child that was, exits with 1 and says nothing."""
    assert project.job("10", *JOB, FAKE_EVAL=how) == status
    assert failure(project)["class"] == "killed"


@pytest.mark.parametrize("how", ["silent", "truncated"])
def test_an_evaluation_that_ends_well_without_a_whole_summary_has_failed(project, how):
    assert project.job("10", *JOB, FAKE_EVAL=how) == 70
    assert not (project.root / "artifacts").exists()
    assert not project.statuses("--limit", "5")["k2_middle"].startswith("✓")


@pytest.mark.parametrize("words", [[], ["--force"]])
def test_an_older_summary_does_not_pass_for_this_run(project, words):
    command = ["sbatch/local.sh", "--limit", "5", "--config", "k1_first"]
    assert project.bash(*command).returncode == 0
    result = project.bash(*command, *words, FAKE_EVAL="silent")
    assert result.returncode == 70
    assert "left no complete summary" in result.stderr


@pytest.mark.parametrize(
    ("due", "expected", "continued"),
    [
        (" DUE TO TIME LIMIT", "time_limit", True),
        (" DUE TO PREEMPTION", "preemption", True),
        (" DUE TO NODE FAILURE", "node_failure", True),
        ("", "cancelled", False),
    ],
)
def test_a_job_that_slurm_ends_says_why_and_leaves_its_successor_only_if_that_helps(project, due, expected, continued):
    process = project.start_job("10", *JOB, FAKE_EVAL="sleep")
    wait_until(lambda: project.evaluations())
    with (project.root / "logs" / "job_10.log").open("a") as log:
        log.write("generating:  20%|##        | 1/5")
        log.write(f"slurmstepd-n1: error: *** JOB 10 ON n1 CANCELLED AT 2026-11-22T06:41:36{due} ***\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert failure(project)["class"] == expected
    [command] = project.calls("sbatch")
    assert "--dependency=afternotok:10 --kill-on-invalid-dep=yes" in command
    assert "--continue 1 --after 10" in command
    assert (len(project.calls("scancel")) == 0) is continued


def test_the_lines_of_another_job_say_nothing_about_this_one(project):
    process = project.start_job("10", *JOB, FAKE_EVAL="sleep")
    wait_until(lambda: project.evaluations())
    with (project.root / "logs" / "job_10.log").open("a") as log:
        log.write("slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-22T06:41:36 DUE TO TIME LIMIT ***\n")
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert failure(project)["class"] == "terminated"


CONTINUE = [*JOB, "--after", "9", "--progress", "0+0"]


def record_failure(project, job_id, failure_class):
    output(project).mkdir(parents=True, exist_ok=True)
    record = {"schema_version": 1, "class": failure_class, "job_id": job_id}
    (output(project) / "failure.json").write_text(json.dumps(record))


@pytest.mark.parametrize("end", ["time_limit", "preemption", "node_failure"])
def test_a_job_that_slurm_ended_is_continued(project, end):
    record_failure(project, "9", end)
    assert project.job("10", *CONTINUE) == 0
    assert len(project.evaluations()) == 1


@pytest.mark.parametrize("end", ["code_error", "cancelled", "gpu_oom", "wrong_input"])
def test_a_job_that_failed_by_itself_is_not_continued(project, end):
    record_failure(project, "9", end)
    assert project.job("10", *CONTINUE) == 0
    assert project.evaluations() == []
    assert failure(project)["class"] == end
    assert project.calls("sbatch") == []


@pytest.mark.parametrize(("state", "continued"), [("PREEMPTED", True), ("NODE_FAIL", True), ("CANCELLED by 7", False)])
def test_a_job_that_wrote_nothing_is_continued_by_what_the_accounting_says(project, state, continued):
    project.set_job("9", state)
    record_failure(project, "8", "code_error")  # of an earlier job: says nothing about job 9
    project.job("10", *CONTINUE)
    assert bool(project.evaluations()) is continued


def test_two_jobs_in_a_row_without_an_answer_are_the_last(project):
    record_failure(project, "9", "time_limit")
    assert project.job("10", *CONTINUE, "--stalled", "1") == 1
    assert project.evaluations() == []
    assert failure(project)["class"] == "no_progress"


def test_progress_resets_the_count_of_jobs_without_any(project):
    record_failure(project, "9", "time_limit")
    answers = output(project) / "answers" / "key"
    answers.mkdir(parents=True)
    (answers / "001.rank0.jsonl").write_text("{}\n{}\n")
    assert project.job("10", *CONTINUE, "--stalled", "1", FAKE_EVAL="fail:x") == 1
    assert "--progress 0+2 --stalled 0" in project.calls("sbatch")[0]


def test_the_last_allowed_job_submits_no_other(project):
    project.job("10", "--config", "k2_middle", "--limit", "5", "--continue", "0")
    assert project.calls("sbatch") == []


def test_a_job_goes_on_where_no_successor_can_be_submitted(project):
    (project.state / "sbatch.fail").write_text("sbatch: error: not allowed from compute nodes\n")
    assert project.job("10", *JOB) == 0
    assert "no job to continue this one could be submitted: sbatch: error: not allowed" in log_of(project)


def test_a_second_job_does_not_touch_what_the_first_is_evaluating(project):
    first = project.start_job("10", *JOB, FAKE_EVAL="sleep")
    wait_until(lambda: project.evaluations())
    assert project.job("11", *JOB) == 75
    assert len(project.evaluations()) == 1
    first.terminate()
    first.wait(20)


def test_a_job_whose_gpu_is_gone_does_not_fall_back_to_the_cpu(project):
    broken = project.state / "bin" / "nvidia-smi"
    broken.write_text("#!/usr/bin/env bash\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    broken.chmod(0o755)
    assert project.job("10", *JOB, SLURM_JOB_GPUS="0") == 1
    assert project.evaluations() == []
    assert failure(project)["class"] == "node_failure"


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"OMP_NUM_THREADS": "4"}, "4")])
def test_the_tiny_model_gets_one_thread_unless_told_otherwise(project, given, expected):
    accelerate = project.state / "bin" / "fake_accelerate"
    accelerate.write_text(
        accelerate.read_text().replace("set -euo", 'echo "$OMP_NUM_THREADS" >"$FAKE_SLURM/omp"\nset -euo')
    )
    assert project.bash("sbatch/local.sh", "--model", "tiny", "--limit", "5", **given).returncode == 0
    assert (project.state / "omp").read_text().strip() == expected


def test_with_a_gpu_the_evaluation_is_not_forced_to_the_cpu(project):
    present = project.state / "bin" / "nvidia-smi"
    present.write_text("#!/usr/bin/env bash\necho 'GPU 0: NVIDIA RTX 6000'\n")
    present.chmod(0o755)
    project.job("10", *JOB, SLURM_JOB_GPUS="0")
    assert "--cpu" not in project.evaluations()[0]


def test_a_venv_that_cannot_be_built_is_named(project):
    (project.state / "uv.log.fail").touch()
    assert project.job("10", *JOB) == 1
    assert failure(project)["class"] == "venv"
    assert "no route to the package index" in failure(project)["last_lines"]


# -- the siblings ------------------------------------------------------------------------------------------------------
def test_local_prints_and_stores_the_plain_model_at_threshold_one(project):
    result = project.bash("sbatch/local.sh", "--model", "tiny", "--task", "gsm8k", "--limit", "10")
    assert result.returncode == 0, result.stderr
    summary = project.root / "results/00_baseline/gsm8k_limit_10/plain/summary.json"
    assert json.loads(summary.read_text())["model_args"] == {"model_path": "tiny", "threshold": 1}
    assert "accuracy             0.5" in result.stdout


def test_the_local_matrix_skips_what_is_complete_and_goes_on_after_a_failure(project):
    words = ["sbatch/local.sh", "--limit", "5", "--matrix"]
    project.bash("sbatch/local.sh", "--limit", "5", "--config", "k1_first,k3_last")
    result = project.bash(*words, FAKE_EVAL="fail:x")
    assert result.returncode == 1
    assert len(project.evaluations()) == 2 + 7
    assert "failed: k1_middle k1_last k2_first k2_middle k2_last k3_first k3_middle" in result.stderr
    assert project.bash(*words).returncode == 0
    assert len(set(project.statuses("--limit", "5").values())) == 1


def test_the_demo_runs_the_matrix_on_toy_math_and_prints_frame_and_table(project):
    result = project.bash("sbatch/local.sh", "--demo", "--limit", "7")
    assert result.returncode == 0, result.stderr
    assert len(project.evaluations()) == 9
    assert all("--tasks toy_math" in line and "--batch_size 32" in line for line in project.evaluations())
    assert "Experiment Status: 00_baseline / toy_math_limit_7" in result.stdout
    assert "Completed: 9 / 9" in result.stdout
    assert result.stdout.count(" 50.0% ± 1.0") == 9
    assert "(9 of 9)" in result.stderr
    project.bash("sbatch/local.sh", "--demo", "--limit", "7")
    assert len(project.evaluations()) == 9
    # another tiny model: its old numbers are not shown as its own
    (project.root / "models" / "tiny" / "model.safetensors").write_text("retrained")
    result = project.bash("sbatch/local.sh", "--demo", "--limit", "7")
    assert len(project.evaluations()) == 18
    assert "Completed: 9 / 9" in result.stdout


def test_the_local_matrix_shows_results_of_another_model_as_stale_and_keeps_them(project):
    project.bash("sbatch/local.sh", "--limit", "5", "--config", "k1_first", "--model", "tiny")
    (project.root / "mine").mkdir()
    (project.root / "mine" / "config.json").write_text("{}")
    result = project.bash("sbatch/local.sh", "--limit", "5", "--matrix", "--model", "mine")
    assert len(project.evaluations()) == 1 + 8
    assert "✗ k1_first (stale: it ran with model tiny, not" in result.stdout


def test_local_passes_on_that_the_input_was_wrong(project):
    result = project.bash("sbatch/local.sh", "--limit", "5", FAKE_EVAL="wrong")
    assert result.returncode == 2
    message = "eval.py: error: layer_subset needs 13 layers\n"
    assert message in result.stderr
    assert message not in result.stdout
    [log] = (project.root / "logs").rglob("local_*.log")
    assert log.read_text() == message


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "x"],
        ["--config", "k9"],
        ["--config", "plain;"],
        ["--limit", "0"],
        ["--threshold", "-1"],
        ["--tsak", "x"],
        ["--model", "a b"],
        ["--experiment", ".."],
        ["--batch_size", "two"],
        ["--limit"],
        ["--matrix", "--config", "plain"],
    ],
)
def test_local_answers_a_wrong_word_with_one_line(project, words):
    before = project.written()
    result = project.bash("sbatch/local.sh", *words)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert project.written() == before


def test_the_baseline_runs_every_task_although_one_fails(project):
    accelerate = project.state / "bin" / "fake_accelerate"
    text = accelerate.read_text().replace(
        "set -euo", 'if [[ $* == *"--tasks gsm8k "* ]]; then FAKE_EVAL=fail:x; fi\nset -euo'
    )
    accelerate.write_text(text)
    result = project.bash("sbatch/baseline.sh", "--limit", "3", "--model", "tiny")
    assert result.returncode == 1
    evaluated = [line.split("--tasks ")[1].split()[0] for line in project.evaluations()]
    assert evaluated == ["mmlu", "gpqa_main_n_shot", "gsm8k", "minerva_math", "ifeval"]
    fewshot = [line.split("--num_fewshot ")[1].split()[0] for line in project.evaluations()]
    assert fewshot == ["5", "0", "0", "0", "0"]
    assert "failed: gsm8k" in result.stderr
    again = project.bash("sbatch/baseline.sh", "--limit", "3", "--model", "tiny")
    assert "mmlu_limit_3/plain is complete, skipped" in again.stderr
    assert len(project.evaluations()) == 6


def test_the_array_says_that_it_is_deprecated_and_runs_the_configuration_of_its_number(project):
    environment = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "20", "SLURM_SUBMIT_DIR": str(project.root)}
    result = project.bash("sbatch/_array.sh", "--limit", "5", "--model", "tiny", **environment)
    assert result.returncode == 0, result.stderr
    assert "deprecated: use bash sbatch/run.sh" in result.stderr
    assert project.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"
    assert project.bash("sbatch/_array.sh", **(environment | {"SLURM_ARRAY_TASK_ID": "9"})).returncode == 2
