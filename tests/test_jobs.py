"""sbatch/_job.sh and its siblings with a pretended evaluation: results kept, failures named, jobs continued or not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from hashlib import sha256

import pytest
from script_project import CODE, CONFIGS, Project

from fast_dllm.runner.failures import classify
from fast_dllm.spec.locks import process_is_gone

CODE_SHA256 = sha256(CODE.encode()).hexdigest()
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


ENDED = {
    " DUE TO TIME LIMIT": "TIMEOUT",
    " DUE TO PREEMPTION": "PREEMPTED",
    " DUE TO NODE FAILURE": "NODE_FAIL",
    "": "CANCELLED",
}


def stop_by_slurm(project, process, job_id, due, evaluations):
    """Slurm ends a job during this evaluation (by number): a line in its log, within a progress bar's, and a signal."""
    wait_until(lambda: len(project.evaluations()) == evaluations)
    with (project.root / "logs" / f"job_{job_id}.log").open("a") as log:
        log.write("generating:  20%|##        | 1/5")
        log.write(f"slurmstepd-n1: error: *** JOB {job_id} ON n1 CANCELLED AT 2026-11-22T06:41:36{due} ***\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    project.set_job(job_id, ENDED[due])


def test_a_job_leaves_a_complete_summary_and_a_copy_under_artifacts(project):
    assert project.job("10", *JOB) == 0, log_of(project)
    assert project.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"
    copy = project.root / "artifacts" / "00_baseline" / "gsm8k_limit_5" / "k2_middle" / "summary.json"
    assert copy.read_bytes() == (output(project) / "summary.json").read_bytes()
    kept = [path.name for path in sorted(copy.parent.iterdir())]
    assert kept == ["questions.json.gz", "summary.json"]  # what a paired comparison needs outlives results/ too
    assert (copy.parent / kept[0]).read_bytes() == (output(project) / kept[0]).read_bytes()
    assert not (output(project) / "failure.json").exists()
    [command] = project.evaluations()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == [
        "launch", "--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--cpu", str(project.root / "eval.py"),
        "--tasks", "gsm8k", "--batch_size", "1", "--num_fewshot", "0",
        "--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn", "--limit", "5",
        "--configurations", "k2_middle", "--model_args",
        "model_path=tiny,show_speed=True,experiment_name=00_baseline",
        "--output_path", "results/00_baseline/gsm8k_limit_5/",
    ]  # fmt: skip


def test_the_policys_text_is_kept_once_under_its_hash(project):
    """One file for all runs of a policy, with the text that ran, also where somebody edits the policy while it runs."""
    policy, ran = project.root / "experiments" / "00_baseline" / "generation_functions.py", f"{CODE_SHA256}.py"
    code = project.root / "artifacts" / "code"
    assert project.job("10", *JOB, FAKE_EVAL="edited") == 0, log_of(project)
    assert policy.read_text() != CODE
    assert json.loads((output(project) / "summary.json").read_text())["generation_code_sha256"] == CODE_SHA256
    assert {path.name: path.read_text() for path in code.iterdir()} == {ran: CODE}
    # a result without its text is kept with the experiment's, while that is the same; else it is said
    policy.write_text(CODE)
    shutil.rmtree(project.root / "artifacts")
    (output(project) / "generation_functions.py").unlink()
    assert project.job("11", *JOB) == 0, log_of(project, "11")
    assert {path.name: path.read_text() for path in code.iterdir()} == {ran: CODE}
    shutil.rmtree(project.root / "artifacts")
    assert project.job("12", "--config", "k3_last", *JOB[2:], FAKE_EVAL="textless") == 0, log_of(project, "12")
    assert f"the text of its policy ({CODE_SHA256[:12]}) is no longer here" in log_of(project, "12")
    assert not code.exists()


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
        ("eval.py: cannot load model 'a/b': the hub does not answer, and the local cache", "hub_network"),
        ("eval.py: the model's logits are not finite in a full forward", "not_finite"),
        ("Traceback (most recent call last):\nZeroDivisionError: division by zero", "code_error"),
    ],
)
def test_a_failure_is_named_by_what_the_log_says(text, expected):
    assert classify(1, text, received_sigterm=False) == expected


