"""sbatch/run.sh within a cluster's limits: wall time, account, places in the queue, and jobs that never start."""

import json
import math
import shutil

import pytest
from script_project import CONFIGS, FAKES, Project

from fast_dllm.runner import slurm

QOS = "normal||\ninferno|3-00:00:00|500\nembers|08:00:00|50\n"
ONE = "phoenix|gts-lab|embers,inferno||\n"
TWO = ONE + "phoenix|gts-other|inferno||\n"


@pytest.fixture
def silent(tmp_path):
    """A cluster whose sacctmgr is missing."""
    return Project(tmp_path / "project")


@pytest.fixture
def project(silent):
    """One that tells its limits and accounts."""
    for name in ("sacctmgr", "sinfo"):
        (silent.state / "bin" / name).symlink_to(FAKES / "slurm")
    (silent.state / "sacctmgr.qos").write_text(QOS)
    (silent.state / "sacctmgr.assoc").write_text(ONE)
    (silent.state / "sinfo").write_text("gpu:rtx_6000:4(S:0-1)|191000\ngpu:l40s:8|700000\n")
    return silent


def settings(project, job="1"):
    """What sbatch was told beside its options."""
    lines = (project.state / "ids" / job / "settings").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def refused(result):
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    return result.stderr


def queue(project, count, first=100, qos="embers", state="RUNNING", reason="None", folder="/elsewhere"):
    for number in range(first, first + count):
        (project.state / "jobs" / str(number)).write_text(
            f"{state}|{reason}|other|{folder}|{qos}|8:00:00|1:00||gts-lab\n"
        )


# -- wall time ---------------------------------------------------------------------------------------------------------
def test_a_default_wall_time_is_lowered_to_what_the_qos_or_the_account_allows(project):
    result = project.run("k1_first", SBATCH_QOS="embers")
    assert result.returncode == 0
    assert "run.sh: embers ends jobs after 8 h; 8 h asked, not 12 h\n" in result.stderr
    assert settings(project)["SBATCH_TIMELIMIT"] == "08:00:00"
    assert len(project.calls("sacctmgr")) == 2, "each question once"
    result = project.run("k1_middle")
    assert "asked" not in result.stderr
    assert "SBATCH_TIMELIMIT" not in settings(project, "2")
    (project.state / "sacctmgr.assoc").write_text("phoenix|gts-lab|embers,inferno|04:00:00|\n")
    assert "account gts-lab ends jobs after 4 h; 4 h asked" in project.run("k1_last").stderr


def test_where_slurm_does_not_say_the_known_limits_count_and_are_named_as_such(silent):
    result = silent.run("k1_first", SBATCH_QOS="embers")
    assert (
        "embers ends jobs after 8 h (users' notes of 2026, docs/reference/pace-cluster.md: sacctmgr does not"
        in result.stderr
    )
    assert settings(silent)["SBATCH_TIMELIMIT"] == "08:00:00"
    assert silent.run("k1_middle", SBATCH_QOS="unheard_of").returncode == 0
    assert "SBATCH_TIMELIMIT" not in settings(silent, "2")


