"""run.sh --shards on a real Slurm: the same result as in one piece, whatever happens to a shard or to the last job."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time

import pytest
from cluster import NODES, wait_for
from slurm_project import LIMIT, TASK
from test_on_slurm import kill, preempt

pytestmark = pytest.mark.slurm


@pytest.fixture
def whole(undisturbed):
    """The numbers of k2_middle, evaluated in one piece."""
    return undisturbed[2]


def share_job(project, shard, config="k2_middle"):
    """The running job of a shard."""
    jobs = [job for job in project.jobs(config, LIMIT) if job["JobID"].endswith(f"_{shard}")]
    return next(job for job in jobs if job["State"] == "RUNNING")


def resume(project, shard=""):
    for process in project.processes("k2_middle", LIMIT, shard):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def check(project, whole, config="k2_middle"):
    """Complete, the same, and nothing left in the queue."""
    wait_for(f"{config} to be complete", lambda: project.status(LIMIT)[config]["state"] == "complete", 300, every=1)
    assert project.numbers(config, LIMIT) == whole
    assert project.summary(config, LIMIT)["throughput"]["requests"] == LIMIT
    assert not (project.folder(config, LIMIT) / "shards").exists()
    wait_for("the queue to be empty", lambda: not project.cluster.run("squeue", "-h").stdout, 120)


def test_two_shares_and_the_last_of_them_finishes(project, whole):
    project.submit(LIMIT, "k2_middle", "--shards", "2")
    project.hold_shares("k2_middle", LIMIT, "0-of-2", "1-of-2")
    told = project.status(LIMIT)["k2_middle"]["detail"]
    job = share_job(project, 0)["JobID"].partition("_")[0]
    assert told.startswith(f"running, job {job}[0-1], ")
    assert f"/{LIMIT}, 2 of 2 shards" in told
    resume(project)
    check(project, whole)

    def states() -> list[tuple[str, str]]:
        return sorted((job["JobID"].partition("_")[2], job["State"]) for job in project.jobs("k2_middle", LIMIT))

    # the accounting is told some time after the queue is empty
    ended = {"COMPLETED", "CANCELLED"}
    wait_for("all jobs' end in the accounting", lambda: {state for _, state in states()} <= ended, 60)
    # neither the job that waits nor the shards' continuations have run: they were cancelled
    assert [state for state in states() if state[1] == "COMPLETED"] == [("0", "COMPLETED"), ("1", "COMPLETED")]


def test_a_killed_share_is_finished_by_the_job_that_waits(project, whole):
    project.submit(LIMIT, "k2_middle", "--shards", "2")
    project.hold_after_an_answer("k2_middle", LIMIT, "1-of-2")
    kill(project.processes("k2_middle", LIMIT, "1-of-2"))
    check(project, whole)
    waited = [job["State"] for job in project.jobs("k2_middle", LIMIT) if "_" not in job["JobID"]]
    assert waited.index("COMPLETED") == 0


def test_a_share_cancelled_by_hand_is_named_and_finished_by_the_job_that_waits(project, whole):
    project.submit(LIMIT, "k2_middle", "--shards", "2")
    project.hold_shares("k2_middle", LIMIT, "0-of-2", "1-of-2")
    cancelled = share_job(project, 1)["JobID"]
    project.cluster.run("scancel", cancelled)
    wait_for(
        "its reason",
        lambda: f"shard 1 failed: cancelled, job {cancelled}" in project.status(LIMIT)["k2_middle"]["detail"],
    )
    again = project.submit(LIMIT, "k2_middle", "--shards", "3")
    assert "it was submitted with --shards 2, which goes on" in again
    resume(project, "0-of-2")
    check(project, whole)


def test_preempted_shares_are_continued(project, whole):
    project.submit(LIMIT, "k2_middle", "--shards", "2", SBATCH_QOS="embers")
    project.hold_after_an_answer("k2_middle", LIMIT, "0-of-2")
    job = share_job(project, 0)
    preempt(project, job)
    wait_for("the preemption", lambda: project.cluster.state(job["JobIDRaw"]) == "PREEMPTED")
    check(project, whole)
    shards = [job for job in project.jobs("k2_middle", LIMIT) if job["JobID"].endswith("_0")]
    assert [job["State"] for job in shards][:2] == ["PREEMPTED", "COMPLETED"]
    assert shards[0]["QOS"] == shards[1]["QOS"] == "embers"


def test_the_last_job_is_preempted_and_continued(project, whole):
    project.submit(LIMIT, "k2_middle", "--shards", "2", SBATCH_QOS="embers")
    project.hold_shares("k2_middle", LIMIT, "0-of-2", "1-of-2")
    for shard in ("0-of-2", "1-of-2"):
        kill(project.processes("k2_middle", LIMIT, shard))
    before = project.answered("k2_middle", LIMIT)
    wait_for("the last job's own answer", lambda: project.answered("k2_middle", LIMIT) > before, 240, every=0.05)
    for process in project.processes("k2_middle", LIMIT):
        os.kill(process, signal.SIGSTOP)
    [job] = [job for job in project.jobs("k2_middle", LIMIT) if job["State"] == "RUNNING"]
    assert "_" not in job["JobID"]
    preempt(project, job)
    wait_for("the preemption", lambda: project.cluster.state(job["JobIDRaw"]) == "PREEMPTED")
    check(project, whole)


def test_shares_on_a_node_that_dies_are_continued_on_another(project, whole):
    cluster = project.cluster
    project.submit(LIMIT, "k2_middle", "--shards", "2")
    project.hold_after_an_answer("k2_middle", LIMIT, "1-of-2")
    job = share_job(project, 1)
    dead = job["NodeList"]
    try:
        cluster.cut_power(dead)
        wait_for("the node to be down", lambda: cluster.state(job["JobIDRaw"]) == "NODE_FAIL", 120)
        check(project, whole)
        [other] = set(NODES) - {dead}
        ran = [job for job in project.jobs("k2_middle", LIMIT) if job["State"] == "COMPLETED"]
        assert other in {job["NodeList"] for job in ran}
    finally:
        cluster.start_node(dead)
        cluster.wait_idle()


def test_one_job_of_two_gpus_is_two_processes(project, whole):
    project.submit(LIMIT, "k2_middle", "--gpus", "2")
    project.wait_state("k2_middle", LIMIT, "complete")
    assert project.numbers("k2_middle", LIMIT) == whole
    assert project.summary("k2_middle", LIMIT)["num_processes"] == 2


def test_three_configurations_in_two_shards_by_two_users_with_kills_and_preemptions(project, undisturbed):
    """Twice at once, and whoever answers is killed or preempted at random."""
    configs = ["k1_first", "k2_middle", "k3_last"]
    words = ["--task", TASK, "--model", "tiny", "--limit", str(LIMIT), "--shards", "2", *configs]
    environment = project.environment | {"SBATCH_QOS": "embers"}
    runs = [
        subprocess.Popen(["bash", "sbatch/run.sh", *words], cwd=project.root, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [run.wait(240) for run in runs] == [0, 0]
    name = f"--name={','.join(f'00_baseline/{TASK}_limit_{LIMIT}/{config}' for config in configs)}"
    arrays = {
        (job, base)
        for job, base in (
            line.split() for line in project.cluster.run("squeue", "-h", name, "-o", "%j %F").stdout.splitlines()
        )
    }
    assert {job for job, _ in arrays} == {f"00_baseline/{TASK}_limit_{LIMIT}/{config}" for config in configs}
    over, dice = threading.Event(), random.Random(13)

    def asked():
        status = project.status(LIMIT)
        return {config: status[config] for config in configs}

    def disturb():
        for _ in range(6):
            if over.wait(8):
                return
            running = [job for job in project.cluster.jobs() if job["State"] == "RUNNING" and "k" in job["JobName"]]
            if running:
                job = dice.choice(running)
                if dice.random() < 0.5:
                    preempt(project, job)
                else:
                    kill(project.processes(job["JobName"].rpartition("/")[2], LIMIT)[:1])

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        end = time.monotonic() + 900
        while any(entry["state"] != "complete" for entry in asked().values()):
            assert time.monotonic() < end, {config: entry["detail"] for config, entry in asked().items()}
            time.sleep(2)
            if not project.cluster.run("squeue", "-h").stdout:
                project.submit(LIMIT, "--shards", "2", *configs)  # a killed one is not continued: by hand
    finally:
        over.set()
        thread.join()
    for k, config in enumerate(configs, 1):
        assert project.numbers(config, LIMIT) == undisturbed[k]
