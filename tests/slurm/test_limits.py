"""The runner within the limits of a real Slurm that has PACE's: what is lowered, refused, left for later, told."""

import contextlib

import pytest
from cluster import wait_for

pytestmark = pytest.mark.slurm
EMBERS = {"SBATCH_QOS": "embers"}
WORDS = ("--task", "toy_math", "--model", "tiny", "--limit", "1")


def one_line(result):
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    return result.stderr


@contextlib.contextmanager
def changed(cluster, what, setting, back):
    """A limit, until the end of the block."""
    cluster.run("sacctmgr", "-i", "modify", *what.split(), "set", setting)
    try:
        yield
    finally:
        cluster.run("sacctmgr", "-i", "modify", *what.split(), "set", back)


@contextlib.contextmanager
def nothing_starts(cluster):
    cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    try:
        yield
    finally:
        cluster.run("scontrol", "update", "PartitionName=gpu", "State=UP")


def submit_by_hand(project, config, *options, script="exit 0"):
    """A job of a run's name, as a user's own command or an earlier run.sh would have left it in the queue."""
    words = ["sbatch", "--parsable", f"--job-name=00_baseline/toy_math_limit_1/{config}", "--output=/dev/null"]
    done = project.cluster.run(*words, *options, f"--wrap={script}", cwd=project.root, env=project.environment | EMBERS)
    return done.stdout.strip()


def wait_detail(project, config, text):
    def reached():
        detail = project.status(1)[config]["detail"]
        return detail if text in detail else None

    return wait_for(f"{config}: {text}", reached, 60, every=1)


def test_the_first_command_on_free_hours_gives_a_job_that_starts(project):
    result = project.bash("sbatch/run.sh", *WORDS, "k1_first", **EMBERS)
    assert "embers ends jobs after 8 h; 8 h asked, not 12 h" in result.stderr
    project.wait_state("k1_first", 1, "complete")
    assert project.jobs("k1_first", 1)[0]["Timelimit"] == "08:00:00"


@pytest.mark.parametrize(
    ("words", "extra", "named"),
    [
        (["--hours", "8.1"], EMBERS, "--hours 8.1 does not fit, such a job never starts: embers ends jobs after 8 h"),
        (["--hours", "73"], {"SBATCH_QOS": "inferno"}, "inferno ends jobs after 3 days"),
        ([], {"SBATCH_QOS": "nosuch"}, "account gts-lab may not use QOS nosuch, only embers, inferno, normal"),
        ([], {"SBATCH_ACCOUNT": "gts-nobody"}, "account gts-nobody is none of yours, which are gts-lab, gts-other"),
    ],
)  # fmt: skip
def test_what_slurm_would_refuse_or_never_start_is_refused_in_a_line(project, words, extra, named):
    before = len(project.cluster.jobs())
    assert named in one_line(project.bash("sbatch/run.sh", *WORDS, *words, check=False, **extra))
    assert len(project.cluster.jobs()) == before


def test_where_no_account_is_named_slurms_default_one_is_taken_and_named(project):
    """The cluster's accounting gives its user the default account root (cluster.py)."""
    result = project.bash("sbatch/run.sh", *WORDS, "--dry-run", "k1_last", SBATCH_ACCOUNT="", **EMBERS)
    assert "run.sh: account root, your default one\n" in result.stderr
    assert "SBATCH_ACCOUNT=root" in result.stdout


def test_slurm_itself_accepts_a_job_that_never_starts_and_run_offers_one_that_does(project):
    job = submit_by_hand(project, "k1_first", "--time=12:00:00")
    detail = wait_detail(project, "k1_first", "blocked")
    assert "its wall time is longer than its QOS or account allows (QOSMaxWallDurationPerJobLimit)" in detail
    assert project.bash("sbatch/run.sh", *WORDS, "--status", "--check", check=False).returncode == 3
    result = project.bash("sbatch/run.sh", *WORDS, "k1_first", **EMBERS)
    offered = result.stderr.split("submitted anew: ")[1].strip()
    assert offered.startswith(f"scancel {job}; bash sbatch/run.sh ")
    project.bash("-c", offered, **EMBERS)
    project.wait_state("k1_first", 1, "complete")


