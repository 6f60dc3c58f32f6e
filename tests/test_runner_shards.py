"""sbatch/run.sh --shards with a pretended Slurm: one array and a job that finishes, nothing twice and nothing lost."""

import json
import re
import shlex
import time

import pytest
from script_project import FAKES, Project

NAME = "00_baseline/gsm8k_limit_5/k2_middle"
WORDS = ["--limit", "5", "--model", "tiny", "k2_middle"]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def submit(project, *words, **extra):
    result = project.run(*WORDS, *words, **extra)
    assert result.returncode == 0, result.stderr
    return result


def jobs_of(project):
    """id -> state|reason, of those that are or were there."""
    return {path.name: path.read_text().split("|")[:2] for path in (project.state / "jobs").iterdir()}


def command(project, job):
    return shlex.split((project.state / "ids" / job / "command").read_text())


def words_of(project, job):
    words = command(project, job)
    return words[next(place for place, word in enumerate(words) if word.endswith(".sh")) + 1 :]


def run_job(project, job, **extra):
    return project.job(job, *words_of(project, job.partition("_")[0]), **extra)


def log_of(project, job):
    return (project.root / "logs" / f"job_{job}.log").read_text()


def folder(project):
    return project.root / "results" / NAME


def status(project):
    return project.statuses("--limit", "5")["k2_middle"]


def evaluations(project):
    """The --shard of each, "" of the whole run."""
    found = (re.search(r"--shard (\S+)", line) for line in project.evaluations())
    return [one[1] if one else "" for one in found]


def preempt_shard(project, job, evaluations, how="sleep"):
    """A shard's job that Slurm preempts during this evaluation (by number); returns the one that continues it."""
    before = set(jobs_of(project))
    shard = project.start_job(job, *words_of(project, job.partition("_")[0]), FAKE_EVAL=how)
    deadline = time.monotonic() + 60
    while len(project.evaluations()) < evaluations:
        assert time.monotonic() < deadline, log_of(project, job)
        time.sleep(0.1)
    with (project.root / "logs" / f"job_{job}.log").open("a") as log:
        number = job.replace("_", "00")  # the one that slurmstepd knows, see start_job
        log.write(
            f"slurmstepd-n1: error: *** JOB {number} ON n1 CANCELLED AT 2026-11-22T06:41:36 DUE TO PREEMPTION ***\n"
        )
    shard.terminate()
    assert shard.wait(30) == 143
    project.set_job(job, "PREEMPTED")
    (continuation,) = set(jobs_of(project)) - before
    return continuation


# -- the submission ----------------------------------------------------------------------------------------------------
def test_a_run_is_one_array_and_a_job_that_waits_for_it(project):
    result = submit(project, "--shards", "3")
    assert "  k2_middle: job 1[0-2]\n  k2_middle: job 2 finishes it\n" in result.stdout
    assert set(jobs_of(project)) == {"1_0", "1_1", "1_2", "2"}
    assert {"--array=0-2", f"--output=logs/{NAME}/slurm_%A_%a.log"} <= set(command(project, "1"))
    assert {"--dependency=afterany:1", f"--output=logs/{NAME}/slurm_%j.log"} <= set(command(project, "2"))
    assert words_of(project, "1") == words_of(project, "2")
    assert status(project) == "queued, job 1[0-2], Priority, 3 shards"
    assert "SBATCH_TIMELIMIT=01:00:00" in (project.state / "ids" / "2" / "settings").read_text()


def test_a_second_call_submits_nothing_and_names_another_number_or_what_force_needs(project):
    submit(project, "--shards", "3")
    for words in ([], ["--shards", "auto", "--hours", "2"]):
        result = submit(project, *words)
        assert "k2_middle: not submitted, queued, job 1[0-2], Priority, 3 shards\n" in result.stdout
    for words in (["--shards", "4"], ["--shards", "3", "--gpus", "2"]):
        assert "it was submitted with --shards 3, which goes on\n" in submit(project, *words).stdout
    result = project.run(*WORDS, "--shards", "3", "--force")
    assert result.returncode == 1
    assert "--force does not run it twice; first: scancel 1 2\n" in result.stderr
    assert len(project.calls("sbatch")) == 2


