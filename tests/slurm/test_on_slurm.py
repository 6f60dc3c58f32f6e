"""The runner on a real Slurm: nothing submitted twice, lost, or wrongly called done, whatever happens to the jobs."""

import contextlib
import os
import signal
import subprocess
import time

import pytest
from cluster import NODES, wait_for
from slurm_project import LIMIT, TASK, SlurmProject

from fast_dllm.doctor.cluster import submission_finding
from fast_dllm.doctor.situation import Situation

pytestmark = pytest.mark.slurm
CONFIGS = [f"k{k}_{subset}" for k in (1, 2, 3) for subset in ("first", "middle", "last")]


def kill(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def preempt(project, job):
    """A paid job that wants the node for itself."""
    where = ("--account=gts-lab", "--qos=inferno", f"--nodelist={job['NodeList']}", "--gres=gpu:rtx_6000:2")
    project.cluster.run("sbatch", *where, "--cpus-per-task=1", "--output=/dev/null", "--wrap=sleep 3")


def check_continued(project, undisturbed, config):
    """Complete, in two segments, with the numbers of a run that nothing disturbed."""
    project.wait_state(config, LIMIT, "complete")
    assert project.numbers(config, LIMIT) == undisturbed[int(config[1])]
    assert project.summary(config, LIMIT)["num_segments"] == 2


def test_two_runs_at_once_give_nine_jobs_and_nine_complete_summaries(project):
    words = ["bash", "sbatch/run.sh", "--task", TASK, "--model", "tiny", "--limit", "1"]
    runs = [
        subprocess.Popen(words, cwd=project.root, env=project.environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    wait_for("the accounting to know the jobs", lambda: all(project.jobs(config, 1) for config in CONFIGS))
    first = {config: project.jobs(config, 1)[0]["JobIDRaw"] for config in CONFIGS}
    assert len(set(first.values())) == 9
    for config in CONFIGS:
        project.wait_state(config, 1, "complete", seconds=600)
    frame = project.bash("sbatch/run.sh", "--status", "--task", TASK, "--limit", "1", "--check").stdout
    assert "Completed: 9 / 9" in frame
    wait_for("the queue to be empty", lambda: not project.cluster.run("squeue", "-h").stdout)
    # each ran once; what waited to continue it never started
    for config in CONFIGS:
        ran = [job for job in project.jobs(config, 1) if job["State"] == "COMPLETED"]
        assert [job["JobIDRaw"] for job in ran] == [first[config]]
    copies = list((project.root / "artifacts").rglob("summary.json"))
    assert len(copies) == 9
    before = len(project.cluster.jobs())
    assert project.submit(1).count("not submitted, complete") == 9
    assert len(project.cluster.jobs()) == before


def test_a_cancelled_job_is_not_continued_and_goes_on_when_it_is_submitted_again(project, undisturbed):
    project.submit(LIMIT, "k1_middle")
    project.hold_after_an_answer("k1_middle", LIMIT)
    project.cluster.run("scancel", project.status(LIMIT)["k1_middle"]["job"])
    entry = project.wait_state("k1_middle", LIMIT, "failed")
    assert entry["detail"].startswith("failed: cancelled, job ")
    wait_for(
        "its successor to be gone", lambda: all(job["State"] == "CANCELLED" for job in project.jobs("k1_middle", LIMIT))
    )
    project.submit(LIMIT, "k1_middle")
    check_continued(project, undisturbed, "k1_middle")


def test_a_killed_evaluation_is_not_continued_and_goes_on_when_it_is_submitted_again(project, undisturbed):
    project.submit(LIMIT, "k1_last")
    project.hold_after_an_answer("k1_last", LIMIT)
    kill(project.processes("k1_last", LIMIT))
    entry = project.wait_state("k1_last", LIMIT, "failed")
    assert entry["detail"].startswith("failed: killed by signal 9, job ")
    project.submit(LIMIT, "k1_last")
    check_continued(project, undisturbed, "k1_last")


def test_a_preempted_job_is_continued_without_anyone_typing(project, undisturbed):
    project.submit(LIMIT, "k3_middle", SBATCH_QOS="embers")
    project.hold_after_an_answer("k3_middle", LIMIT)
    preempt(project, project.jobs("k3_middle", LIMIT)[0])
    wait_for("the preemption", lambda: project.jobs("k3_middle", LIMIT)[0]["State"] == "PREEMPTED")
    check_continued(project, undisturbed, "k3_middle")
    assert [job["State"] for job in project.jobs("k3_middle", LIMIT)][:2] == ["PREEMPTED", "COMPLETED"]


def test_a_preempted_baseline_is_continued_with_the_code_and_the_resources_that_it_had(project, cluster, tmp_path):
    words = ["sbatch/baseline.sh", "--model", "tiny", "--task", "toy_math,toy_choice", "--limit", str(LIMIT)]
    project.cluster.run("sbatch", "--qos=embers", "--time=50", *words, cwd=project.root, env=project.environment)
    by_hand = SlurmProject(tmp_path / "undisturbed", cluster)
    undisturbed = subprocess.Popen(["bash", *words], cwd=by_hand.root, env=by_hand.environment)
    project.hold_after_an_answer("plain", LIMIT)
    preempt(project, project.jobs_named("baseline")[0])
    (project.root / "eval.py").write_text("raise RuntimeError('edited while the job ran')\n")
    wait_for("the preemption", lambda: project.jobs_named("baseline")[0]["State"] == "PREEMPTED")
    # the accounting may hear of a job only when it starts
    wait_for("its continuation", lambda: "COMPLETED" in [job["State"] for job in project.jobs_named("baseline")], 180)
    first, second = project.jobs_named("baseline")[:2]
    assert (first["QOS"], first["Timelimit"]) == (second["QOS"], second["Timelimit"]) == ("embers", "00:50:00")
    wait_for("what waited to continue it to be gone", lambda: not project.cluster.run("squeue", "-h").stdout)
    assert undisturbed.wait(180) == 0
    for task in ("toy_math", "toy_choice"):
        assert project.numbers("plain", LIMIT, task) == by_hand.numbers("plain", LIMIT, task)
    assert project.summary("plain", LIMIT)["num_segments"] == 2


def test_a_job_on_a_node_that_dies_is_continued_on_another(project, undisturbed):
    cluster = project.cluster
    project.submit(LIMIT, "k2_last")
    project.hold_after_an_answer("k2_last", LIMIT)
    job = project.jobs("k2_last", LIMIT)[0]
    dead = job["NodeList"]
    try:
        cluster.cut_power(dead)
        wait_for("the node to be down", lambda: cluster.state(job["JobIDRaw"]) == "NODE_FAIL", 120)
        [other] = set(NODES) - {dead}
        check_continued(project, undisturbed, "k2_last")
        assert project.jobs("k2_last", LIMIT)[1]["NodeList"] == other
    finally:
        cluster.start_node(dead)
        cluster.wait_idle()


def test_a_job_at_its_time_limit_is_continued_and_answers_only_what_is_missing(project, undisturbed):
    project.submit(LIMIT, "k2_middle", SBATCH_TIMELIMIT="1")  # Slurm's shortest; it looks at it every half minute
    project.hold_after_an_answer("k2_middle", LIMIT)
    first = project.jobs("k2_middle", LIMIT)[0]["JobIDRaw"]
    wait_for("the time limit", lambda: project.cluster.state(first) == "TIMEOUT", 180)
    second = wait_for(
        "the next job", lambda: [job for job in project.jobs("k2_middle", LIMIT) if job["JobIDRaw"] != first]
    )
    # the one that follows has the time that it needs
    project.cluster.run("scontrol", "update", f"JobId={second[0]['JobIDRaw']}", "TimeLimit=60")
    check_continued(project, undisturbed, "k2_middle")
    assert project.summary("k2_middle", LIMIT)["throughput"]["requests"] == LIMIT
    assert [job["State"] for job in project.jobs("k2_middle", LIMIT)][:2] == ["TIMEOUT", "COMPLETED"]


def test_code_that_is_edited_while_jobs_wait_changes_nothing_for_them(project):
    project.cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    try:
        project.submit(1, "k1_first")
        code = project.root / "experiments" / "00_baseline" / "generation_functions.py"
        original = code.read_text()
        code.write_text("raise RuntimeError('edited while the job waited')\n")
        (project.root / "eval.py").write_text("raise RuntimeError('edited while the job waited')\n")
        time.sleep(1)
    finally:
        project.cluster.run("scontrol", "update", "PartitionName=gpu", "State=UP")
    entry = project.wait_state("k1_first", 1, "stale")
    assert entry["detail"] == "stale: generation code changed since it ran"
    code.write_text(original)
    assert project.status(1)["k1_first"]["state"] == "complete"


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, "ok"),
        ({"SBATCH_ACCOUNT": "gts-nobody"}, "fail"),
        ({"SBATCH_QOS": "nosuch"}, "fail"),
        ({"SBATCH_GRES": "gpu:h100:1"}, "fail"),
    ],
)
def test_the_doctor_tells_what_slurm_would_say_and_queues_nothing(monkeypatch, project, settings, level):
    before = len(project.cluster.jobs())
    for name, value in (project.environment | settings).items():
        monkeypatch.setenv(name, value)
    situation = Situation(project.root, (TASK,), "tiny", project.root, None, dict(os.environ), {})
    finding = submission_finding(situation)
    assert finding.level == level, finding
    assert all(f"{name}={value}" in finding.text for name, value in settings.items())
    assert len(project.cluster.jobs()) == before