def test_the_record_of_a_failure_has_its_class_its_log_and_its_last_lines(project):
    """A later failure in the same log is not named by what an earlier one left there."""
    assert project.job("10", *JOB, FAKE_EVAL="fail:CUDA out of memory") == 1
    record = failure(project)
    assert (record["class"], record["exit_code"], record["job_id"]) == ("gpu_oom", 1, "10")
    assert record["log"] == "logs/job_10.log"
    assert "CUDA out of memory" in record["last_lines"]
    assert project.statuses("--limit", "5")["k2_middle"].startswith("failed: ")
    assert len(project.calls("scancel")) == 1, "nothing waits to continue it"
    text = 'ValueError: quote " backslash \\ tab \t bell \a escape \x1b[31m and \u2713'
    project.job("10", *JOB, FAKE_EVAL=f"fail:{text}")
    assert failure(project)["class"] == "code_error"
    assert 'quote " backslash \\ tab   bell \\x07 escape \\x1b[31m and \u2713' in failure(project)["last_lines"]


@pytest.mark.parametrize(
    ("how", "status", "expected"),
    [("wrong", 2, "wrong_input"), ("killed", 137, "killed"), ("child_killed", 1, "killed")],
)
def test_wrong_input_and_a_killed_evaluation_are_no_code_errors(project, how, status, expected):
    """accelerate's launcher, killed itself or left alone with a child that was, exits with 1 and says nothing."""
    assert project.job("10", *JOB, FAKE_EVAL=how) == status
    assert failure(project)["class"] == expected


@pytest.mark.parametrize("how", ["silent", "truncated"])
def test_an_evaluation_that_ends_well_without_a_whole_summary_has_failed(project, how):
    assert project.job("10", *JOB, FAKE_EVAL=how) == 70
    assert not (project.root / "artifacts").exists()
    assert not project.statuses("--limit", "5")["k2_middle"].startswith("✓")


def test_an_older_summary_does_not_pass_for_this_run(project):
    command = ["sbatch/local.sh", "--limit", "5", "--config", "k1_first"]
    assert project.bash(*command).returncode == 0
    result = project.bash(*command, "--force", FAKE_EVAL="silent")
    assert result.returncode == 70
    assert "left no complete summary" in result.stderr
    assert not project.statuses("--limit", "5")["k1_first"].startswith("✓")


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
    stop_by_slurm(project, process, "10", due, evaluations=1)
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