def test_one_shard_is_one_job_and_a_large_array_is_throttled(project):
    submit(project, "--shards", "1")
    assert set(jobs_of(project)) == {"1"}
    project.set_job("1", "CANCELLED")
    lines = submit(project, "--shards", "100", "--continue", "0", "--dry-run").stdout
    assert "--array=0-99%64" in lines


def test_a_wrong_number_is_answered_in_a_line(project):
    cases = [
        (["--shards", "0"], "--shards must be a whole number from 1, or auto, not '0'"),
        (["--shards", "1001"], "--shards must be at most 1000, not 1001"),
        (["--gpus", "17"], "--gpus must be at most 16, not 17"),
        (["--gpus", "two"], "--gpus must be a whole number from 1, not 'two'"),
        (["--shards", "auto", "--hours", "auto"], "--shards auto divides by the time that a job has: --hours H"),
    ]
    before = project.written()
    for words, named in cases:
        result = project.run(*WORDS, *words)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert named in result.stderr
    assert project.written() == before


# -- places ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def limited(project):
    for name in ("sacctmgr", "sinfo"):
        (project.state / "bin" / name).symlink_to(FAKES / "slurm")
    (project.state / "sacctmgr.qos").write_text("inferno|3-00:00:00|20\n")
    (project.state / "sacctmgr.assoc").write_text("phoenix|gts-lab|inferno||\n")
    (project.state / "sinfo").write_text("")
    return project


def test_an_array_counts_one_by_one_and_with_its_continuations(limited):
    result = limited.run(*WORDS, "--shards", "40")
    assert "41 at once never fit: fewer --shards" in result.stderr
    assert jobs_of(limited) == {}
    words = ["--limit", "5", "--model", "tiny", "--shards", "4", "k2_middle", "k2_first", "k2_last"]
    result = limited.run(*words)
    # 5 jobs each, and another 5 that continue them
    assert "run.sh: 2 of 3 submitted, 1 wait for a place" in result.stderr
    assert len(jobs_of(limited)) == 10
    assert "inferno takes 20 jobs of a user, queued and running; you have 0, and each keeps" in result.stderr


# -- from the first shard to the last ----------------------------------------------------------------------------------
def test_the_last_shard_finishes_the_run_and_cancels_what_waits(project):
    submit(project, "--shards", "2")
    assert run_job(project, "1_1") == 0, log_of(project, "1_1")
    assert status(project) == "queued, job 1[0], Priority, 2 shards"
    assert run_job(project, "1_0") == 0, log_of(project, "1_0")
    assert evaluations(project) == ["1/2", "0/2", ""]
    assert status(project) == "✓ model tiny"
    assert (project.root / "artifacts" / NAME / "summary.json").exists()
    states = jobs_of(project)
    # the job that waits, and each shard's own continuation
    assert [states[job][0] for job in ("2", "3_1", "4_0")] == ["CANCELLED"] * 3
    assert "--array=1" in command(project, "3")
    assert {"--dependency=afternotok:1_1"} <= set(command(project, "3"))
    # --force begins again, and what is kept of before does not count
    (folder(project) / "answers" / "old").mkdir(parents=True)
    submit(project, "--shards", "2", "--force")
    assert not (folder(project) / "answers").exists()
    assert (folder(project) / "summary.previous.json").exists()
    array = max(int(job.partition("_")[0]) for job in jobs_of(project) if job.endswith("_0"))
    assert status(project).startswith(f"queued, job {array}[0-1]")
    assert [run_job(project, f"{array}_{number}") for number in (0, 1)] == [0, 0]
    assert evaluations(project)[3:] == ["0/2", "1/2", ""]
    assert status(project) == "✓ model tiny"


