"""sbatch/run.sh on a pretended cluster: what it calls complete, what it submits, and what it refuses."""

import itertools
import json
import os
import resource
import subprocess
from types import SimpleNamespace

import pytest
from script_project import CONFIGS, Project, old_pythons, system_tools

from fast_dllm.errors import UsageError
from fast_dllm.spec.files import check_writable

LINE = "=" * 77
HOSTILE = ["", "a b", "$(touch pwned)", "a\nb", "../00_baseline", "-x", "é"]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / 'lab\'s  "own" $project; folder')


@pytest.fixture
def no_cluster(tmp_path):
    return Project(tmp_path / "project", slurm=False)


def write_json(path, **content):
    path.write_text(json.dumps({"schema_version": 1} | content, indent=2) + "\n")


# -- status ------------------------------------------------------------------------------------------------------------
def test_the_frame_shows_every_state_in_matrix_order(project):
    project.summary("k1_first")
    project.set_job("123", "RUNNING", "00_baseline/gsm8k/k1_middle")
    write_json(
        project.folder("k1_middle") / "progress.rank0.json",
        answered=412,
        total=1319,
        new_tokens=48900,
        seconds_generating=1000.0,
        segment_answered=412,
        segment_seconds=680.0,
    )
    project.set_job("124", "PENDING", "00_baseline/gsm8k/k1_last", "Priority")
    log = "logs/00_baseline/gsm8k/k2_middle/slurm_119.log"
    write_json(project.folder("k2_middle") / "job.json", job_id="119", log=log)
    write_json(project.folder("k2_middle") / "failure.json", **{"class": "gpu_oom"}, job_id="119", log=log)
    project.summary("k2_last", generation_code_sha256="0" * 64)
    project.summary("k3_first", num_samples=1318)
    project.summary("k3_middle", top="artifacts")
    result = project.run("--status")
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        LINE,
        "Experiment Status: 00_baseline / gsm8k",
        LINE,
        "  ✓ k1_first",
        "  ✗ k1_middle (running, job 123, 412/1319, 48.9 tok/s, ~25 min left)",
        "  ✗ k1_last (queued, job 124, Priority)",
        "  ✗ k2_first (pending)",
        f"  ✗ k2_middle (failed: out of GPU memory, job 119, log: {log})",
        "  ✗ k2_last (stale: generation code changed since it ran)",
        "  ✗ k3_first (corrupt: 1318 of 1319 samples)",
        "  ✓ k3_middle (only in artifacts/)",
        "  ✗ k3_last (pending)",
        LINE,
        "Completed: 2 / 9",
        LINE,
    ]
    assert result.stderr == ""


def test_status_needs_no_slurm_and_no_venv_and_is_quick(no_cluster):
    for config in CONFIGS:
        no_cluster.summary(config)
    # processor time: what else runs on the machine does not count
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    statuses = no_cluster.statuses()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert statuses == dict.fromkeys(CONFIGS, "✓ ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert not (no_cluster.state / "uv.log").exists()


def test_without_any_python_one_line_says_so(no_cluster):
    no_cluster.environment["PATH"] = str(system_tools(without="python"))
    before = no_cluster.written()
    for script in ("run.sh", "local.sh", "baseline.sh", "prefetch.sh"):
        result = no_cluster.bash(f"sbatch/{script}", "--task", "gsm8k")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"{script}: no python3 from 3.8 on is found")
    assert no_cluster.written() == before


def test_where_path_has_no_python_the_venvs_answers(no_cluster):
    no_cluster.summary("k1_first")
    assert no_cluster.bash("sbatch/venv.sh").returncode == 0
    no_cluster.environment["PATH"] = str(system_tools(without="python"))
    assert no_cluster.statuses()["k1_first"] == "✓ "