def test_a_job_that_slurm_ends_after_its_last_answer_is_complete(project):
    process = project.start_job("10", *JOB, FAKE_EVAL="linger")
    wait_until((output(project) / "questions.json.gz").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, log_of(project)
    assert not (output(project) / "failure.json").exists()
    assert len(project.calls("scancel")) == 1  # nothing is left for the job that would continue it


CONTINUE = [*JOB, "--after", "9", "--progress", "0+0"]


def record_failure(project, job_id, failure_class):
    output(project).mkdir(parents=True, exist_ok=True)
    record = {"schema_version": 1, "class": failure_class, "job_id": job_id}
    (output(project) / "failure.json").write_text(json.dumps(record))


def test_a_job_that_slurm_ended_is_continued_and_one_that_failed_by_itself_is_not(project):
    for end in ("code_error", "cancelled", "gpu_oom", "wrong_input"):
        record_failure(project, "9", end)
        assert project.job("10", *CONTINUE) == 0
        assert failure(project)["class"] == end
    assert project.evaluations() == []
    assert project.calls("sbatch") == []
    for number, end in enumerate(("time_limit", "preemption", "node_failure"), 1):
        record_failure(project, "9", end)
        assert project.job("10", *CONTINUE, FAKE_EVAL="fail:x") == 1
        assert len(project.evaluations()) == number


def test_a_job_that_wrote_nothing_is_continued_by_what_the_accounting_says(project):
    for state, evaluations in (("CANCELLED by 7", 0), ("PREEMPTED", 1), ("NODE_FAIL", 2)):
        project.set_job("9", state)
        record_failure(project, "8", "code_error")  # of an earlier job: says nothing about job 9
        project.job("10", *CONTINUE, FAKE_EVAL="fail:x")
        assert len(project.evaluations()) == evaluations


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


def test_a_job_goes_on_where_it_submits_no_successor(project):
    """It is the last one that was allowed, or Slurm takes no other."""
    project.job("10", "--config", "k2_middle", "--limit", "5", "--continue", "0", FAKE_EVAL="fail:x")
    assert project.calls("sbatch") == []
    (project.state / "sbatch.fail").write_text("sbatch: error: not allowed from compute nodes\n")
    assert project.job("11", *JOB) == 0
    assert "no job to continue this one could be submitted: sbatch: error: not allowed" in log_of(project, "11")


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
    assert project.calls("scancel") == []  # the job that waits goes on, perhaps on another node


def test_a_job_that_was_cut_off_and_comes_back_leaves_the_run_to_the_one_that_took_over(project):
    """Its node is stopped for longer than a living one is silent; another node's job goes on; then it wakes up."""
    first = project.start_job("10", *JOB, FAKE_EVAL="wait")
    wait_until(lambda: project.evaluations())
    os.killpg(first.pid, signal.SIGSTOP)
    (output(project) / ".lock.0001" / "owner").write_text(f"another_node {first.pid}\n")  # as if on another node
    second = project.start_job("11", *JOB, DEAD_SECONDS="3", FAKE_EVAL="wait")
    wait_until(lambda: len(project.evaluations()) == 2)
    (project.state / "go").touch()
    os.killpg(first.pid, signal.SIGCONT)
    assert first.wait(20) == 75
    assert "another process has taken over" in log_of(project, "10")
    assert f"was taken over by {socket.gethostname()} {second.pid}" in log_of(project, "10")
    assert second.wait(20) == 0
    record = json.loads((output(project) / "job.json").read_text())
    assert record["job_id"] == "11"
    assert not (output(project) / "failure.json").exists()
    [lock] = output(project).glob(".lock.*")
    assert (lock.name, (lock / "released").exists()) == (".lock.0002", True)


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


# -- a forced re-run ---------------------------------------------------------------------------------------------------
FORCED = ["--limit", "5", "--model", "tiny", "k2_middle"]


@pytest.fixture
def forced(project):
    """A complete configuration whose forced re-run has been submitted, as job 1."""
    project.job("90", *JOB, "--continue", "0")
    assert project.run("--force", *FORCED).returncode == 0
    assert project.statuses("--limit", "5")["k2_middle"] == "queued, job 1, Priority"
    return project


def lines_on_disk(project):
    return sum(len(file.read_text().splitlines()) for file in output(project).glob("answers/*/*.jsonl"))


def test_a_forced_run_that_was_preempted_before_it_began_is_begun_by_its_successor(forced):
    first = forced.start_job(
        "1", *forced.successor()[1], FAST_DLLM_VENV=str(forced.state / "slow"), FAKE_UV_SECONDS="30"
    )
    wait_until(lambda: "building" in log_of(forced, "1"))
    first.kill()
    first.wait()
    forced.set_job("1", "PREEMPTED")
    assert len(forced.evaluations()) == 1
    script, options = forced.successor()
    assert options[-7:-1] == ["2", "--after", "1", "--progress", "0+0", "--stalled"]
    assert forced.job("2", *options, script=script) == 0
    assert len(forced.evaluations()) == 2
    assert (output(forced) / "summary.previous.json").exists()
    assert forced.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"


def test_the_successor_of_a_forced_run_that_has_begun_keeps_its_answers(forced):
    first = forced.start_job("1", *forced.successor()[1], FAKE_EVAL="sleep")
    stop_by_slurm(forced, first, "1", " DUE TO PREEMPTION", evaluations=2)
    assert lines_on_disk(forced) == 1
    script, options = forced.successor()
    second = forced.start_job("2", *options, script=script, FAKE_EVAL="sleep")
    stop_by_slurm(forced, second, "2", " DUE TO PREEMPTION", evaluations=3)
    assert lines_on_disk(forced) == 2
    script, options = forced.successor()
    assert forced.job("3", *options, script=script) == 0
    assert forced.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"


def test_a_forced_run_that_never_began_is_not_complete_and_is_submitted_again(forced):
    forced.set_job("1", "CANCELLED by 7")
    assert forced.statuses("--limit", "5")["k2_middle"].startswith("failed: cancelled, job 1")
    (forced.state / "sbatch.fail").write_text("sbatch: error: Invalid account\n")
    assert forced.run("--force", *FORCED).returncode == 1
    assert not forced.statuses("--limit", "5")["k2_middle"].startswith("✓")
    (forced.state / "sbatch.fail").unlink()
    assert "k2_middle: job 2" in forced.run(*FORCED).stdout
    assert json.loads((output(forced) / "summary.json").read_text())["accuracy"] == 0.5
    assert forced.job("2", *forced.successor()[1]) == 0
    assert len(forced.evaluations()) == 2
    assert "not submitted, complete" in forced.run(*FORCED).stdout


# -- the baseline ------------------------------------------------------------------------------------------------------
BASELINE = ["--limit", "3", "--model", "tiny", "--task", "toy_math,gsm8k,ifeval"]


def plain(project, task):
    return project.root / "results" / "00_baseline" / f"{task}_limit_3" / "plain"


def tasks_of(lines):
    return [line.split("--tasks ")[1].split()[0] for line in lines]


def start_baseline(project, job_id, *arguments, script="sbatch/baseline.sh", **extra):
    (project.state / "squeue.job").write_text("gts-lab|embers|gpu|8:00:00|gres/gpu:h100:1\n")
    return project.start_job(job_id, *arguments, script=script, **extra)


def baseline(project, *arguments, **extra):
    return start_baseline(project, *arguments, **extra).wait(60)


def continued(project, job_id, **extra):
    """The exit status of the job that waits to continue another one."""
    script, options = project.successor()
    return baseline(project, job_id, *options, script=script, **extra)


def test_the_baseline_runs_every_task_although_one_fails(project):
    words = ["sbatch/baseline.sh", "--limit", "3", "--model", "tiny"]
    allocation = {"SLURM_JOB_ID": "7", "SLURM_TASK_PID": "1"}  # typed within one: no batch job, which others continue
    result = project.bash(*words, FAKE_EVAL_gsm8k="fail:x", **allocation)
    assert result.returncode == 1
    assert project.calls("sbatch") == []
    assert tasks_of(project.evaluations()) == ["mmlu", "gpqa_main_n_shot", "gsm8k", "minerva_math", "ifeval"]
    fewshot = [line.split("--num_fewshot ")[1].split()[0] for line in project.evaluations()]
    assert fewshot == ["5", "0", "0", "0", "0"]
    assert "failed: gsm8k" in result.stderr
    again = project.bash(*words)
    assert again.returncode == 0
    assert "mmlu_limit_3/plain is complete, skipped" in again.stderr
    assert len(project.evaluations()) == 6


def test_a_baseline_job_runs_to_its_end_with_the_code_that_it_started_with(project):
    process = start_baseline(project, "10", *BASELINE, FAKE_EVAL_toy_math="wait")
    wait_until(lambda: project.evaluations())
    scripts = ("baseline.sh", "python.sh")
    runner = [str(path.relative_to(project.root)) for path in (project.root / "fast_dllm" / "runner").glob("*.py")]
    for file in ("eval.py", *(f"sbatch/{name}" for name in scripts), *runner):
        (project.root / file).write_text("edited while it ran )(")
    (project.state / "go").touch()
    assert process.wait(60) == 0, log_of(project)
    [snapshot] = (project.root / ".snapshots").iterdir()
    assert tasks_of(project.evaluations()) == ["toy_math", "gsm8k", "ifeval"]
    assert all(f".snapshots/{snapshot.name}/eval.py" in line for line in project.evaluations())
    assert (snapshot / "eval.py").read_text() == ""
    assert len(list((project.root / "artifacts").rglob("summary.json"))) == 3
    # what would have continued it is gone, and was the same code with what had been given to sbatch
    assert len(project.calls("scancel")) == 1
    [command] = project.calls("sbatch")
    resources = "--account=gts-lab --qos=embers --partition=gpu --time=8:00:00 --gres=gpu:h100:1"
    assert f"--dependency=afternotok:10 --kill-on-invalid-dep=yes {resources}" in command
    script, options = project.successor()
    assert script == f".snapshots/{snapshot.name}/sbatch/baseline.sh"
    expected = ["--snapshot", snapshot.name, "--task", "toy_math,gsm8k,ifeval", "--limit", "3", "--model", "tiny"]
    assert options == [*expected, "--continue", "2", "--after", "10", "--progress", "0+0", "--stalled", "0"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("due", [" DUE TO TIME LIMIT", " DUE TO PREEMPTION", " DUE TO NODE FAILURE"])
def test_a_baseline_that_slurm_ended_goes_on_where_it_was(project, due):
    process = start_baseline(project, "10", *BASELINE, SLURM_MEM_PER_NODE="1000", FAKE_EVAL_gsm8k="sleep")
    stop_by_slurm(project, process, "10", due, evaluations=2)
    assert "--mem=1000M" in project.calls("sbatch")[0]
    assert project.calls("scancel") == []
    (project.root / "eval.py").write_text("edited meanwhile")
    assert continued(project, "11") == 0, log_of(project, "11")
    assert tasks_of(project.evaluations()) == ["toy_math", "gsm8k", "gsm8k", "ifeval"]
    assert len({line.split("/eval.py")[0] for line in project.evaluations()}) == 1
    assert "complete tasks + batches: 0+0 when that started, now 1+1" in log_of(project, "11")
    assert "--continue 1 --after 10\\,11 --progress 1+1 --stalled 0" in project.calls("sbatch")[1]
    assert len(project.calls("scancel")) == 1


def test_a_baseline_that_was_cancelled_is_not_continued(project):
    process = start_baseline(project, "10", *BASELINE, FAKE_EVAL_gsm8k="sleep")
    stop_by_slurm(project, process, "10", "", evaluations=2)
    assert len(project.calls("scancel")) == 1
    assert continued(project, "11") == 0  # had it started all the same
    assert len(project.evaluations()) == 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("state", "goes_on"), [("NODE_FAIL", True), ("CANCELLED by 7", False), ("FAILED:1:0", False)])
def test_a_baseline_that_could_write_nothing_is_continued_by_what_the_accounting_says(project, state, goes_on):
    process = start_baseline(
        project, "10", *BASELINE, FAKE_EVAL_toy_math="fail:ZeroDivisionError", FAKE_EVAL_ifeval="sleep"
    )
    wait_until(lambda: len(project.evaluations()) == 3)
    process.kill()
    process.wait()
    wait_until(lambda: process_is_gone(process.pid))
    project.set_job("10", state)
    # the error of its first task says nothing about its end; that task is not repeated, and the exit status tells of it
    assert continued(project, "11") == (1 if goes_on else 0)
    assert tasks_of(project.evaluations()[3:]) == (["ifeval"] if goes_on else [])
    if goes_on:
        assert "toy_math_limit_3/plain failed in a job before this one (code error) and is not repeated" in log_of(
            project, "11"
        )
        assert log_of(project, "11").endswith("baseline.sh: failed: toy_math\n")


def test_a_baseline_with_an_error_in_a_task_is_not_continued(project):
    assert baseline(project, "10", *BASELINE, FAKE_EVAL_gsm8k="fail:ZeroDivisionError") == 1
    assert len(project.evaluations()) == 3
    assert len(project.calls("scancel")) == 1
    # submitted again by hand, it is tried again
    assert baseline(project, "12", *BASELINE) == 0
    assert tasks_of(project.evaluations()[3:]) == ["gsm8k"]
    # and a complete one is a job that submits and builds nothing
    submitted = len(project.calls("sbatch"))
    assert baseline(project, "13", *BASELINE, FAST_DLLM_VENV=str(project.state / "another")) == 0
    assert len(project.evaluations()) == 4
    assert len(project.calls("sbatch")) == submitted
    assert not (project.state / "another.d").exists()


def test_two_baseline_jobs_in_a_row_without_an_answer_are_the_last(project):
    process = start_baseline(project, "10", *BASELINE, FAKE_EVAL="stuck")
    stop_by_slurm(project, process, "10", " DUE TO PREEMPTION", evaluations=1)
    script, options = project.successor()
    process = start_baseline(project, "11", *options, script=script, FAKE_EVAL="stuck")
    stop_by_slurm(project, process, "11", " DUE TO PREEMPTION", evaluations=2)
    assert continued(project, "12") == 1
    assert len(project.evaluations()) == 2
    assert all(
        json.loads((plain(project, task) / "failure.json").read_text())["class"] == "no_progress"
        for task in ("toy_math", "gsm8k")
    )
    assert len(project.calls("sbatch")) == 2


def test_a_result_of_another_model_does_not_pass_for_the_baseline_that_was_asked_for(project):
    words = ["--limit", "3", "--task", "toy_math", "--model"]
    project.bash("sbatch/baseline.sh", *words, "tiny")
    (project.root / "mine").mkdir()
    (project.root / "mine" / "config.json").write_text("{}")
    result = project.bash("sbatch/baseline.sh", *words, "mine")
    assert (result.returncode, len(project.evaluations())) == (1, 1)
    assert "toy_math_limit_3/plain is complete, but of model tiny, not " in result.stderr
    assert project.bash("sbatch/baseline.sh", *words, "mine", "--force").returncode == 0
    assert len(project.evaluations()) == 2


@pytest.mark.slow
def test_a_forced_baseline_that_slurm_ended_does_not_forget_what_it_answered(project):
    project.bash("sbatch/baseline.sh", *BASELINE)
    process = start_baseline(project, "10", *BASELINE, "--force", FAKE_EVAL_gsm8k="sleep")
    stop_by_slurm(project, process, "10", " DUE TO TIME LIMIT", evaluations=5)
    assert continued(project, "11") == 0
    assert tasks_of(project.evaluations()[3:]) == ["toy_math", "gsm8k", "gsm8k", "ifeval"]
    assert len((plain(project, "gsm8k") / "answers/key/001.rank0.jsonl").read_text().splitlines()) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("finished", [True, False])
def test_two_baseline_jobs_at_once_share_the_tasks(project, finished):
    first = start_baseline(project, "10", *BASELINE, FAKE_EVAL_toy_math="wait")
    wait_until(lambda: project.evaluations())
    if finished:  # the first is done with its task before the second comes back to it
        second = start_baseline(project, "11", *BASELINE, FAKE_EVAL_ifeval="wait")
        wait_until(lambda: len(project.evaluations()) == 3)
        (project.state / "go").touch()
        assert [second.wait(60), first.wait(60)] == [0, 0], log_of(project, "11")
    else:
        assert baseline(project, "11", *BASELINE) == 1
        assert log_of(project, "11").endswith("baseline.sh: failed: toy_math\n")
        (project.state / "go").touch()
        assert first.wait(60) == 0, log_of(project)
    assert sorted(tasks_of(project.evaluations())) == ["gsm8k", "ifeval", "toy_math"]


def test_a_baseline_whose_venv_cannot_be_built_says_so_for_each_task(project):
    (project.state / "uv.log.fail").touch()
    assert baseline(project, "10", *BASELINE) == 1
    classes = [json.loads(file.read_text())["class"] for file in project.root.rglob("failure.json")]
    assert classes == ["venv"] * 3
    assert len(project.calls("scancel")) == 1


def test_local_and_the_baseline_answer_a_wrong_word_with_one_line(project):
    before = project.written()
    cases = [("baseline.sh", words) for words in (["--task", "gsm8k,.."], ["--continue", "-1"], ["x"])]
    cases += [
        ("local.sh", words)
        for words in (
            ["--config", "plain;"],
            ["--limit", "0"],
            ["--tsak", "x"],
            ["--batch_size", "two"],
            ["--limit"],
            ["--matrix", "--config", "plain"],
            ["--demo", "--task", "gsm8k"],
            ["--model", "/nonexistent"],
        )
    ]
    for script, words in cases:
        result = project.bash(f"sbatch/{script}", *words)
        assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), words
    assert project.written() == before


