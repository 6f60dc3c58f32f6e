"""humaneval and mbpp: executed only where that was confirmed, scored by what the executed code does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import datasets
import evaluate
import pytest
from benchmark_hub import write_hub
from lm_eval.tasks._index import Entry, Kind
from planted import ScriptedLM, run_planted

import eval as program
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import harness
from fast_dllm.evaluate.task_loading import prepare
from fast_dllm.guard import one_line

HALF, SHOUT = "    return number // 2\n", "    return word.upper() + '!'\n"
SUM, MIRRORS = "def add_up(n):\n    return sum(range(n + 1))\n", "def mirrors(word):\n    return word == word[::-1]\n"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """In a folder with the data sets and a stand-in for the hub's metric."""
    monkeypatch.chdir(write_hub(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        ("humaneval", [HALF, SHOUT], 1.0),
        ("humaneval", [HALF, "    return word\n"], 0.5),
        ("humaneval", ["", "    return ["], 0.0),
        ("humaneval", [HALF + "\ndef other():\n    return [", SHOUT], 1.0),  # cut at the next function
        ("humaneval_instruct", [HALF + "```\nThis is `number / 2`.", SHOUT + "```"], 1.0),
        ("mbpp", [SUM + "[DONE] And more", "def mirrors(word):\n    return True\n"], 0.5),
        ("mbpp", [SUM + "[DONE]", MIRRORS], 1.0),
    ],
)
def test_the_score_is_the_share_of_answers_whose_code_passes(monkeypatch, task, answers, expected):
    found = {"half(": answers[0], "shout(": answers[1], "add_up": answers[0], "mirrors": answers[1]}
    lm = ScriptedLM(lambda prompt: next(text for part, text in found.items() if part in prompt))
    summary, _ = run_planted(monkeypatch, lm, task, "--confirm_run_unsafe_code")
    assert (summary["accuracy"], summary["num_samples"]) == (expected, 2)
    assert summary["metric"].startswith(("pass@1,", "pass_at_1,"))
    assert summary["accuracy_stderr"] is not None


def refused(monkeypatch, capsys, *options) -> str:
    """eval.py's one line for humaneval in a group with a harmless task, before any model is loaded."""

    def no_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness, "FastDLLM", no_model)
    given = ["--model", "fast_dllm_v2", "--tasks", "gsm8k,humaneval", "--model_args", "model_path=tiny,device=cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *given, *options])
    with pytest.raises(SystemExit) as stopped, one_line():
        program.main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py: error:")]
    return line


def test_unconfirmed_it_is_refused(monkeypatch, capsys):
    assert "humaneval runs code that the model wrote" in refused(monkeypatch, capsys)


@pytest.mark.parametrize(
    "task", ["mbpp", {"task": "humaneval", "num_fewshot": 1}, {"group": "mine", "task": [{"task": "mbpp"}]}, "a_tag"]
)
def test_so_it_is_in_a_group_a_tag_and_a_configuration(task):
    entries = {
        name: Entry(name, Kind.TASK, None, {"task": name, "unsafe_code": True}) for name in ("humaneval", "mbpp")
    }
    entries["a_tag"] = Entry("a_tag", Kind.TAG, None, tags={"mbpp"})
    manager = SimpleNamespace(task_index=entries)
    with pytest.raises(UsageError, match=r"(humaneval|mbpp) runs code"):
        prepare(manager, [task], confirm_run_unsafe_code=False, seed=0)


def test_confirmed_it_still_needs_what_evaluate_asks_for(monkeypatch, capsys):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    assert "unless HF_ALLOW_CODE_EVAL=1" in refused(monkeypatch, capsys, "--confirm_run_unsafe_code")


def test_without_the_metric_the_line_says_how_to_fetch_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no stand-in is

    def not_reachable(*_, **__):
        raise ConnectionError("the hub is not reachable")

    monkeypatch.setattr(evaluate.loading, "HubEvaluationModuleFactory", not_reachable)
    line = refused(monkeypatch, capsys, "--confirm_run_unsafe_code")
    assert "bash sbatch/prefetch.sh --task humaneval --model tiny" in line