@pytest.mark.slow
def test_the_oldest_python_will_do(no_cluster, tmp_path):
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python older than 3.10 here, neither pyenv's nor on PATH")
    (no_cluster.state / "bin" / "python3").write_text(f'#!/bin/sh\nexec {pythons[0]} "$@"\n')
    (no_cluster.state / "bin" / "python3").chmod(0o755)
    no_cluster.summary("k1_first", accuracy=2)
    assert no_cluster.statuses()["k1_first"] == "corrupt: the accuracy is '2'"
    assert no_cluster.run("--help").returncode == 0
    assert json.loads(no_cluster.run("--status", "--json").stdout)["total"] == 9
    assert no_cluster.run("--task", "x").returncode == 2
    assert no_cluster.bash("sbatch/local.sh", "--limit", "5", "--matrix").returncode == 0
    result = no_cluster.bash("sbatch/local.sh", "--limit", "5", "--matrix", "--threshold", ".5", FAKE_EVAL="fail:x")
    assert result.returncode == 1
    assert no_cluster.statuses("--limit", "5")["k1_first"] == "✓ model tiny"


# The changes to a whole summary, and the reason that the status then gives.
OTHER_THINGS = [
    ({"schema_version": 2}, "schema version '2', not 1"),
    ({"experiment": "01_other"}, "it is of experiment '01_other'"),
    ({"task": "mmlu"}, "it is of task 'mmlu'"),
    ({"config": "plain"}, "it is of configuration 'plain'"),
    ({"limit": 1319}, "it has limit '1319'"),
    ({"num_samples": 1318}, "1318 of 1319 samples"),
    ({"num_samples": 10, "num_samples_expected": 10}, "10 samples, the task has 1319"),
    ({"num_samples": None}, "null of 1319 samples"),
    ({"accuracy": None}, "the accuracy is 'null'"),
    ({"accuracy": "0.7"}, "the accuracy is '\"0.7\"'"),
    ({"accuracy": 7.3}, "the accuracy is '7.3'"),
    ({"accuracy": float("nan")}, "not valid JSON, unexpected N"),
    ({"accuracy": True}, "the accuracy is 'true'"),
]
# Whole files that are no summary, and the beginning of the reason.
NO_SUMMARY = [(text, "") for text in ("[]", "1", "{}", "{}{}", "<html>404</html>", '{"a": 1,}', "\0" * 300, "null")]
NO_SUMMARY += [
    ("[" * 100_000, "not valid JSON, it is nested deeper than 32 levels"),
    ('{"num_samples": ' + "9" * 400 + "}", "not valid JSON, a number of 400 digits"),
    ('{"accuracy": 1e999}', "not valid JSON, the number 1e999 is too large"),
    ('{"task": "\\ud800"}', "not valid JSON, half a surrogate pair in a text"),
    ('{"schema_version": 1, "num_samples": -3}', "num_samples is -3, not a whole number of at least 0"),
    ('{"schema_version": 1, "task": "../../victim"}', 'task is "../../victim", not a name that a file can have'),
    ("{" + " " * (5 * 2**20) + "}", "not valid JSON, it has more than 4194304 bytes"),
    ('{"schema_version": 1, "gpu": ["\x1b[31m"]}', "not valid JSON, unexpected '\\x1b' in line 1"),
    ('{"schema_version": "\\u001b[31m"}', "schema version '\\x1b[31m', not 1"),
]