def test_a_wall_time_that_was_asked_for_and_does_not_fit_is_refused_in_a_line(project):
    before = project.written()
    for word in ("", "8h", "99999"):
        refused(project.run("--hours", word, "k1_first"))
    assert project.written() == before
    cases = [
        (["--hours", "12"], {}, "--hours 12 does not fit, such a job never starts: embers ends jobs after 8 h"),
        (["--hours", "8.5", "--dry-run"], {}, "--hours 8.5 does not fit"),
        ([], {"SBATCH_TIMELIMIT": "1-00:00:00"}, "SBATCH_TIMELIMIT=1-00:00:00 does not fit"),
        ([], {"SBATCH_TIMELIMIT": "0"}, "SBATCH_TIMELIMIT=0 does not fit"),
        ([], {"SBATCH_TIMELIMIT": "soon"}, "SBATCH_TIMELIMIT=soon is no time for Slurm"),
    ]
    for words, extra, named in cases:
        assert named in refused(project.run(*words, SBATCH_QOS="embers", **extra))
    assert project.submitted() == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:30", 1830), ("08:00:00", 28800), ("1-0", 86400), ("1-12:30", 131400), ("3-00:00:00", 259200),
        ("UNLIMITED", math.inf), ("", math.inf), ("8h", None), ("-5", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert slurm.read_time(text) == seconds


# -- account -----------------------------------------------------------------------------------------------------------
def test_the_only_account_or_the_default_one_is_taken_and_named(project):
    result = project.run("k1_first")
    assert "run.sh: account gts-lab, the only one you have\n" in result.stderr
    assert settings(project)["SBATCH_ACCOUNT"] == "gts-lab"
    assert "only one" not in project.run("--dry-run", "k1_middle", SBATCH_ACCOUNT="gts-lab").stderr
    (project.state / "sacctmgr.assoc").write_text(TWO_ACCOUNTS)
    (project.state / "sacctmgr.user").write_text("gts-two\n")
    result = project.run("k1_middle")
    assert "run.sh: account gts-two, your default one\n" in result.stderr
    assert settings(project, "2")["SBATCH_ACCOUNT"] == "gts-two"


def test_an_account_that_slurm_would_refuse_is_refused_before_nine_submissions_fail(project):
    cases = [
        (TWO, {}, "write one of yours as SBATCH_ACCOUNT in sbatch/cluster.env: gts-lab, gts-other"),
        (TWO, {"SBATCH_ACCOUNT": "gts-nobody"}, "account gts-nobody is none of yours, which are gts-lab, gts-other"),
        (TWO, {"SBATCH_ACCOUNT": "gts-other", "SBATCH_QOS": "embers"}, "account gts-other may not use QOS embers"),
        (ONE, {"SBATCH_QOS": "nosuch"}, "account gts-lab may not use QOS nosuch, only embers, inferno"),
        (
            "phoenix|gts-lab|||\n",
            {"SBATCH_QOS": "nosuch"},
            "no QOS 'nosuch' here (SBATCH_QOS); there is: normal, inferno",
        ),
        ("", {}, "Slurm knows no account of "),
    ]
    for accounts, extra, named in cases:
        (project.state / "sacctmgr.assoc").write_text(accounts)
        assert named in refused(project.run(**extra))
    assert project.calls("sbatch") == []
    # what is complete needs no account
    (project.state / "sacctmgr.assoc").write_text(TWO)
    project.summary("k1_first")
    assert project.run("k1_first").returncode == 0


TWO_ACCOUNTS = "phoenix|gts-lab|||\nphoenix|gts-two|||\n"


def test_where_slurm_needs_no_account_none_is_asked_for(project):
    (project.state / "bin" / "scontrol").symlink_to(FAKES / "slurm")
    (project.state / "sacctmgr.assoc").write_text(TWO_ACCOUNTS)
    for enforced, status in (("safe", 2), ("associations,qos,limits", 2), ("none", 0)):
        (project.state / "scontrol.config").write_text(f"AccountingStorageEnforce = {enforced}\n")
        assert project.run("k1_first").returncode == status


def test_accounts_of_other_clusters_with_the_same_accounting_do_not_count(project):
    (project.state / "bin" / "scontrol").write_text("#!/bin/sh\necho 'ClusterName             = phoenix'\n")
    (project.state / "bin" / "scontrol").chmod(0o755)
    (project.state / "sacctmgr.assoc").write_text(f"hive|hive-lab|hive||\n{ONE}")
    assert "run.sh: account gts-lab, the only one you have\n" in project.run("k1_first").stderr


# -- places ------------------------------------------------------------------------------------------------------------
def test_what_finds_no_place_is_named_and_the_next_run_submits_it(project):
    queue(project, 38)  # 12 places: six jobs, and six that continue them
    result = project.run(SBATCH_QOS="embers")
    assert result.returncode == 0
    assert "embers takes 50 jobs of a user, queued and running; you have 38, and each keeps a place" in result.stderr
    assert result.stderr.endswith("run.sh: 6 of 9 submitted, 3 wait for a place: run it again\n")
    assert result.stdout.count("not submitted, no place for it in the queue") == 3
    own = [name for name in project.submitted() if name.startswith("00_baseline")]
    assert own == [f"00_baseline/gsm8k/{config}" for config in CONFIGS[:6]]
    assert project.statuses()["k3_first"] == "pending"
    for number in range(100, 138):
        (project.state / "jobs" / str(number)).unlink()
    result = project.run(SBATCH_QOS="embers")
    assert "wait for a place" not in result.stderr
    assert sorted(project.submitted()) == [f"00_baseline/gsm8k/{config}" for config in sorted(CONFIGS)]


def test_which_jobs_count_for_the_places_that_are_left(project):
    def waiting(*words, **extra):
        return project.run("--dry-run", *words, SBATCH_QOS="embers", **extra).stderr

    queue(project, 300, first=1000, qos="inferno")  # another QOS takes no place here
    assert "wait for a place" not in waiting()
    queue(project, 10, state="PENDING", reason="Priority", folder=project.root)  # each submits another
    queue(project, 20, first=200, state="PENDING", reason="Dependency", folder=project.root)  # waits to continue one
    assert "5 of 9 would be submitted, 4 wait" in waiting()  # 50 - 30 - 10 = 10 places, two for each job
    queue(project, 14, first=300)
    assert "6 of 9 would be submitted" in waiting("--continue", "0")


def test_the_accounts_own_limit_of_jobs_counts_too(project):
    (project.state / "sacctmgr.assoc").write_text("phoenix|gts-lab|embers,inferno||10\n")
    queue(project, 4, qos="inferno")  # all of the account, whatever their QOS
    result = project.run(SBATCH_QOS="embers")
    assert "gts-lab takes 10 jobs of a user, queued and running; you have 4" in result.stderr
    assert "3 of 9 submitted, 6 wait" in result.stderr


@pytest.mark.parametrize("word", ["QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit"])
def test_a_place_that_others_take_meanwhile_is_no_error(project, word):
    (project.state / "sbatch.places").write_text(f"1 {word}\n")
    result = project.run("k1_first", "k1_middle", "k1_last")
    assert result.returncode == 0
    assert "1 of 3 submitted, 2 wait for a place: run it again" in result.stderr
    assert result.stdout.count("not submitted, no place for it in the queue") == 2
    assert len(project.submitted()) == 1


def test_a_continuation_that_finds_no_place_says_so(project):
    (project.state / "sbatch.places").write_text("1 QOSMaxSubmitJobPerUserLimit\n")
    words = ["--config", "k2_middle", "--task", "toy_math", "--limit", "5", "--model", "tiny", "--continue", "2"]
    assert project.job("10", *words) == 0
    log = (project.root / "logs" / "job_10.log").read_text()
    assert "no job to continue this one could be submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit" in log
    assert "run.sh submits it once there is a place" in log


def test_a_continuation_asks_for_what_the_job_before_it_had(project):
    words = ["--config", "k2_middle", "--task", "toy_math", "--limit", "5", "--model", "tiny", "--continue", "2"]
    project.job("10", *words, SBATCH_TIMELIMIT="08:00:00", SBATCH_ACCOUNT="gts-lab", SLURM_JOB_QOS="embers")
    assert settings(project) == {"SBATCH_TIMELIMIT": "08:00:00", "SBATCH_ACCOUNT": "gts-lab"}


# -- what never starts -------------------------------------------------------------------------------------------------
BLOCKED = ["QOSMaxWallDurationPerJobLimit", "AssocMaxWallDurationPerJobLimit", "PartitionTimeLimit", "InvalidAccount"]
BLOCKED += ["AssocGrpBillingMinutes", "AssocGrpCPUMinutesLimit", "InvalidQOS", "BadConstraints", "QOSMaxGRESPerJob"]
BLOCKED += ["QOSMaxMemoryPerNode", "QOSMinGRES", "DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin"]
RESOLVED = ("Priority", "Resources", "None", "Dependency", "BeginTime", "QOSMaxGRESPerUser", "QOSMaxJobsPerUserLimit")
RESOLVED += ("QOSGrpGRES", "AssocGrpCPURunMinutesLimit", "AssocGrpBillingRunMinutes", "AssocMaxJobsLimit")
RESOLVED += ("JobArrayTaskLimit", "ReqNodeNotAvail, UnavailableNodes:n1")


def details(project, reasons):
    """Reason -> what the status says of a job that waits for it; at most nine."""
    for number, (config, reason) in enumerate(zip(CONFIGS, reasons, strict=False), 100):
        project.set_job(str(number), "PENDING", f"00_baseline/gsm8k/{config}", reason)
    return dict(zip(reasons, project.statuses().values(), strict=False))


@pytest.mark.parametrize("reasons", [BLOCKED[:7], BLOCKED[7:]], ids=["limits", "requests"])
def test_a_job_that_waiting_does_not_start_is_blocked(project, reasons):
    for number, (reason, detail) in enumerate(details(project, reasons).items(), 100):
        assert detail.startswith("blocked: ")
        assert f"({reason}), job {number}; " in detail
    [entry] = json.loads(project.run("--status", "--json", "k1_first").stdout)["configurations"]
    assert entry["state"] == "blocked"
    assert project.run("--status", "--check", "k1_first").returncode == 3


@pytest.mark.parametrize("reasons", [RESOLVED[:7], RESOLVED[7:]], ids=["first", "second"])
def test_what_time_resolves_is_not_blocked(project, reasons):
    found = details(project, reasons)
    assert list(found.values()) == [f"queued, job {number}, {reason}" for number, reason in enumerate(reasons, 100)]


def test_run_offers_the_submission_that_puts_it_right_and_submits_nothing_twice(project):
    for number, config in enumerate(("k1_first", "k2_middle"), 5):
        project.set_job(str(number), "PENDING", f"00_baseline/gsm8k_limit_9/{config}", "QOSMaxWallDurationPerJobLimit")
    words = ["--limit", "9", "--threshold", "0.9", "k1_first", "k2_middle"]
    result = project.run(*words, SBATCH_QOS="embers")
    assert result.returncode == 0
    assert result.stdout.count("not submitted, blocked: its wall time") == 2
    offered = result.stderr.split("submitted anew: ")[1].strip()
    rest = "--experiment 00_baseline --task gsm8k --limit 9"
    assert offered == f"scancel 5 6; bash sbatch/run.sh {rest} --model_args threshold=0.9 k1_first k2_middle"
    assert project.calls("sbatch") == []
    result = project.bash("-c", offered, SBATCH_QOS="embers")
    assert result.returncode == 0, result.stderr
    assert settings(project)["SBATCH_TIMELIMIT"] == "08:00:00"
    assert sum(name.startswith("00_baseline/gsm8k_limit_9/") for name in project.submitted()) == 2


def test_a_held_job_is_released_not_submitted_anew(project):
    project.set_job("5", "PENDING", "00_baseline/gsm8k/k1_first", "JobHeldUser")
    result = project.run("k1_first")
    assert "scontrol release 5" in result.stdout
    assert "submitted anew" not in result.stderr


# -- parts -------------------------------------------------------------------------------------------------------------
def test_status_tells_which_part_of_how_many_a_job_is(project):
    folder = project.folder("k1_first")
    progress = {"answered": 500, "total": 1319, "new_tokens": 50000, "seconds_generating": 1000.0}
    progress |= {"segment_answered": 100, "segment_seconds": 3600.0}  # 8.2 h are left
    (folder / "progress.rank0.json").write_text(json.dumps(progress))
    (folder / "answers" / "key").mkdir(parents=True)
    for segment in ("001", "002"):
        (folder / "answers" / "key" / f"{segment}.rank0.jsonl").write_text("{}\n")
    job = project.state / "jobs" / "7"
    job.write_text(f"RUNNING|None|00_baseline/gsm8k/k1_first|{project.root}|embers|8:00:00|7:00:00||gts-lab\n")
    assert project.statuses()["k1_first"].endswith(" min left, part 2 of about 3")
    job.write_text(f"RUNNING|None|00_baseline/gsm8k/k1_first|{project.root}|embers|1-0|23:00:00||gts-lab\n")
    assert project.statuses()["k1_first"].endswith(" min left, part 2 of about 2")
    project.set_job("7", "PENDING", "00_baseline/gsm8k/k1_first", "Priority")
    assert project.statuses()["k1_first"] == "queued, job 7, Priority, part 3"
    project.set_job("7", "RUNNING", "00_baseline/gsm8k/k1_first")
    shutil.rmtree(folder / "answers")
    assert project.statuses()["k1_first"].endswith(" min left")


# -- costs -------------------------------------------------------------------------------------------------------------
def test_what_the_jobs_may_cost_is_said_before_they_are_submitted(project):
    result = project.run("--dry-run", "--threshold", "1")
    assert (
        "9 jobs, 1 rtx_6000 each, 12 h of wall time: 108 GPU hours at most (the account must cover all of them "
        "before the jobs start); at best 17, by the roofline\n" in result.stderr
    )
    result = project.run("--dry-run", "k1_first", SBATCH_QOS="embers")
    assert "1 job, 1 rtx_6000, 8 h of wall time: 8 GPU hours at most; at best 0.78" in result.stderr


def measured(project, config="k1_first", gpu="Quadro RTX 6000", seconds=8640.0, task="gsm8k", **changes):
    project.summary(config, gpu=gpu, throughput={"tokens_per_second": 49.5, "seconds_generating": seconds}, **changes)


def test_auto_takes_the_roofline_with_a_margin_or_what_was_measured_with_a_smaller_one(project):
    project.run("--hours", "auto", "k2_first", SBATCH_QOS="embers")
    assert settings(project)["SBATCH_TIMELIMIT"] == "03:30:00"  # 20 min + 4 x 47 min
    measured(project)
    result = project.run("--hours", "auto", "k2_middle", SBATCH_QOS="embers")
    assert settings(project, "2")["SBATCH_TIMELIMIT"] == "04:00:00"  # 20 min + 1.5 x 2.4 h
    assert "about 2.4, as gsm8k/k1_first measured" in result.stderr
    measured(project, seconds=36000.0)
    result = project.run("--hours", "auto", "k2_last", SBATCH_QOS="embers")
    assert settings(project, "3")["SBATCH_TIMELIMIT"] == "08:00:00"
    assert "8 h of wall time asked: embers ends jobs after 8 h" in result.stderr
    assert "One may take 15.5 h, that is 2 jobs, each continuing the one before" in result.stderr
    result = project.run("--hours", "auto", "k3_last", "--continue", "0", SBATCH_QOS="embers")
    assert "that is 2 jobs: --continue 1" in result.stderr


def test_a_speed_of_something_else_is_not_taken(project):
    measured(project, "k1_first", seconds=36000.0, gpu="NVIDIA H100 80GB HBM3")
    measured(project, "k1_middle", seconds=36000.0, model_args={"model_path": "another/model", "threshold": 0.9})
    measured(project, "k1_last", seconds=36000.0, num_samples=None)
    assert "by the roofline" in project.run("--dry-run", "k2_first").stderr


def test_auto_is_refused_where_nothing_tells_a_time(project):
    named = "--hours auto: nothing here tells how long gsm8k with some/model on rtx_6000 takes; --hours H"
    assert named in refused(project.run("--hours", "auto", "--model", "some/model", "k1_first"))
    assert "GPU hours at most (the account" in project.run("--dry-run", "--model", "some/model", "k1_first").stderr


# -- GPUs --------------------------------------------------------------------------------------------------------------
def starts(project, **times):
    for gpu, time in times.items():
        (project.state / f"sbatch.start.{gpu}").write_text(time)


def test_a_named_gpu_is_asked_for_and_its_memory_follows_the_nodes(project):
    assert project.run("--gpu", "L40S", "k1_first").returncode == 0
    assert settings(project)["SBATCH_GRES"] == "gpu:l40s:1"
    assert "SBATCH_MEM_PER_NODE" not in settings(project)  # 64 of 87 GB a GPU
    project.run("--gpu", "rtx_6000", "k1_middle")
    assert settings(project, "2")["SBATCH_MEM_PER_NODE"] == "47750"
    project.run("--gpu", "rtx_6000", "k1_last", SBATCH_MEM_PER_NODE="8000")
    assert settings(project, "3")["SBATCH_MEM_PER_NODE"] == "8000"


def test_a_gpu_that_cannot_run_it_is_refused_with_the_reason(project):
    before = project.written()
    valid = "valid: rtx_6000 v100 l40s a100 h100 h200 rtx_pro_6000_blackwell, several"
    cases = [
        ("rtx_6000,v100", "--gpu v100: the pinned torch 2.13.* has no code for its capability 7.0"),
        ("gtx_1080", f"--gpu: no type 'gtx_1080'; {valid}"),
        ("", "--gpu: no type ''"),
        ("a100,", "--gpu: no type ''"),
    ]
    for word, named in cases:
        assert named in refused(project.run("--gpu", word, "k1_first"))
    assert project.written() == before


def test_a_model_that_does_not_fit_is_refused_with_its_size(project):
    large = {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "bd_size": 32,
    }
    large |= {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": 0}
    (project.root / "large").mkdir()
    (project.root / "large" / "config.json").write_text(json.dumps(large))
    named = refused(project.run("--gpu", "a100", "--model", "large", "k1_first"))
    assert "--gpu a100: 145.4 GB of weights do not fit into its 80 GB" in named


def test_the_type_that_starts_soonest_is_taken_and_slurms_reply_is_told(project):
    starts(project, rtx_6000="2026-11-26T10:00:00", a100="2026-11-25T09:30:00", h100="2026-11-25T09:30:01")
    result = project.run("--gpu", "soonest", "k1_first")
    assert settings(project)["SBATCH_GRES"] == "gpu:a100:1"
    assert (
        "GPU a100 starts soonest, at 2026-11-25T09:30:00 (rtx_6000: 2026-11-26T10:00:00; l40s: Requested node con"
        in (result.stderr)
    )
    asked = [line for line in project.calls("sbatch") if "--test-only" in line]
    assert len(asked) == 6  # all but the v100
    result = project.run("--gpu", "rtx_6000,h100", "--dry-run", "--limit", "5", "k1_first")
    assert "GPU h100 starts soonest, at 2026-11-25T09:30:01 (rtx_6000: 2026-11-26T10:00:00; h100: " in result.stderr
    assert "SBATCH_GRES=gpu:h100:1 " in result.stdout


def test_where_no_type_would_start_nothing_is_submitted(project):
    named = refused(project.run("--gpu", "soonest", "k1_first"))
    assert (
        "--gpu soonest: Slurm would start none of them; rtx_6000: Requested node configuration is not available; "
        in named
    )
    assert project.submitted() == []


def test_a_table_stays_on_the_gpu_that_it_has_and_says_where_it_is_mixed(project):
    starts(project, rtx_6000="2026-11-26T10:00:00", a100="2026-11-25T09:30:00")
    measured(project, gpu="Quadro RTX 6000")
    result = project.run("--gpu", "soonest", "k1_middle")
    assert "GPU rtx_6000, as the table's other configurations have" in result.stderr
    assert settings(project)["SBATCH_GRES"] == "gpu:rtx_6000:1"
    assert "mixed" not in project.run("--status").stdout.lower()
    result = project.run("--gpu", "a100", "k1_last")
    assert "the table will be mixed: other configurations are on rtx_6000, these on a100" in result.stderr
    frame = project.run("--status").stdout
    assert "Mixed GPUs, whose speeds and roundings differ: 2 on rtx_6000, 1 on a100\n" in frame
