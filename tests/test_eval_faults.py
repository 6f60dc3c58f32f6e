"""What can be wrong with an evaluation besides its options: data, processes, terminal, disk. One line, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from golden_models import ROOT
from test_eval import COMMON, TASKS, load, model_args, run_eval, run_here

import eval as program
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import task_checks
from fast_dllm.guard import one_line
from fast_dllm.record.answers import AnswerStore
from fast_dllm.spec.launch import launched_processes

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def task(num_questions: int, settings: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        eval_docs=list(range(num_questions)),
        OUTPUT_TYPE="generate_until" if settings is not None else "multiple_choice",
        config=SimpleNamespace(generation_kwargs=settings),
    )


# -- the tasks' checks -------------------------------------------------------------------------------------------------
def test_samples_are_put_in_order():
    """lm_eval answers them in the data's order and would label them in the order they are given in."""
    tasks = {"a": task(6), "b": task(2)}
    assert task_checks.check_samples(tasks, {"b": [1], "a": [5, 0, 3]}) == {"a": [0, 3, 5], "b": [1]}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("a", "must be a JSON object of question numbers"),
        ({"a": [1, 1, 5]}, "names question 1 of a twice"),
        ({"a": [6]}, "a has the questions 0 to 5, not 6"),
        ({"a": [True]}, "not True"),
        ({"a": ["1"]}, "not '1'"),
        ({"a": []}, "gives no questions of a"),
        ({"c": [0], "a": [0]}, "names 'c', which is none of this run's tasks: a"),
    ],
)
def test_samples_that_say_nothing_clear_are_refused(samples, message):
    with pytest.raises(UsageError, match=message):
        task_checks.check_samples({"a": task(6)}, samples)


@pytest.mark.parametrize(
    ("processes", "limit", "samples", "message"),
    [
        (2, 1, None, "2 processes for 1 question of large; each needs at least one: start 1"),
        (4, None, None, "4 processes for 3 questions of small; each needs at least one: start 3"),
        (2, 0.2, None, "2 processes for 1 question of small"),
        (2, None, {"small": [0], "large": [1, 2]}, "2 processes for 1 question of small"),
        (3, None, None, None),
        (2, 2, None, None),
    ],
)
def test_more_processes_than_questions_of_a_task_are_refused(processes, limit, samples, message):
    tasks = {"large": task(100), "small": task(3)}
    if message is None:
        task_checks.check_processes(tasks, processes, limit, samples)
    else:
        with pytest.raises(UsageError, match=message):
            task_checks.check_processes(tasks, processes, limit, samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0}, "task t asks for top_p 0; it must be a number above 0 and at most 1"),
        ({"temperature": -1}, "temperature -1; it must be a number from 0"),
        ({"temperature": "warm"}, "cannot be read: could not convert"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"max_gen_toks": 0}, "max_gen_toks 0; it must be at least 1"),
        ({"max_gen_toks": "some"}, "cannot be read: invalid literal"),
        ({"do_sample": "perhaps"}, "do_sample perhaps; it must be True or False"),
        ({"until": 5}, r"until \[5\]; it must be a text or a list of texts"),
        ({"num_beams": 4}, "asks for num_beams; supported generation settings: until"),
    ],
)
def test_generation_settings_are_checked_before_a_model_is_loaded(changes, message):
    given = {"until": ["\n"], "do_sample": True, "temperature": 1.0}
    with pytest.raises(UsageError, match=message):
        task_checks.check_generation({"t": task(3, given)}, changes, 64)
    task_checks.check_generation({"scored": task(3)}, changes, 64)


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, LAUNCHED | {"RANK": ""}])
def test_what_no_launcher_set_is_refused(environment):
    with pytest.raises(UsageError, match="unset WORLD_SIZE, or start the processes with accelerate launch or torchrun"):
        launched_processes(environment)


