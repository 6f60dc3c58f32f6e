"""eval.py as a user runs it: files left, exit codes, one and several processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_models import ROOT
from random_model import save_random_model

import eval as program
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.evaluate.options import EvaluationOptions, runs_of
from fast_dllm.guard import one_line
from fast_dllm.record import questions
from fast_dllm.record.answers import AnswerStore
from fast_dllm.record.summary import read_summary
from fast_dllm.report.read_run import read_run
from fast_dllm.spec.hashes import file_sha256
from fast_dllm.spec.matrix import NINE

TASKS = ROOT / "tests" / "fixtures" / "tasks"
COMMON = ["--model", "fast_dllm_v2", "--batch_size", "1", "--num_fewshot", "0"]
COMMON += ["--apply_chat_template", "--fewshot_as_multiturn"]


def run_eval(
    *arguments: str, launch: tuple[str, ...] = (), tasks: Path | None = TASKS, cwd: Path = ROOT, offline: bool = True
):
    """Run eval.py as a process of its own on one thread. offline: it is told that there is no network."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, *launch, str(ROOT / "eval.py"), *COMMON, *arguments]
    if tasks:
        command += ["--include_path", str(tasks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


def run_here(*arguments: str, tasks: Path | None = TASKS) -> subprocess.CompletedProcess:
    """eval.py's main() in this process, which has imported what takes a new process some seconds."""
    words = ["eval.py", *COMMON, *arguments, *(("--include_path", str(tasks)) if tasks else ())]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    status: int | str | None = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        try:
            with one_line():
                program.main()
        except SystemExit as ended:
            status = ended.code
        if isinstance(status, str):  # as Python itself ends with a text
            print(status, file=err)
            status = 1
    told, errors = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(words, status or 0, told, errors)


def model_args(model: Path, **arguments: object) -> str:
    given = {"model_path": model, "max_new_tokens": 64, "device": "cpu"} | arguments
    return ",".join(f"{name}={value}" for name, value in given.items())


def load(folder: Path) -> tuple[dict, dict]:
    return tuple(json.loads((folder / name).read_text()) for name in ("results.json", "summary.json"))


@pytest.fixture(scope="module")
def one_process(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "k2_middle+max_new_tokens=64"
    arguments = model_args(
        random_model, experiment_name="00_baseline", reuse_k=2, layer_subset="middle", show_speed=True
    )
    tasks = "made_up_sums"
    done = run_eval("--tasks", tasks, "--model_args", arguments, "--output_path", f"{folder}/", "--log_samples")
    assert done.returncode == 0, done.stderr
    return done, folder


def test_a_run_leaves_results_summary_and_samples(one_process):
    done, folder = one_process
    assert "has a chat template" not in done.stderr
    results, summary = load(folder)
    kept = {"questions.json.gz", "texts.jsonl.gz", "generation_functions.py"}
    assert file_sha256(folder / "generation_functions.py") == summary["generation_code_sha256"]
    samples = {"samples_made_up_sums.jsonl"}
    assert {path.name for path in folder.iterdir()} == {"results.json", "summary.json"} | samples | kept
    assert len(questions.read(folder / "questions.json.gz").questions) == 7
    assert_costs_add_up(folder)
    assert read_summary(folder / "summary.json").sealed(folder).as_json() == summary
    assert summary["accuracy"] == results["results"]["made_up_sums"]["exact_match,flexible-extract"]
    assert (summary["experiment"], summary["task"], summary["config"]) == (
        "00_baseline",
        "made_up_sums",
        "k2_middle+max_new_tokens=64",  # what differs from the configuration stands in the name
    )
    assert (summary["num_samples"], summary["num_samples_expected"], summary["limit"]) == (7, 7, None)
    assert summary["metric"] == "exact_match,flexible-extract"
    assert summary["model_args"]["reuse_k"] == 2
    assert summary["throughput"]["new_tokens"] > 0
    assert summary["throughput"]["forwards"]["reused"] > 0
    assert summary["model_revision"].startswith("files-sha256:")
    assert summary["dtype"] == "float32"
    assert summary["peak_memory_bytes"] > 0
    layers = summary["throughput"]["layer_forwards"]
    run = read_run(folder / "summary.json", "00_baseline", "made_up_sums", None, imported=False)
    assert run.full_forwards == sum(layers.values()) / summary["num_layers"] > 0  # the report's unit is what was run
    assert "tokens/s" in done.stdout
    assert "made_up_sums" in done.stdout


def assert_costs_add_up(folder):
    """What the questions cost by themselves is what the run cost."""
    costs = read_summary(folder / "summary.json").throughput
    kept = questions.read(folder / "questions.json.gz").questions
    assert sum(question.new_tokens for question in kept) == costs.new_tokens
    assert sum(question.layers for question in kept) == pytest.approx(sum(costs.layer_forwards.values()))


@pytest.mark.slow
def test_two_processes_give_the_same_scores_as_one(one_process, random_model, tmp_path):
    arguments = model_args(random_model, experiment_name="00_baseline", reuse_k=2, layer_subset="middle")
    # torchrun is what `accelerate launch` itself uses for several GPUs; its own CPU launcher starts one process.
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    tasks = "made_up_sums,made_up_choice"
    done = run_eval("--tasks", tasks, "--model_args", arguments, "--output_path", str(tmp_path), launch=launch)
    assert done.returncode == 0, done.stderr
    results, summary = load(tmp_path)
    single_results, single = load(one_process[1])
    assert summary["num_processes"] == 2
    assert summary["subtasks"]["made_up_sums"]["num_samples"] == 7
    assert results["results"]["made_up_sums"] == single_results["results"]["made_up_sums"]
    for count in ("requests", "new_tokens"):
        assert summary["throughput"][count] == single["throughput"][count]
    forwards = summary["throughput"]["forwards"]
    assert {kind: forwards[kind] for kind in single["throughput"]["forwards"]} == single["throughput"]["forwards"]
    assert summary["throughput"]["scored_requests"] == 28
    assert forwards["score"] == 7
    kept = [questions.read(each / "questions.json.gz").questions[:7] for each in (one_process[1], tmp_path)]
    assert kept[0] == kept[1]
    assert all(question.layers for question in kept[0])


@pytest.mark.slow
def test_the_documented_launch_works_unchanged(one_process, random_model, tmp_path):
    arguments = model_args(random_model, experiment_name="00_baseline", reuse_k=2, layer_subset="middle")
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    given = ["--model_args", arguments, "--output_path", f"{tmp_path}/"]
    done = run_eval("--tasks", "made_up_sums", *given, launch=launch)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path)[0]["results"] == load(one_process[1])[0]["results"]


@pytest.mark.slow
def test_configurations_with_one_loaded_model_equal_runs_of_their_own(random_model, tmp_path):
    common = {"experiment_name": "00_baseline"}
    given = ["--tasks", "made_up_shuffled", "--log_samples", "--output_path", f"{tmp_path}/"]
    short = ["k1_first", "k3_middle", "k2_last"]
    names = [f"{name}+max_new_tokens=64" for name in short]  # what is given beats the configuration, and is named
    done = run_here(*given, "--model_args", model_args(random_model, **common), "--configurations", ",".join(short))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("== ")] == [
        f"== {name} ({number} of 3)" for number, name in enumerate(names, 1)
    ]
    alone = tmp_path / "alone"
    arguments = model_args(random_model, reuse_k=2, layer_subset="last", **common)
    done = run_here(*given[:-1], str(alone), "--model_args", arguments)
    assert done.returncode == 0, done.stderr
    for name in names:
        _, summary = load(tmp_path / name)
        assert (summary["config"], summary["num_samples"]) == (name, 7)
    (results, summary), (alone_results, alone_summary) = load(tmp_path / names[2]), load(alone)
    assert results["results"] == alone_results["results"]
    # the same questions in the same order: the task's own random generator began anew
    samples = [(folder / "samples_made_up_shuffled.jsonl").read_text() for folder in (tmp_path / names[2], alone)]
    assert samples[0] == samples[1]
    counts = ("forwards", "requests", "new_tokens")
    assert [summary["throughput"][name] for name in counts] == [alone_summary["throughput"][name] for name in counts]
    assert summary["throughput"]["forwards"]["reused"] > 0
    different = ("throughput", "seconds_loading", "start_time", "end_time", "peak_memory_bytes")
    different += ("results_sha256", "summary_sha256")  # over the date and the command line, which results.json holds
    assert summary.keys() == alone_summary.keys()
    assert {k: v for k, v in summary.items() if k not in different} == {
        k: v for k, v in alone_summary.items() if k not in different
    }


@pytest.mark.slow
def test_a_limited_choice_task_counts_requests_and_scored_tokens(random_model, tmp_path):
    arguments = model_args(random_model, loglikelihood_mode="chain")
    done = run_here(
        "--tasks", "made_up_choice", "--limit", "3", "--model_args", arguments, "--output_path", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    _, summary = load(tmp_path)
    assert (summary["limit"], summary["num_samples"], summary["num_samples_expected"]) == (3, 3, 3)
    assert summary["metric"] == "acc,none"
    assert summary["model_args"]["loglikelihood_mode"] == "chain"
    assert summary["throughput"]["scored_requests"] == 12
    assert summary["throughput"]["scored_tokens"] == 12
    assert summary["throughput"]["forwards"] == {"score": 3}  # the four letters share their masked inputs
    assert summary["config"] == "plain+loglikelihood_mode=chain+max_new_tokens=64+threshold=0.9"


def small_model(folder: Path) -> Path:
    """Eight layers: too few for a subset."""
    return save_random_model(folder, num_layers=8)


def cut_model(folder: Path) -> Path:
    weights = save_random_model(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (["--tasks", "made_up_sums"], {"threshold": 2}, "threshold must be a number from 0 to 1"),
        (["--tasks", "made_up_sums"], {"treshold": 1}, "valid ones: model_path"),
        pytest.param(["--tasks", "made_up_nothing"], {}, "Tasks not found: made_up_nothing", marks=pytest.mark.slow),
        (["--tasks", "made_up_sums"], {"model_path": cut_model}, "cannot load model"),
        (["--tasks", "made_up_sums"], {"model_path": small_model, "reuse_k": 2, "layer_subset": "last"}, "13 layers"),
    ],
    ids=["threshold", "unknown argument", "task", "truncated weights", "eight layers"],
)
def test_bad_input_is_one_line_and_exit_code_2_with_nothing_written(
    short_random, tmp_path, options, arguments, message
):
    given = {"model_path": short_random} | arguments
    if callable(given["model_path"]):
        given["model_path"] = given["model_path"](tmp_path / "model")
    done = run_here(
        *options,
        "--model_args",
        model_args(**{"model": given.pop("model_path")}, **given),
        "--output_path",
        str(tmp_path / "out"),
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("eval.py: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_configuration_is_named_before_anything_is_loaded(tmp_path):
    given = [
        "--model_args",
        "model_path=tiny",
        "--configurations",
        "k1_first,k4_last",
        "--output_path",
        f"{tmp_path}/out",
    ]
    done = run_here("--tasks", "made_up_sums", *given)
    assert done.returncode == 2
    assert "eval.py: error: no configuration named 'k4_last'; valid: k1_first k1_middle" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--output_path", "{here}/a file", "--output_path: cannot write into '{here}/a file': File exists"),
        ("--output_path", "/proc/results", "--output_path: cannot write into '/proc/results': "),
        ("--output_path", "", "--output_path is empty; it names the folder for the results"),
        ("--num_fewshot", "-1", "--num_fewshot must be at least 0, not -1"),
        (
            "--limit",
            "x",
            "argument --limit/-L: invalid float value: 'x'; `python eval.py run --help` tells the options",
        ),
        ("--tasks", "", "no task given; --tasks takes gsm8k, mmlu, "),
    ],
)
def test_an_evaluation_that_would_be_thrown_away_is_not_begun(short_random, tmp_path, option, value, told):
    (tmp_path / "a file").write_text("a file where a folder should be")
    given = {"--tasks": "made_up_choice", "--limit": "1", "--model_args": model_args(short_random)}
    given |= {"--output_path": str(tmp_path / "out"), option: value.format(here=tmp_path)}
    done = run_here(*(word for pair in given.items() for word in pair))
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("eval.py: error: ")
    assert told.format(here=tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_more_examples_than_a_task_has_leave_nothing_behind(short_random, tmp_path):
    arguments = ("--model_args", model_args(short_random), "--output_path", f"{tmp_path}/out", "--limit", "1")
    done = run_here("--tasks", "made_up_sums", "--num_fewshot", "8", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "eval.py: error: --num_fewshot 8 is more examples than made_up_sums has, which are 7\n"
    assert not list(tmp_path.iterdir())
    done = run_here("--tasks", "made_up_sums", "--num_fewshot", "7", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.json").is_file()


def test_a_result_of_another_run_is_not_written_over(one_process, random_model):
    """Another threshold, or other settings that lm_eval is given beside the model arguments: both change answers."""
    _, folder = one_process
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    same = {"experiment_name": "00_baseline", "reuse_k": 2, "layer_subset": "middle", "show_speed": True}
    settings = ["--gen_kwargs", "max_gen_toks=4", "--system_instruction", "Be brief."]
    for changes, options, told in (
        ({"threshold": 0.5}, [], "holds a result of another run (threshold 0.9, not 0.5); name another folder"),
        ({}, settings, "(system_instruction None, not Be brief., gen_kwargs None, not max_gen_toks=4); name another"),
    ):
        given = ["--model_args", model_args(random_model, **same, **changes), "--output_path", f"{folder}/"]
        done = run_here("--tasks", "made_up_sums", *given, *options)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_summary_is_not_written_over(short_random, tmp_path):
    (tmp_path / "summary.json").write_text('{"schema_version": 1, "num_samples": -1}')
    given = ["--tasks", "made_up_sums", "--limit", "1", "--output_path", f"{tmp_path}/"]
    done = run_here(*given, "--model_args", model_args(short_random))
    assert done.returncode == 2, done.stderr
    assert "cannot be read (num_samples is -1, not a whole number of at least 0); name another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_who_lost_the_run_to_another_process_says_so_and_writes_no_result(short_random, tmp_path, monkeypatch):
    monkeypatch.setenv("FAST_DLLM_CLAIMS", f"{tmp_path}/elsewhere/.lock.0003:{tmp_path}/out/.lock.0001")
    arguments = ("--model_args", model_args(short_random), "--output_path", f"{tmp_path}/out")
    done = run_here("--tasks", "made_up_sums", "--limit", "1", *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"eval.py: another process has taken over {tmp_path}/out"
    assert not (tmp_path / "out" / "summary.json").exists()
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["today's", "another"])
def test_an_interrupted_run_is_continued_by_the_code_that_began_it_and_by_no_other(
    short_random, tmp_path, monkeypatch, engine
):
    """Answers of another engine are no answers of this one: the run begins again, and theirs stay where they are."""
    out = tmp_path / "out"
    given = ["--tasks", "made_up_sums", "--limit", "2", "--model_args", model_args(short_random)]
    given += ["--output_path", f"{out}"]
    with monkeypatch.context() as before:  # a run that ends between its last answer and its files
        if engine == "another":
            before.setattr("fast_dllm.evaluate.harness.decoding_sha256", lambda root, scored=False: "0" * 64)
        before.setattr(AnswerStore, "discard", AnswerStore.close)
        before.setattr("fast_dllm.evaluate.outcome.write_results", lambda *_: None)
        before.setattr(sys, "argv", ["eval.py", *COMMON, *given, "--include_path", str(TASKS)])
        program.main()
    assert not (out / "summary.json").exists()
    (left,) = (out / "answers").iterdir()

    done = run_eval(*given)  # a process of its own, whose log goes to its stderr
    assert done.returncode == 0, done.stderr
    _, summary = load(out)
    continued = engine == "today's"
    assert ("2 answers of an interrupted run found" in done.stderr) == continued
    assert summary["throughput"]["requests"] == 2
    assert left.exists() != continued


def test_the_real_gsm8k_questions_run_offline(short_random, tmp_path, shared, monkeypatch):
    (tmp_path / "openai").symlink_to(shared / "hub" / "openai")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    done = run_here(
        "--tasks", "gsm8k", "--limit", "2", "--model_args", model_args(short_random), "--output_path", str(out),
        "--log_samples", tasks=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, summary = load(out)
    assert (summary["task"], summary["num_samples"]) == ("gsm8k", 2)
    sample = json.loads((out / "samples_gsm8k.jsonl").read_text().splitlines()[0])
    assert "Janet" in sample["doc"]["question"]


def asked(names: list[str], given: dict, num_fewshot: int) -> EvaluationOptions:
    config = SimpleNamespace(tasks=["toy_math"], num_fewshot=num_fewshot)
    return EvaluationOptions(config, given, names, shard=None, num_processes=1)


def test_a_configurations_folder_says_what_it_changes_and_the_command_line_beats_the_matrix():
    given = {"experiment_name": "00_baseline", "threshold": 0.7, "device": None}
    names = ["k2_middle+num_fewshot=3+small_block_size=16", "plain"]
    runs = runs_of(asked(names, given, num_fewshot=3), ModelArguments.parse(**given))
    assert [name for name, _ in runs] == [
        "k2_middle+num_fewshot=3+small_block_size=16+threshold=0.7",
        "plain+num_fewshot=3+threshold=0.7",
    ]
    first, plain = (arguments.as_dict() for _, arguments in runs)
    assert (first["reuse_k"], first["layer_subset"], first["threshold"], first["small_block_size"]) == (
        2,
        "middle",
        0.7,
        16,
    )
    assert (plain["reuse_k"], plain["layer_subset"], plain["threshold"]) == (1, None, 0.7)


def test_a_policy_is_executed_once_for_nine_configurations(monkeypatch):
    given = {"experiment_name": "00_baseline"}
    plain = ModelArguments.parse(**given)

    def load_again(name):
        raise AssertionError(f"{name} is executed again")

    monkeypatch.setattr("fast_dllm.decode.experiments.load", load_again)
    runs = runs_of(asked(list(NINE.names), given, num_fewshot=0), plain)
    assert [name for name, _ in runs] == list(NINE.names)
    assert {id(arguments.experiment) for _, arguments in runs} == {id(plain.experiment)}