# -- the siblings ------------------------------------------------------------------------------------------------------


def test_an_evaluation_without_run_sees_the_clusters_settings(project):
    (project.root / "sbatch" / "cluster.env").write_text("HF_HOME=/scratch/hf\n")
    accelerate = project.state / "bin" / "fake_accelerate"
    accelerate.write_text(
        accelerate.read_text().replace("set -euo", 'echo "$HF_HOME" >>"$FAKE_SLURM/hf_home"\nset -euo')
    )
    for script, limit in (("local.sh", "5"), ("baseline.sh", "6")):
        words = ["--model", "tiny", "--task", "gsm8k", "--limit", limit]
        assert project.bash(f"sbatch/{script}", *words).returncode == 0
    assert (project.state / "hf_home").read_text() == "/scratch/hf\n" * 2
    summary = project.folder("plain", "gsm8k_limit_5") / "summary.json"
    assert json.loads(summary.read_text())["model_args"] == {"model_path": "tiny", "threshold": 1}


def evaluated(project) -> list[str]:
    """The configurations of each evaluation process, in order."""
    return [line.partition("--configurations ")[2].split(" ")[0].replace("\\,", ",") for line in project.evaluations()]


@pytest.mark.slow
def test_the_local_matrix_goes_on_after_a_configuration_that_fails(project):
    result = project.bash("sbatch/local.sh", "--limit", "5", "--matrix", FAKE_EVAL="fail_at:k2_first")
    assert result.returncode == 1
    assert evaluated(project) == [",".join(CONFIGS), ",".join(CONFIGS[4:])]
    assert "failed: k2_first\n" in result.stderr
    assert (
        json.loads((project.folder("k2_first", "gsm8k_limit_5") / "failure.json").read_text())["class"] == "code_error"
    )
    statuses = project.statuses("--limit", "5")
    assert statuses.pop("k2_first").startswith("failed: code error")
    assert all(state.startswith("✓") for state in statuses.values())
    # each that fails has its own process, record and reason
    result = project.bash("sbatch/local.sh", "--limit", "6", "--matrix", FAKE_EVAL="fail:Traceback")
    assert len(project.evaluations()) == 2 + 9
    assert f"failed: {' '.join(CONFIGS)}" in result.stderr