def test_what_a_shard_left_is_named_and_the_job_that_waits_finishes_it(project):
    submit(project, "--shards", "2")
    assert run_job(project, "1_1", FAKE_EVAL="fail:Traceback: no") == 1
    project.set_job("1_0", "RUNNING")
    detail = status(project)
    assert detail.startswith("running, job 1[0], 1 of 2 shards; shard 1 failed: code error, job 1_1, log: logs/")
    # one that could leave no record is asked about, with all others at once
    (folder(project) / "shards" / "1-of-2" / "failure.json").unlink()
    project.set_job("1_1", "NODE_FAIL")
    before = len(project.calls("sacct"))
    assert "; shard 1 failed: node failure, job 1_1, log: " in status(project)
    assert len(project.calls("sacct")) == before + 1
    # the job that waits answers what the shard left
    assert run_job(project, "1_0") == 0
    assert run_job(project, "2") == 0, log_of(project, "2")
    assert evaluations(project) == ["1/2", "0/2", ""]
    assert status(project) == "✓ model tiny"


def test_a_shard_that_failed_is_submitted_again_alone(project):
    submit(project, "--shards", "3")
    assert run_job(project, "1_1", FAKE_EVAL="fail:Traceback: no") == 1
    result = submit(project, "--shards", "3")
    assert "  k2_middle: job 4[1]\n" in result.stdout
    assert "finishes" not in result.stdout
    assert "--array=1" in command(project, "4")


def test_the_job_that_waits_is_renewed_while_a_shard_is_to_be_continued(project):
    """Without polling: it starts when the jobs that it knew have ended; another one waits for those that are there."""
    submit(project, "--shards", "2")
    assert run_job(project, "1_0") == 0
    continuation = preempt_shard(project, "1_1", evaluations=2)
    assert run_job(project, "2") == 0, log_of(project, "2")
    assert "shards are still answered, by jobs" in log_of(project, "2")
    renewed = max((job for job in jobs_of(project) if "_" not in job), key=int)
    base = continuation.partition("_")[0]
    assert f"--dependency=afterany:{base}" in command(project, renewed)
    assert sorted(words_of(project, renewed)) == sorted(words_of(project, "2"))
    assert run_job(project, continuation) == 0, log_of(project, continuation)
    assert evaluations(project) == ["0/2", "1/2", "1/2", ""]
    assert status(project) == "✓ model tiny"
    assert jobs_of(project)[renewed][0] == "CANCELLED"


def test_only_its_own_answers_are_progress_of_a_shard(project):
    submit(project, "--shards", "2")
    second = preempt_shard(project, "1_1", evaluations=1, how="sleep")  # it answers something
    third = preempt_shard(project, second, evaluations=2, how="stuck")
    answers = folder(project) / "answers" / "key"
    (answers / "001.shard0-of-2.rank0.jsonl").write_text("{}\n")
    fourth = preempt_shard(project, third, evaluations=3, how="stuck")
    (answers / "001.shard0-of-2.rank0.jsonl").write_text("{}\n{}\n")
    assert run_job(project, fourth) == 1
    assert evaluations(project) == ["1/2"] * 3
    failure = json.loads((folder(project) / "shards" / "1-of-2" / "failure.json").read_text())
    assert failure["class"] == "no_progress"


@pytest.mark.slow
def test_a_queue_that_does_not_answer_is_no_reason_to_finish(project):
    submit(project, "--shards", "2")
    (project.state / "squeue.fail").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert run_job(project, "2") == 2
    failure = json.loads((folder(project) / "failure.json").read_text())
    assert failure["class"] == "node_failure", "so that the job that continues it tries again"
    assert evaluations(project) == []


def test_a_job_that_waits_and_finds_no_place_for_the_next_is_continued(project):
    submit(project, "--shards", "2")
    project.set_job("1_0", "RUNNING")
    (project.state / "sbatch.places").write_text("4 QOSMaxSubmitJobPerUserLimit\n")
    assert run_job(project, "2") == 2
    assert "could not be submitted" in log_of(project, "2")
    assert json.loads((folder(project) / "failure.json").read_text())["class"] == "node_failure"
    assert evaluations(project) == []


def test_a_lost_job_that_finishes_is_submitted_by_the_next_call(project):
    submit(project, "--shards", "2")
    project.set_job("2", "CANCELLED")
    result = submit(project, "--shards", "2")
    assert result.stdout.count("finishes it") == 1
    assert "job 1[" not in result.stdout.replace("queued, job 1[", "")
    assert "--dependency=afterany:1" in command(project, "3")