def test_a_world_size_left_in_the_shell_is_one_line_at_once(short_random, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--model_args", model_args(short_random), "--output_path", f"{tmp_path}/out"]
    done = run_here("--tasks", "made_up_sums", *given)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("eval.py: error: WORLD_SIZE is 2 in the environment, but RANK")
    assert not list(tmp_path.iterdir())


# -- data --------------------------------------------------------------------------------------------------------------
def test_overlapping_tasks_are_one_line(short_random, tmp_path):
    given = ["--model_args", model_args(short_random), "--output_path", f"{tmp_path}/out"]
    done = run_here("--tasks", "toy_choice,toy_choice_addition", *given)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("eval.py: error: --tasks: Duplicate task 'toy_choice_addition': found in both")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_hub_cache_that_cannot_be_written_is_one_line(short_random, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "fixtures" / "hub" / "openai", tmp_path / "openai")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/a file/cache")
    done = run_eval("--tasks", "gsm8k", "--model_args", model_args(short_random), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"eval.py: error: the data of gsm8k cannot be kept in '{tmp_path}/a file/cache")
    assert "HF_HOME names the folder" in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_a_network_the_documented_launch_ends_soon_with_the_first_cause(short_random, tmp_path, monkeypatch):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--quiet", "--num_processes", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    began = time.monotonic()
    given = ("--tasks", "gsm8k", "--model_args", model_args(short_random))
    done = run_eval(*given, launch=launch, cwd=tmp_path, offline=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("eval.py: the data of gsm8k cannot be had (")
    assert "Retry" not in done.stderr
    assert time.monotonic() - began < 90, "about 8 s on a quiet machine; the hub's client alone would try for longer"


@pytest.mark.slow
def test_a_task_by_the_path_of_its_yaml_on_a_terminal_that_lacks_characters(short_random, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = ["--tasks", str(TASKS / "made_up_sums.yaml"), "--limit", "2", "--model_args", model_args(short_random)]
    done = run_eval(*words, "--output_path", f"{tmp_path}/out", tasks=None)
    assert done.returncode == 0, done.stderr
    again = run_here(*words, "--output_path", f"{tmp_path}/out", tasks=None)  # the same run, not another one's result
    assert again.returncode == 0, again.stderr
    _, summary = load(tmp_path / "out")
    assert (summary["task"], summary["num_samples"]) == ("made_up_sums", 2)
    assert summary["accuracy"] is not None
    assert "\\u2191" in done.stdout, "lm_eval's table has an arrow, and this terminal has none"


# -- what an evaluation leaves where it ends badly ---------------------------------------------------------------------
def run_main(monkeypatch, folder, *words: str) -> None:
    """eval.py's main() in this process; what it raises comes through."""
    given = ["--tasks", "made_up_sums", "--include_path", str(TASKS), "--output_path", f"{folder}", *words]
    monkeypatch.setattr(sys, "argv", ["eval.py", *COMMON, *given])
    with one_line():
        program.main()


def test_the_results_are_written_before_anything_is_printed(short_random, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr("lm_eval.utils.make_table", broken)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, tmp_path, "--limit", "1", "--model_args", model_args(short_random))
    assert str(ended.value.code).endswith("RuntimeError: the terminal is gone")
    assert load(tmp_path)[1]["num_samples"] == 1


def test_an_error_in_a_policys_loop_ends_with_its_file_and_line(short_random, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "experiments" / "00_baseline", tmp_path / "experiments" / "06_idea")
    policy = tmp_path / "experiments" / "06_idea" / "generation_functions.py"
    lines = policy.read_text().split("\n")
    place = next(number for number, line in enumerate(lines) if "counter = 0" in line)
    policy.write_text("\n".join([*lines[: place + 1], "        counter // 0", *lines[place + 1 :]]))
    monkeypatch.setattr("fast_dllm.decode.experiments.EXPERIMENTS", tmp_path / "experiments")
    words = ["--limit", "1", "--model_args", model_args(short_random, experiment_name="06_idea")]
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, tmp_path / "out", *words)
    told = str(ended.value.code)
    assert told.startswith("eval.py: ")
    assert f"06_idea/generation_functions.py, line {place + 2}: ZeroDivisionError: integer division" in told
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_answered(short_random, tmp_path, monkeypatch):
    append, calls = AnswerStore.append, iter(range(2))

    def full_at_the_third(store, *given):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
        append(store, *given)

    words = ["--limit", "4", "--model_args", model_args(short_random)]
    with monkeypatch.context() as full:
        full.setattr(AnswerStore, "append", full_at_the_third)
        with pytest.raises(SystemExit) as ended:
            run_main(full, tmp_path, *words)
    assert str(ended.value.code).startswith("eval.py: [Errno 28] No space left on device")
    assert not (tmp_path / "summary.json").exists()
    run_main(monkeypatch, tmp_path, *words)
    throughput = load(tmp_path)[1]["throughput"]
    assert throughput["requests"] == 4
    assert load(tmp_path)[1]["num_segments"] == 2, "the second run continued the first"