def test_a_configuration_that_is_taken_over_leaves_the_others_of_its_process(project):
    command = ["bash", "sbatch/local.sh", "--limit", "5", "--config", "k1_first,k1_middle,k1_last"]
    environment = project.environment | {"FAKE_EVAL": "wait"}
    with subprocess.Popen(command, cwd=project.root, env=environment, stderr=subprocess.PIPE, text=True) as running:
        wait_until(lambda: project.evaluations())
        shutil.rmtree(project.folder("k1_middle", "gsm8k_limit_5") / ".lock.0001")
        (project.state / "go").touch()
        _, told = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "00_baseline/gsm8k_limit_5/k1_middle was taken over by" in told
    assert "failed: k1_middle\n" in told
    assert evaluated(project) == ["k1_first,k1_middle,k1_last", "k1_last"]
    assert not (project.folder("k1_middle", "gsm8k_limit_5") / "summary.json").exists()
    statuses = project.statuses("--limit", "5")
    assert [config for config, state in statuses.items() if state.startswith("✓")] == ["k1_first", "k1_last"]


def test_a_configuration_that_another_process_evaluates_is_left_to_it(project):
    folder = project.folder("k1_last", "gsm8k_limit_5")
    (folder / ".lock.0001").mkdir()
    (folder / ".lock.0001" / "owner").write_text(f"{os.uname().nodename} {os.getpid()}\n")
    beat = subprocess.Popen(["bash", "-c", "while :; do date +%N >.lock.0001/heartbeat; sleep 0.2; done"], cwd=folder)
    try:
        result = project.bash("sbatch/local.sh", "--limit", "5", "--matrix")
    finally:
        beat.kill()
        beat.wait()
    assert result.returncode == 75
    assert "k1_last is being evaluated by" in result.stderr
    assert evaluated(project) == [",".join(config for config in CONFIGS if config != "k1_last")]


