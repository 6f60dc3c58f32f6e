"""Summaries and the way they reach the disk."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fast_dllm.record import provenance
from fast_dllm.record.cost import Cost
from fast_dllm.record.scores import Score, score, scores
from fast_dllm.record.summary import Summary, read_summary
from fast_dllm.record.throughput import throughput
from fast_dllm.spec.files import write_json

ROOT = Path(__file__).resolve().parent.parent
NEW_KEYS = {
    "fewshot_as_multiturn",
    "system_instruction",
    "gen_kwargs",
    "samples",
    "num_shares",
    "graphs",
    "num_threads",
}
KINDS = ("prefill", "full", "sub", "commit", "reused", "score")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk quota exceeded")))
    with pytest.raises(OSError, match="quota"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_primary_metric_is_the_tasks_own():
    tables = {
        "gsm8k": {
            "exact_match,strict-match": 0.1,
            "exact_match,flexible-extract": 0.7,
            "exact_match_stderr,flexible-extract": 0.02,
        },
        "ifeval": {"inst_level_loose_acc,none": 0.9, "prompt_level_strict_acc,none": 0.6, "alias": "ifeval"},
        "unheard_of": {"f1,none": 0.4, "f1_stderr,none": "N/A", "alias": "unheard_of"},
        "nothing": {"alias": "nothing"},
    }
    assert score(tables, "gsm8k", 5) == Score(0.7, 0.02, "exact_match,flexible-extract", 5)
    assert score(tables, "ifeval", 5).metric == "prompt_level_strict_acc,none"
    assert score(tables, "unheard_of", 5) == Score(0.4, None, "f1,none", 5)
    assert score(tables, "nothing", 5) is None


def test_a_group_counts_the_questions_of_all_its_subtasks():
    found = {
        "results": {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}, "sub": {"acc,none": 0.25}},
        "groups": {"all": {"acc,none": 0.2, "acc_stderr,none": 0.1}},
        "group_subtasks": {"all": ["sub", "b"], "sub": ["a"], "a": [], "b": []},
    }
    by_name = scores(found, {"a": 3, "b": 7})
    assert by_name["all"] == Score(0.2, 0.1, "acc,none", 10)
    assert by_name["sub"].num_samples == 3


def test_throughput_counts_forwards_that_ran_and_steps_that_decided():
    forwards = dict(zip(KINDS, (2, 10, 20, 8, 30, 0), strict=True))
    report = throughput(Cost(requests=2, new_tokens=120, seconds_generating=4.0, forwards=forwards)).as_json()
    assert report["tokens_per_second"] == 30
    assert report["tokens_per_forward"] == 120 / 40
    assert report["tokens_per_step"] == 120 / 60
    assert "scored_requests" not in report
    assert "score" not in report["forwards"]
    scored = throughput(Cost(scored_requests=8, scored_tokens=8, seconds_scoring=2.0, forwards={"score": 2})).as_json()
    assert scored["requests_per_second"] == 4
    assert "new_tokens" not in scored


def test_a_summary_is_written_as_it_is_read(tmp_path):
    score = Score(0.25, None, "acc,none", 2)
    summary = Summary(task="mmlu", accuracy=0.5, subtasks={"mmlu_law": score}, host="n1", gen_kwargs={"until": ["x"]})
    summary.write(tmp_path)
    text = (tmp_path / "summary.json").read_text()
    assert '\n  "schema_version": 1,\n' in text  # top-level scalars are on lines of their own
    assert '\n  "accuracy": 0.5,\n' in text
    assert json.loads(text)["subtasks"] == {
        "mmlu_law": {"accuracy": 0.25, "accuracy_stderr": None, "metric": "acc,none", "num_samples": 2}
    }
    assert read_summary(tmp_path / "summary.json") == summary.sealed(tmp_path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("artifacts/*/*/*/summary.json"))[::10], ids=lambda p: p.parent.name)
def test_a_tracked_summary_is_read_whole_and_fits_its_seal(path):
    summary, content = read_summary(path), json.loads(path.read_text())
    assert not summary.is_edited
    written = summary.as_json()
    assert {name: written[name] for name in content} == content
    assert set(written) - set(content) <= NEW_KEYS


def test_a_folders_revision_changes_with_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = provenance.model_revision(str(tmp_path))
    assert first == provenance.model_revision(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert provenance.model_revision(str(tmp_path)) != first


def test_the_revision_of_a_hub_model_is_its_cached_commit(tmp_path, monkeypatch):
    import huggingface_hub.constants

    commit = "a" * 40
    repo = tmp_path / "models--someone--model"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert provenance.model_revision("someone/model") == commit
    assert provenance.model_revision("someone/else") is None


def test_a_snapshot_tells_the_commit_it_was_taken_from(tmp_path):
    assert provenance.code_state(tmp_path) == {"git_commit": None, "git_branch": None, "git_dirty": None}
    (tmp_path / "snapshot.json").write_text('{"git_commit": "abc", "git_branch": "main", "git_dirty": true}')
    assert provenance.code_state(tmp_path) == {"git_commit": "abc", "git_branch": "main", "git_dirty": True}


def git(folder, *words):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


def test_the_commit_of_another_users_repository_is_recorded(repository, monkeypatch, capsys):
    """One of a group runs the code of another one's folder."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(subprocess.CalledProcessError):  # git itself refuses: this is the fault that is meant
        git(repository, "rev-parse", "HEAD")
    state = provenance.code_state(repository)
    assert len(state["git_commit"]) == 40
    assert (state["git_branch"], state["git_dirty"]) == ("main", False)
    assert capsys.readouterr().err == ""


def test_a_repository_that_git_does_not_read_is_told(repository, capsys):
    (repository / ".git" / "HEAD").write_text("nothing\n")
    assert provenance.code_state(repository) == {"git_commit": None, "git_branch": None, "git_dirty": None}
    assert "warning: the commit of the code is not recorded: fatal: " in capsys.readouterr().err


@pytest.mark.parametrize("leftover", ["nothing", "an empty .git", "GIT_DIR"])
def test_a_copy_within_another_repository_does_not_get_its_commit(repository, monkeypatch, capsys, leftover):
    copy = repository / "copies" / "code"
    copy.mkdir(parents=True)
    if leftover == "an empty .git":
        (copy / ".git").mkdir()
    if leftover == "GIT_DIR":
        monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert provenance.code_state(copy) == {"git_commit": None, "git_branch": None, "git_dirty": None}
    assert ("warning: " in capsys.readouterr().err) == (leftover == "an empty .git")