def test_reasons_of_a_real_queue_are_told_in_words(project):
    cluster = project.cluster
    cluster.run("scontrol", "update", "PartitionName=gpu", "MaxTime=1-00:00:00")
    submit_by_hand(project, "k1_middle", "--hold")
    try:
        submit_by_hand(project, "k1_first", "--qos=inferno", "--time=2-00:00:00")
        detail = wait_detail(project, "k1_first", "blocked: its wall time is longer than its partition allows")
        assert "(PartitionTimeLimit)" in detail
    finally:
        cluster.run("scontrol", "update", "PartitionName=gpu", "MaxTime=3-00:00:00")
    assert "scontrol release" in wait_detail(project, "k1_middle", "blocked: held by its owner")
    with changed(cluster, "account gts-other", "GrpTRESMins=billing=1", "GrpTRESMins=billing=-1"):
        submit_by_hand(project, "k1_last", "--account=gts-other")
        detail = wait_detail(project, "k1_last", "blocked: the account's hours do not cover its whole wall time")
        assert "(AssocGrpBillingMinutes)" in detail


def test_before_a_maintenance_a_job_waits_and_says_so(project):
    reservation = ("ReservationName=upkeep", "StartTime=now+2hours", "Duration=60", "Nodes=ALL", "Users=root")
    project.cluster.run("scontrol", "create", "reservation", *reservation, "Flags=MAINT")
    try:
        project.bash("sbatch/run.sh", *WORDS, "k1_first", **EMBERS)
        detail = wait_detail(project, "k1_first", "maintenance ahead: it starts afterwards")
        assert detail.startswith("queued, job ")
        # one that ends before starts at once
        project.bash("sbatch/run.sh", *WORDS, "--hours", "1", "k1_middle", **EMBERS)
        project.wait_state("k1_middle", 1, "complete")
    finally:
        project.cluster.run("scontrol", "delete", "ReservationName=upkeep")
    project.wait_state("k1_first", 1, "complete")


def test_what_finds_no_place_is_named_and_submitted_by_the_next_run(project):
    array = ["sbatch", "--parsable", "--qos=embers", "--array=0-45", "--hold", "--output=/dev/null", "--wrap=exit 0"]
    others = project.cluster.run(*array, env=project.environment).stdout.strip()
    with nothing_starts(project.cluster):
        result = project.bash("sbatch/run.sh", *WORDS, **EMBERS)  # 4 places: two jobs, and two that continue them
        assert result.stderr.endswith("run.sh: 2 of 9 submitted, 7 wait for a place: run it again\n")
        assert "you have 46" in result.stderr
        project.cluster.run("scancel", others)
        result = project.bash("sbatch/run.sh", *WORDS, **EMBERS)
        assert result.stdout.count(": job ") == 7


def test_the_places_may_be_gone_when_a_job_asks_for_its_continuation(project):
    with changed(project.cluster, "qos embers", "MaxSubmitJobsPerUser=1", "MaxSubmitJobsPerUser=50"):
        result = project.bash("sbatch/run.sh", *WORDS, "k1_first", "k1_middle", **EMBERS)
        assert "1 of 2 submitted, 1 wait for a place" in result.stderr
        project.wait_state("k1_first", 1, "complete")
        [log] = (project.root / "logs" / "00_baseline" / "toy_math_limit_1" / "k1_first").glob("slurm_*.log")
        assert "could be submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit" in log.read_text()
        assert "run.sh submits it once there is a place" in log.read_text()


def test_the_gpu_that_starts_soonest_is_the_one_that_is_free(project):
    cluster = project.cluster
    busy = ["sbatch", "--parsable", "--qos=inferno", "--gres=gpu:rtx_6000:2", "--time=5:00:00", "--output=/dev/null"]
    for _ in range(2):
        cluster.run(*busy, "--cpus-per-task=1", "--wrap=sleep 60", env=project.environment)
    wait_for(
        "both nodes to be busy", lambda: cluster.run("squeue", "-h", "-t", "R", "-o", "%i").stdout.count("\n") == 2
    )
    words = ["--gpu", "soonest", "k1_first"]
    result = project.bash("sbatch/run.sh", *WORDS, *words, SBATCH_QOS="inferno")
    assert "run.sh: GPU l40s starts soonest, at 20" in result.stderr
    assert "h100: Requested node configuration is not available" in result.stderr
    project.wait_state("k1_first", 1, "complete")
    dry = project.bash("sbatch/run.sh", *WORDS, "--dry-run", "--gpu", "l40s", "k1_last")
    assert "SBATCH_GRES=gpu:l40s:1" in dry.stdout