def test_the_demo_runs_the_matrix_on_toy_math_and_prints_frame_and_report(project):
    demo = ["sbatch/local.sh", "--demo", "--limit", "7"]
    result = project.bash(*demo, "--traces")
    assert result.returncode == 0, result.stderr
    assert evaluated(project) == [",".join(CONFIGS)]
    assert "--tasks toy_math" in project.evaluations()[0]
    assert "--traces" in project.evaluations()[0].split()
    assert "--batch_size 32" in project.evaluations()[0]
    assert "Experiment Status: 00_baseline / toy_math_limit_7" in result.stdout
    assert "Completed: 9 / 9" in result.stdout
    assert result.stderr.count(" 50.0% ± 1.0") == 9
    assert result.stdout.splitlines()[-1] == "--experiment 00_baseline --task toy_math --limit 7"


@pytest.mark.slow
def test_the_demo_with_another_tiny_model_evaluates_again_and_keeps_the_old_results(project):
    demo = ["sbatch/local.sh", "--demo", "--limit", "7"]
    for _ in range(2):
        project.bash(*demo)
        assert evaluated(project) == [",".join(CONFIGS)]
    (project.root / "models" / "tiny" / "model.safetensors").write_text("retrained")
    result = project.bash(*demo)
    assert evaluated(project)[1:] == [",".join(CONFIGS)]
    assert "Completed: 9 / 9" in result.stdout
    assert (project.folder("k1_first", "toy_math_limit_7") / "summary.stale.json").exists()