def test_a_damaged_summary_is_kept_aside_before_the_shards_begin(project):
    folder(project).mkdir(parents=True)
    (folder(project) / "summary.json").write_text("{")
    assert "not valid JSON" in status(project)
    submit(project, "--shards", "2")
    assert (folder(project) / "summary.corrupt.json").read_text() == "{"
    assert not (folder(project) / "summary.json").exists()


def test_answered_shards_are_not_answered_again(project):
    submit(project, "--shards", "3")
    assert run_job(project, "1_0") == 0
    for job in ("1_1", "1_2", "2"):
        project.set_job(job, "CANCELLED")
    result = submit(project, "--shards", "3")
    assert "[1-2]" in result.stdout
    # another number is another sharding: all of it, and what is answered is found in the store
    for job in jobs_of(project):
        project.set_job(job, "CANCELLED")
    assert "[0-1]" in submit(project, "--shards", "2").stdout


# -- several GPUs ------------------------------------------------------------------------------------------------------
def test_a_job_of_several_gpus_asks_for_them_with_cpus_and_memory(project):
    submit(project, "--gpus", "4", "--gpu", "a100")
    settings = (project.state / "ids" / "1" / "settings").read_text()
    assert "SBATCH_GRES=gpu:a100:4\n" in settings
    assert "SBATCH_MEM_PER_NODE=256G\n" in settings
    assert "--cpus-per-task=16" in command(project, "1")
    nvidia_smi = project.state / "bin" / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0: pretended'\n")
    nvidia_smi.chmod(0o755)
    assert run_job(project, "1") == 0, log_of(project, "1")
    assert "--num_processes 4 " in project.evaluations()[0]
    assert "--multi_gpu --main_process_port 0 " in project.evaluations()[0]
    assert "--cpus-per-task=16" in command(project, "2"), "the job that continues it too"


# -- auto --------------------------------------------------------------------------------------------------------------
def test_auto_takes_as_many_shards_as_each_end_in_one_job(project):
    """By the roofline: 1.9 hours of gsm8k at threshold 1, four times that, in jobs of an hour less 20 minutes."""
    result = project.run("--shards", "auto", "--hours", "1", "plain")
    assert result.returncode == 0, result.stderr
    assert "run.sh: plain: --shards 12, at best 1.9 GPU hours by the roofline, in jobs of 1 h\n" in result.stderr
    assert "  plain: job 1[0-11]\n" in result.stdout
    assert "--shards 12" in (project.state / "ids" / "1" / "command").read_text()
    # the run is divided: another time changes nothing of that
    again = project.run("--shards", "auto", "--hours", "4", "plain")
    assert "plain: not submitted, queued, job 1[0-11]" in again.stdout


def test_auto_takes_no_more_than_there_are_places_or_questions(limited):
    result = limited.run("--shards", "auto", "--hours", "1", "plain")
    # 20 places: as many for what continues them, and one for the job that finishes
    assert "plain: --shards 9, " in result.stderr
    assert "(12 would each end in one job)" in result.stderr
    result = limited.run("--shards", "auto", "--hours", "0.334", "--limit", "3", "plain")
    assert "plain: --shards 3, " in result.stderr


# -- the baseline ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_baseline_in_shards_is_each_tasks_plain_run(project):
    words = ["--task", "gsm8k,ifeval", "--limit", "5", "--model", "tiny"]
    result = project.bash("sbatch/baseline.sh", *words, "--shards", "2")
    assert result.returncode == 0, result.stderr
    names = ["00_baseline/gsm8k_limit_5/plain"] * 3 + ["00_baseline/ifeval_limit_5/plain"] * 3
    assert project.submitted() == names
    assert [run_job(project, job) for job in ("1_0", "1_1", "3_0", "3_1")] == [0] * 4
    assert project.bash("sbatch/baseline.sh", *words, "--shards", "2").stdout.count("not submitted, ") == 2
    # the same runs as those of one job
    assert project.bash("sbatch/baseline.sh", *words).returncode == 0
    assert len(project.evaluations()) == 6


def test_the_baseline_in_shards_is_no_job_itself(project):
    process = project.start_job("9", "--shards", "2", script="sbatch/baseline.sh")
    assert process.wait(60) == 2
    assert "--shards submits jobs of its own: bash sbatch/baseline.sh, not sbatch" in log_of(project, "9")