def test_a_damaged_or_foreign_summary_is_corrupt_and_takes_nothing_else_away(project):
    whole = json.loads(project.summary("k1_first").read_text())
    cases = [(json.dumps(whole | {"config": None} | changes), reason) for changes, reason in OTHER_THINGS]
    cases += NO_SUMMARY
    cut_off = json.dumps(whole)
    cases += [(cut_off[:length], "") for length in (0, 1, 20, len(cut_off) // 2, len(cut_off) - 1)]
    for start in range(0, len(cases), 8):
        batch = dict(zip(CONFIGS[1:], cases[start : start + 8], strict=False))
        for config, (text, _) in batch.items():
            text = text.replace('"config": null', f'"config": "{config}"')
            (project.folder(config) / "summary.json").write_text(text)
        statuses = project.statuses()
        for config, (_, reason) in batch.items():
            assert statuses[config].startswith(f"corrupt: {reason}")
        assert "\x1b" not in "".join(statuses.values())
        assert statuses["k1_first"] == "✓ "
    assert project.run("--dry-run").returncode == 0


def test_a_result_that_lm_eval_was_given_other_settings_for_is_stale(project):
    others = [
        ({"gen_kwargs": {"max_gen_toks": 12}}, "gen_kwargs max_gen_toks=12, not None"),
        ({"system_instruction": "Be\x1b[31m brief."}, "system_instruction Be\\x1b[31m brief., not None"),
        ({"chat_template": False}, "chat_template False, not True"),
        ({"fewshot_as_multiturn": False}, "fewshot_as_multiturn False, not True"),
        ({"samples": {"gsm8k": [0, 5]}}, "samples gsm8k=[0, 5], not None"),
        ({"seeds": [1, 1234, 1234, 1234]}, "seeds [1, 1234, 1234, 1234], not [0, 1234, 1234, 1234]"),
    ]
    for config, (changes, _) in zip(CONFIGS, others, strict=False):
        project.summary(config, **changes)
    project.summary("k3_last", gen_kwargs=None, samples=None, chat_template=True, fewshot_as_multiturn=True)
    statuses = project.statuses()
    for config, (_, reason) in zip(CONFIGS, others, strict=False):
        assert statuses[config] == f"stale: it ran with {reason}"
    assert statuses["k3_last"] == "✓ "


def test_a_damaged_record_of_a_job_is_named_and_takes_nothing_else_away(project):
    damaged = [
        ("job.json", '{"job_id": "7", "shards": "four"}', 'shards is "four", not a whole number up to 1000'),
        ("job.json", '{"job_id": "7", "shards": 1000000000}', "shards is 1000000000, not a whole number up to 1000"),
        ("job.json", '{"job_id": "7", "gpus": -1}', "gpus is -1, not a whole number up to 16"),
        ("job.json", "[" * 100_000, "it is nested deeper than 32 levels"),
        ("failure.json", '{"class": "\\ud800"}', "half a surrogate pair in a text"),
        ("failure.json", '{"class": 1e999}', "the number 1e999 is too large"),
    ]
    project.summary("k1_first")
    for config, (name, text, _) in zip(CONFIGS[1:], damaged, strict=False):
        (project.folder(config) / name).write_text(text)
    for in_queue in (False, True):
        if in_queue:
            for number, config in enumerate(CONFIGS[1 : len(damaged) + 1]):
                project.set_job(f"7{number}_0", "RUNNING", f"00_baseline/gsm8k/{config}")
        statuses = project.statuses()
        for config, (name, _, reason) in zip(CONFIGS[1:], damaged, strict=False):
            assert f"; {name} cannot be used: {reason}" in statuses[config]
        assert statuses["k1_first"] == "✓ "
        result = project.run("--dry-run", "--shards", "2")
        assert result.returncode == 0, result.stderr


def test_a_record_from_elsewhere_does_not_move_the_cursor(project):
    folder = project.folder("k1_first")
    write_json(folder / "job.json", job_id="7", log="logs/\x1b[2Jx.log")
    write_json(folder / "failure.json", **{"class": "\x1b[31mred", "job_id": "7", "log": "\x1b]0;title\x07"})
    result = project.run("--status")
    assert "\x1b" not in result.stdout
    assert "failed: \\x1b[31mred, job 7, log: \\x1b]0;title\\x07" in result.stdout
    assert json.loads(project.run("--status", "--json").stdout)["configurations"][0]["state"] == "failed"


def test_a_limited_summary_is_complete_only_under_its_own_limit(project):
    limited = project.summary("k1_first", limit=10, num_samples=10, num_samples_expected=10)
    assert project.statuses()["k1_first"] == "corrupt: it has limit '10'"
    limited.rename(project.folder("k1_first", task="gsm8k_limit_10") / "summary.json")
    assert project.statuses("--limit", "10")["k1_first"] == "✓ "
    assert project.statuses("--limit", "11")["k1_first"] == "pending"


def test_another_threshold_has_a_folder_of_its_own_and_another_model_is_stale(project):
    project.summary("k1_first")
    project.summary("k1_first+threshold=0.8", model_args={"model_path": "tiny", "threshold": 0.8})
    assert project.statuses("--threshold", "0.90")["k1_first"] == "✓ "
    assert project.statuses("--threshold", ".80")["k1_first+threshold=0.8"] == "✓ model tiny"
    model = "Efficient-Large-Model/Fast_dLLM_v2_7B"
    assert project.statuses("--model", model)["k1_first"] == "✓ "
    assert project.statuses("--model", "tiny")["k1_first"] == f"stale: it ran with model {model}, not tiny"
    project.run("--model", "tiny", "k1_first")
    assert project.submitted() == []


def test_a_result_that_ran_with_other_arguments_than_its_folder_says_is_stale(project):
    project.summary("k1_first", model_args={"model_path": "tiny", "threshold": 0.9})
    project.summary("k1_middle", model_args={"model_path": "tiny", "threshold": 0.8, "small_block_size": 16})
    statuses = project.statuses()
    assert statuses["k1_first"] == "✓ model tiny"
    assert statuses["k1_middle"] == "stale: it ran with threshold 0.8, not 0.9, and small_block_size 16, not 8"


def test_the_status_shows_of_several_jobs_the_running_one_and_none_of_another_folder(project):
    project.set_job("5", "RUNNING", "00_baseline/gsm8k/k2_first", folder="/somewhere/else")
    project.set_job("7", "PENDING", "00_baseline/gsm8k/k1_first", "Dependency")
    project.set_job("6", "RUNNING", "00_baseline/gsm8k/k1_first")
    project.set_job("8", "PENDING", "00_baseline/gsm8k/k1_middle", "Dependency")
    project.summary("k1_last")
    project.set_job("9", "PENDING", "00_baseline/gsm8k/k1_last", "DependencyNeverSatisfied")
    statuses = project.statuses()
    assert statuses["k1_last"] == "✓ "
    assert statuses["k1_first"] == "running, job 6"
    assert statuses["k1_middle"] == "queued, job 8, Dependency"
    assert statuses["k2_first"] == "pending"


def test_a_job_that_had_no_chance_to_write_is_classified_by_the_accounting(project):
    ends = {
        "TIMEOUT": "time limit reached",
        "PREEMPTED": "preempted",
        "NODE_FAIL": "node failure",
        "OUT_OF_MEMORY": "out of host memory",
        "CANCELLED by 1000": "cancelled",
        "FAILED:1:0": "code error",
        "FAILED:0:9": "killed by signal 9",
        "COMPLETED": "ended without a result",
    }
    for number, (config, state) in enumerate(zip(CONFIGS, ends, strict=False), 10):
        write_json(project.folder(config) / "job.json", job_id=str(number), log="logs/a.log")
        # what an earlier job left is not this job's
        write_json(project.folder(config) / "failure.json", **{"class": "gpu_oom"}, job_id="8", log="logs/old.log")
        project.set_job(str(number), state, f"00_baseline/gsm8k/{config}")
    statuses = project.statuses()
    assert [len(project.calls(command)) for command in ("squeue", "sacct")] == [1, 1], "one question for all"
    for number, (config, text) in enumerate(zip(CONFIGS, ends.values(), strict=False), 10):
        assert statuses[config] == f"failed: {text}, job {number}, log: logs/a.log"


def test_without_accounting_such_a_job_is_known_by_its_recorded_id(project):
    write_json(project.folder("k1_first") / "job.json", job_id="9", log="logs/a.log")
    (project.state / "sacct.fail").write_text("sacct: error: Slurm accounting storage is disabled\n")
    assert project.statuses()["k1_first"] == "failed: ended without a result, job 9, log: logs/a.log"


def test_check_fails_until_everything_is_complete(project):
    for config in CONFIGS[:-1]:
        project.summary(config)
    assert project.run("--status", "--check").returncode == 3
    assert project.run("--status").returncode == 0
    project.summary(CONFIGS[-1])
    assert project.run("--check", "--status").returncode == 0


def test_status_as_json_says_the_same(project):
    project.summary("k1_first")
    project.set_job("4", "PENDING", "00_baseline/gsm8k/k1_middle", 'a "reason" \\ of its own')
    status = json.loads(project.run("--status", "--json").stdout)
    assert (status["completed"], status["total"], status["limit"]) == (1, 9, None)
    assert [entry["config"] for entry in status["configurations"]] == CONFIGS
    assert status["configurations"][0] == {
        "config": "k1_first", "state": "complete", "detail": "", "job": "", "accuracy": 0.7369,
    }  # fmt: skip
    assert status["configurations"][1]["detail"] == 'queued, job 4, a "reason" \\ of its own'
    assert status["configurations"][2]["state"] == "pending"


# -- submission --------------------------------------------------------------------------------------------------------
def test_nine_jobs_are_submitted_once(project):
    (project.state / "sbatch.fail").write_text("sbatch: error: Invalid account or account/partition combination\n")
    result = project.run()
    assert result.returncode == 1
    assert "Invalid account" in result.stderr
    assert project.submitted() == []
    (project.state / "sbatch.fail").unlink()
    result = project.run()
    assert result.returncode == 0, result.stderr
    assert project.submitted() == [f"00_baseline/gsm8k/{config}" for config in CONFIGS]
    assert project.run().returncode == 0
    assert len(project.submitted()) == 9
    assert project.statuses()["k3_last"].startswith("queued, job ")


def test_the_submitted_command_is_this_one(project):
    project.run("--limit", "5", "--model", "tiny", "--continue", "1", "k2_middle")
    [snapshot] = (project.root / ".snapshots").iterdir()
    assert project.calls("sbatch") == [
        "sbatch --parsable --job-name=00_baseline/gsm8k_limit_5/k2_middle"
        " --output=logs/00_baseline/gsm8k_limit_5/k2_middle/slurm_%j.log"
        f" .snapshots/{snapshot.name}/sbatch/_job.sh --snapshot {snapshot.name} --experiment 00_baseline --task gsm8k"
        " --limit 5 --config k2_middle --model tiny --threshold 0.9 --continue 1"
    ]
    recorded = json.loads((project.folder("k2_middle", task="gsm8k_limit_5") / "job.json").read_text())
    assert recorded["job_id"] == "1"


def test_two_runs_at_once_submit_nine_jobs(project):
    command = ["bash", "sbatch/run.sh"]
    environment = project.environment | {"FAKE_SBATCH_SECONDS": "0.05"}
    runs = [subprocess.Popen(command, cwd=project.root, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert sorted(project.submitted()) == sorted(f"00_baseline/gsm8k/{config}" for config in CONFIGS)


def test_a_run_that_died_while_submitting_does_not_block_the_next(project):
    lock = project.root / "logs" / "00_baseline" / "gsm8k" / ".submit.0007"
    lock.mkdir(parents=True)
    (lock / "owner").write_text(f"{os.uname().nodename} 999999999\n")
    assert project.run("k1_first").returncode == 0
    assert len(project.submitted()) == 1


def test_only_what_is_missing_or_corrupt_is_submitted(project):
    project.summary("k1_first")
    project.summary("k1_middle", top="artifacts")
    project.summary("k1_last", generation_code_sha256="0" * 64)
    project.summary("k2_first", num_samples=3)
    project.set_job("50", "RUNNING", "00_baseline/gsm8k/k2_middle")
    result = project.run("--config", "k1_first,k1_middle,k1_last,k2_first,k2_middle,k2_last")
    assert sorted(project.submitted()) == [
        "00_baseline/gsm8k/k2_first", "00_baseline/gsm8k/k2_last", "00_baseline/gsm8k/k2_middle",
    ]  # fmt: skip
    assert (
        "k1_last: not submitted, stale: generation code changed since it ran (--force runs it again)" in result.stdout
    )


def test_force_runs_complete_ones_again_but_nothing_twice(project):
    project.summary("k1_first")
    project.set_job("50", "RUNNING", "00_baseline/gsm8k/k1_middle")
    result = project.run("--force", "k1_first", "k1_middle")
    assert result.returncode == 1
    assert "scancel 50" in result.stderr
    assert sorted(project.submitted()) == ["00_baseline/gsm8k/k1_first", "00_baseline/gsm8k/k1_middle"]
    assert project.statuses()["k1_first"] == "queued, job 1, Priority"


def test_nothing_is_submitted_while_the_queue_is_unknown(project):
    (project.state / "squeue.fail").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    result = project.run()
    assert result.returncode == 1
    assert "squeue failed, so nothing is submitted: slurm_load_jobs error" in result.stderr
    assert project.submitted() == []
    before = project.written()
    plan = project.run("--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.count("would be submitted") == len(CONFIGS)
    [unknown] = [line for line in plan.stderr.splitlines() if "slurm_load_jobs" in line]
    assert "the cluster cannot be asked" in unknown
    rehearsal = project.run("--rehearse")
    assert rehearsal.returncode == 1
    [unknown] = rehearsal.stderr.splitlines()
    assert "Slurm does not answer" in unknown
    assert "local.sh" in unknown
    assert project.written() == before
    assert project.statuses()["k1_first"] == "pending"  # status goes on with what it knows


def test_a_submission_that_failed_half_way_is_not_repeated(project):
    (project.state / "sbatch.fail_after_submit").touch()
    words = ("k1_first", "k1_middle")
    result = project.run(*words)
    assert result.returncode == 1
    assert "k1_first: sbatch failed: sbatch: error: Batch job submission failed: Socket timed out" in result.stderr
    (project.state / "sbatch.fail_after_submit").unlink()
    assert project.run(*words).returncode == 0
    assert len(project.submitted()) == 2


def test_a_configuration_that_is_evaluated_by_hand_is_not_submitted(project):
    lock = project.folder("k1_first") / ".lock.0001"
    lock.mkdir()
    (lock / "owner").write_text(f"{os.uname().nodename} {os.getpid()}\n")
    assert project.statuses()["k1_first"].startswith("running, no job: process ")
    project.run("k1_first")
    assert project.submitted() == []
    (lock / "released").touch()
    project.run("k1_first")
    assert len(project.submitted()) == 1


def test_a_dry_run_shows_the_commands_and_writes_nothing(project):
    project.summary("k1_first")
    before = project.written()
    result = project.run("--dry-run")
    assert result.returncode == 0
    assert project.written() == before
    assert project.calls("sbatch") == []
    assert "  k1_first: not submitted, complete (--force runs it again)\n" in result.stdout
    assert "k1_middle: would be submitted (pending)" in result.stdout
    assert result.stdout.count("sbatch --parsable") == 8


def test_without_slurm_submitting_says_what_to_do_instead(no_cluster):
    result = no_cluster.run()
    assert result.returncode == 1
    assert "sbatch/local.sh" in result.stderr
    assert no_cluster.run("--dry-run").returncode == 0


def test_cluster_settings_reach_sbatch_and_the_callers_environment_wins(project):
    (project.state / "bin" / "sbatch").unlink()
    fake = project.state / "bin" / "sbatch"
    fake.write_text(f'#!/usr/bin/env bash\nenv | grep ^SBATCH_ >>"{project.state}/seen"\necho 1\n')
    fake.chmod(0o755)
    settings = "# the lab's\n\nSBATCH_ACCOUNT=gts-lab\r\nSBATCH_QOS=embers\nSBATCH_COMMENT=$(touch pwned) 'x'\n"
    (project.root / "sbatch" / "cluster.env").write_bytes(settings.encode())
    assert project.run("k1_first", SBATCH_QOS="inferno").returncode == 0
    seen = set((project.state / "seen").read_text().splitlines())
    assert seen == {"SBATCH_ACCOUNT=gts-lab", "SBATCH_QOS=inferno", "SBATCH_COMMENT=$(touch pwned) 'x'"}
    assert not (project.root / "pwned").exists()
    example = (project.root / "sbatch" / "cluster.env.example").read_text()
    (project.root / "sbatch" / "cluster.env").write_text(example.replace("#SBATCH", "SBATCH").replace("#HF", "HF"))
    assert project.run("--dry-run", "k1_middle").returncode == 0
    (project.root / "sbatch" / "cluster.env").write_text("export SBATCH_ACCOUNT=x\n")
    result = project.run("k1_first")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


# -- what users type ---------------------------------------------------------------------------------------------------
OPTIONS = ["--task", "--experiment", "--config", "--limit", "--threshold", "--model", "--model_args", "--num_fewshot"]
OPTIONS += ["--continue", None]
# In the default tests each option meets one hostile word, and each word at least one option.
PAIRS = [(option, HOSTILE[place % len(HOSTILE)]) for place, option in enumerate(OPTIONS)]
OTHER_PAIRS = [pair for pair in itertools.product(OPTIONS, HOSTILE) if pair not in PAIRS]


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(OTHER_PAIRS, marks=pytest.mark.slow)], ids=["each", "all"])
def test_a_wrong_word_is_one_line_exit_2_and_nothing_written(project, pairs):
    before = project.written()
    for option, word in pairs:
        result = project.run(*([option] if option else []), word)
        assert (result.returncode, result.stdout) == (2, ""), (option, word)
        assert result.stderr.count("\n") == 1, result.stderr
    assert project.written() == before
    assert project.calls("sbatch") == []


def test_a_wrong_word_is_answered_with_the_valid_ones(project):
    tasks = "gsm8k mmlu gpqa_main_n_shot minerva_math ifeval toy_math"
    cases = [
        (["--task", "gsm8k,mmlu"], "no task named 'gsm8k,mmlu'"),
        (["--task", "gsm9k"], tasks),
        (["--experiment", "02_none"], "00_baseline 01_other"),
        (["--config", "k4_first"], " ".join(CONFIGS)),
        (["k2_middel"], " ".join(CONFIGS)),
        (["--statsu"], "--status --check --json --dry-run --rehearse --force --limit --task --experiment"),
        (["--limit"], "--limit needs a value"),
        (["--limit", "1.5"], "a whole number"),
        (["--threshold", "2"], "from 0 to 1"),
        (["--model", "nosuchmodel"], "neither 'tiny', nor a folder, nor a hub id"),
        (["--model", "."], "no config.json in the folder"),
        (["--check"], "go with --status"),
    ]
    for arguments, named in cases:
        result = project.run(*arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), arguments
        assert named in result.stderr


def test_a_script_is_called_through_a_link_from_another_folder(project, tmp_path):
    project.summary("k1_first")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for script in ("run.sh", "local.sh"):
        (elsewhere / script).symlink_to(project.root / "sbatch" / script)
    status = subprocess.run(
        ["bash", "./run.sh", "--status"], cwd=elsewhere, env=project.environment, capture_output=True, text=True
    )
    assert (status.returncode, status.stderr) == (0, "")
    assert "  ✓ k1_first\n" in status.stdout
    words = ["bash", "./local.sh", "--limit", "5", "--model", "tiny"]
    assert subprocess.run(words, cwd=elsewhere, env=project.environment, capture_output=True).returncode == 0
    assert "✓" in project.statuses("--limit", "5", "plain")["plain"]


def test_results_that_cannot_be_written_are_one_line_and_nothing_is_begun(project):
    # a file where a folder should be: permissions do not stop a test that root runs
    (project.root / "results").write_text("")
    before = project.written()
    words = ["--task", "gsm8k", "--limit", "5", "--model", "tiny"]
    folder = " ".join(repr(str(project.root / "results")).split())  # a line has no two spaces
    for script in ("run.sh", "local.sh", "baseline.sh"):
        result = project.bash(f"sbatch/{script}", *words)
        line = f"{script}: cannot write into {folder}: it is not a folder\n"
        assert (result.returncode, result.stdout, result.stderr) == (2, "", line)
    assert project.written() == before
    assert project.job("10", *words, "--config", "k1_first", "--continue", "2") == 2
    [line] = (project.root / "logs" / "job_10.log").read_text().splitlines()
    assert line == f"_job.sh: cannot write into {folder}: it is not a folder"
    assert project.calls("sbatch") == []  # nor is there a job that would continue it


def test_a_folder_that_refuses_later_is_one_line(project):
    (project.root / ".snapshots").write_text("")
    result = project.run("--limit", "5", "k1_first")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("run.sh: cannot use '")
    assert ".snapshots" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "has_right", "fault"), [(os.ST_RDONLY, True, "file system is read-only"), (0, False, "permission denied")]
)
def test_a_folder_that_is_read_only_is_named_with_its_fault(tmp_path, monkeypatch, flags, has_right, fault):
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    monkeypatch.setattr(os, "access", lambda path, mode: has_right)
    with pytest.raises(UsageError, match=f"'{tmp_path}': .*{fault}"):
        check_writable(tmp_path / "new" / "folder")


def test_artifacts_that_cannot_be_written_are_a_line_and_the_result_stays(project):
    (project.root / "artifacts").write_text("a file where a folder should be")
    assert project.job("10", "--config", "k1_first", "--limit", "5", "--model", "tiny") == 0
    log = (project.root / "logs" / "job_10.log").read_text()
    assert "artifacts/ cannot be written (" in log
    assert "Traceback" not in log
    assert "✓" in project.statuses("--limit", "5", "k1_first")["k1_first"]