def test_the_local_matrix_skips_what_is_complete_and_keeps_what_another_model_left(project):
    project.bash("sbatch/local.sh", "--limit", "5", "--config", "k1_first", "--model", "tiny")
    (project.root / "mine").mkdir()
    (project.root / "mine" / "config.json").write_text("{}")
    project.bash("sbatch/local.sh", "--limit", "5", "--config", "k1_middle,k3_last", "--model", "mine")
    result = project.bash("sbatch/local.sh", "--limit", "5", "--matrix", "--model", "mine")
    one_process = "k1_last,k2_first,k2_middle,k2_last,k3_first,k3_middle"
    assert evaluated(project)[1:] == ["k1_middle,k3_last", one_process]
    assert "✗ k1_first (stale: it ran with model tiny, not" in result.stdout


def test_a_wrong_input_ends_the_local_matrix_at_once_and_is_passed_on(project):
    result = project.bash("sbatch/local.sh", "--limit", "5", "--matrix", FAKE_EVAL="wrong")
    assert result.returncode == 2
    assert len(project.evaluations()) == 1
    message = "eval.py: error: layer_subset needs 13 layers\n"
    assert message in result.stderr
    assert message not in result.stdout
    assert f"failed: {' '.join(CONFIGS)}" in result.stderr
    [log] = (project.root / "logs").rglob("local_*.log")
    assert message in log.read_text()


def test_the_array_says_that_it_is_deprecated_and_runs_the_configuration_of_its_number(project):
    environment = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "20", "SLURM_SUBMIT_DIR": str(project.root)}
    result = project.bash("sbatch/_array.sh", "--limit", "5", "--model", "tiny", **environment)
    assert result.returncode == 0, result.stderr
    assert "deprecated: use bash sbatch/run.sh" in result.stderr
    assert project.statuses("--limit", "5")["k2_middle"] == "✓ model tiny"
