"""What local.sh shows while it evaluates, on a terminal and elsewhere, and what it says after Ctrl-C."""

from __future__ import annotations

import json

import pexpect
import pytest
from script_project import Project
from test_jobs import wait_until

from fast_dllm.record.batches import BatchRecord

WORDS = ["sbatch/local.sh", "--model", "tiny", "--limit", "5", "--config", "k1_first,k1_middle"]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


def on_a_terminal(project, words: list[str] = WORDS, **given: str) -> pexpect.spawn:
    environment = project.environment | given
    return pexpect.spawn(
        "bash", words, cwd=str(project.root), env=environment, dimensions=(24, 80), encoding="utf-8", timeout=60
    )


def test_what_the_evaluation_says_is_in_the_log_alone(project):
    accelerate = project.state / "bin" / "fake_accelerate"
    noise = "echo INFO lm_eval says this\necho WARNING and this >&2\n"
    accelerate.write_text(accelerate.read_text().replace("set -euo pipefail\n", "set -euo pipefail\n" + noise, 1))
    result = project.bash(*WORDS)
    [log] = (project.root / "logs").rglob("local_*.log")
    assert log.read_text() == "INFO lm_eval says this\nWARNING and this\n"
    assert "lm_eval says this" not in result.stdout + result.stderr
    assert "and this" not in result.stdout + result.stderr
    assert str(log.relative_to(project.root)) in result.stderr


def test_on_a_terminal_a_bar_moves(project):
    shown = on_a_terminal(project, FAKE_EVAL="wait")
    shown.expect("\rk1_first   ░{20}  loading the model")
    folder = project.folder("k1_first", "gsm8k_limit_5")
    told = {"answered": 2, "total": 5, "new_tokens": 90, "seconds_generating": 3.0}
    (folder / "progress.rank0.json").write_text(json.dumps(told | {"segment_answered": 2, "segment_seconds": 4.0}))
    shown.expect("\rk1_first   █{8}░{12}  2/5  30.0 tok/s  6 s left")
    (project.state / "go").touch()
    shown.expect("\rk1_first   █{20}  5/5  50.0% ± 1.0  in ")
    shown.expect(pexpect.EOF)
    assert shown.wait() == 0


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(project):
    shown = on_a_terminal(project, FAKE_EVAL="wait")
    shown.expect("loading the model")
    folder = project.folder("k1_first", "gsm8k_limit_5")
    wait_until((folder / "answers" / "key").is_dir)
    answers = BatchRecord({"a": "1", "b": "2"}).to_line() + b'{"ans'
    (folder / "answers" / "key" / "001.rank0.jsonl").write_bytes(answers)
    shown.sendintr()
    shown.expect(pexpect.EOF)
    assert shown.wait() == 130
    told = shown.before.splitlines()[-1]
    command = "bash sbatch/local.sh --model tiny --limit 5 --config k1_first,k1_middle"
    kept = "0 of 2 configurations and 2 answers of k1_first"
    assert told == f"interrupted; kept: {kept}. To go on: {command}"
    statuses = project.statuses("--limit", "5", "--model", "tiny")
    assert statuses["k1_first"] == "pending: interrupted"
    assert statuses["k1_middle"] == "pending"  # never began


@pytest.mark.parametrize(("names", "complete"), [("k1_first", "k1_first is"), (WORDS[-1], "all 2 configurations are")])
def test_ctrl_c_after_the_last_answer_says_that_the_result_is_complete(project, names, complete):
    shown = on_a_terminal(project, [*WORDS[:-1], names], FAKE_EVAL="linger")
    for name in names.split(","):
        shown.expect(f"\r{name} .* 5/5  50.0%")
    shown.sendintr()
    shown.expect(pexpect.EOF)
    assert shown.wait() == 130
    report = "bash sbatch/run.sh --report --experiment 00_baseline --task gsm8k --limit 5"
    assert f"interrupted; {complete} complete. What these results show: {report}" in shown.before.replace("\r\n", "\n")
    assert not list((project.root / "results").rglob("failure.json"))
    assert project.statuses("--limit", "5", "--model", "tiny", "k1_first") == {"k1_first": "✓ "}
