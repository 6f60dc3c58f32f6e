"""Every alarm, with a fault that is planted and with something like it that is none; and the lab's own files."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from report_project import FULL, NINE, SUBSETS, Project, answers, earlier

from fast_dllm.record import questions
from fast_dllm.record.summary import parse_summary
from fast_dllm.report.alarms import find_alarms
from fast_dllm.report.folders import experiments_with_results, read_import, read_tables

LAB = Path(__file__).resolve().parent.parent.parent / "shared" / "lab"


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def found(project: Project, folder: str = "toy_math", level: str | None = "alarm") -> list:
    tables = [
        table for name in experiments_with_results(project.root) for table in read_tables(project.root, name, folder)
    ]
    return [alarm for alarm in find_alarms(tables) if level in (None, alarm.level)]


def kinds(project: Project, folder: str = "toy_math", level: str | None = "alarm") -> set[str]:
    return {alarm.kind for alarm in found(project, folder, level)}


def the(alarms: list, kind: str):
    chosen = [alarm for alarm in alarms if alarm.kind == kind]
    assert len(chosen) == 1, [alarm.kind for alarm in alarms]
    return chosen[0]


# ---- files ----


def test_missing_configurations(project):
    project.nine()
    shutil.rmtree(project.folder("k3_last"))
    alarm = the(found(project), "missing")
    assert alarm.configs == ("k3_last",)
    assert "1 of 9 configurations has no result: k3_last" in alarm.text


def test_a_run_outside_the_matrix_alone_does_not_call_for_the_matrix(project):
    project.run("plain", answers(300), arguments={"threshold": 1.0})
    assert kinds(project) == set()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_text(path.read_text()[:200]), "not valid JSON"),
        (lambda path: path.write_text("[]"), "unexpected ["),
        (lambda path: path.write_text(""), "not valid JSON"),
        (lambda path: edit(path, accuracy=None), "the accuracy is 'null'"),
        (lambda path: edit(path, accuracy=1.5), "the accuracy is '1.5'"),
        (lambda path: edit(path, accuracy=float("nan")), "not valid JSON, unexpected N"),
        (lambda path: edit(path, schema_version=7), "schema version '7', not 1"),
        (lambda path: edit(path, config="k2_last"), "it is of config 'k2_last', its folder of 'k2_first'"),
        (lambda path: edit(path, task="gsm8k"), "it is of task 'gsm8k'"),
        (lambda path: edit(path, experiment="07_mine"), "it is of experiment '07_mine'"),
        (lambda path: edit(path, limit=10), "it ran with limit 10, its folder says none"),
        (lambda path: edit(path, num_samples=299), "299 of 300 questions"),
        (lambda path: path.with_name("questions.json.gz").write_bytes(b"torn"), "questions.json.gz cannot be read"),
    ],
)
def test_a_corrupt_summary_is_left_out_with_its_reason(project, damage, reason):
    project.nine()
    damage(project.folder("k2_first") / "summary.json")
    alarm = the([a for a in found(project) if a.kind != "hand_edited"], "corrupt")
    assert alarm.configs == ("k2_first",)
    assert reason in alarm.text
    assert "k2_first" not in read_tables(project.root, "00_baseline", "toy_math")[0].runs


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reseal(path: Path) -> None:
    parse_summary(json.loads(path.read_text())).write(path.parent)


def test_generation_code_that_changed_since(project):
    project.nine()
    assert "stale" not in kinds(project)
    project.experiment("00_baseline", code="def generate(): pass  # another idea\n")
    assert set(the(found(project), "stale").configs) == set(NINE)


def test_numbers_changed_by_hand_are_seen(project):
    project.nine()
    edit(project.folder("k2_first") / "summary.json", accuracy=0.99)
    texts = [alarm.text for alarm in found(project) if alarm.kind == "hand_edited"]
    assert any("its own hash does not fit" in text for text in texts)
    assert any("states 99%; its questions give 96%" in text for text in texts)
    reseal(project.folder("k2_first") / "summary.json")  # with its hash, it is seen in the questions
    assert kinds(project) == {"hand_edited"}
    project.nine()
    speeds = json.loads((project.folder("k2_first") / "summary.json").read_text())["throughput"]
    edit_and_seal(project, "k2_first", throughput=speeds | {"tokens_per_second": 9000.0})
    assert "it states 9000 tokens/s" in the(found(project), "hand_edited").text


@pytest.mark.parametrize("name", ["results.json", "questions.json.gz", "texts.jsonl.gz"])
def test_results_and_samples_that_are_not_those_of_the_run(project, name):
    project.nine()
    source = project.folder("k1_first") / name
    (project.folder("k3_first") / name).write_bytes(source.read_bytes() + (b" " if name == "results.json" else b""))
    texts = [alarm.text for alarm in found(project) if alarm.kind == "hand_edited"]
    assert any(name in text and "k3_first" in text for text in texts)


def test_summaries_without_hashes_or_questions_are_not_called_edited(project):
    for config in NINE:
        project.run(config, answers(300), with_questions=False)
        path = project.folder(config) / "summary.json"
        kept = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_sha256") or k[0] in "gf"}
        path.write_text(json.dumps(kept))
    assert "hand_edited" not in kinds(project)


def test_two_copies_that_differ(project):
    project.nine()
    shutil.copytree(project.root / "results", project.root / "artifacts")
    assert kinds(project) == set()
    path = project.folder("k1_last", base="artifacts") / "summary.json"
    edit(path, host="node9")
    assert the(found(project), "copies_differ").configs == ("k1_last",)


def test_artifacts_alone_are_enough(project):
    project.nine()
    shutil.move(project.root / "results", project.root / "artifacts")
    for path in (project.root / "artifacts").rglob("*"):
        if path.is_file() and path.name not in ("summary.json", questions.QUESTIONS_FILE):
            path.unlink()
    assert found(project, level=None) == []  # and a clean matrix raises nothing


def test_an_accuracy_that_is_no_count(project):
    project.run("k1_first", answers(300), with_questions=False)
    edit(project.folder("k1_first") / "summary.json", accuracy=0.5001)
    assert "not_a_count" in kinds(project)


# ---- answers ----


def test_too_few_questions(project):
    project.nine(num_questions=10, lost=(1, 2, 3))
    assert "10 questions are too few for any claim" in the(found(project), "too_few_questions").text


def test_enough_questions(project):
    project.nine(num_questions=200)
    assert "too_few_questions" not in kinds(project)


@pytest.mark.parametrize(("config", "kind"), [("k1_middle", "k1_differs"), ("k3_last", "columns_differ")])
def test_columns_of_one_k_that_differ_in_a_single_answer(project, config, kind):
    project.nine()
    k = int(config[1])
    fewer = {name: count // k if name == "full" else count for name, count in FULL.items()}
    project.run(config, answers(300, range((10, 12, 40)[k - 1]), "?"), forwards=fewer, seconds=10 / (1 + 0.2 * (k - 1)))
    alarm = the(found(project), kind)
    assert set(alarm.configs) == {f"k{k}_{subset}" for subset in SUBSETS}


def test_layers_matter_where_layers_are_really_skipped(project):
    """Residual reuse: columns may differ, because a forward without some of its layers depends on which."""
    for k in (1, 2):
        for i, subset in enumerate(SUBSETS):
            rows = answers(300, range(10 if k == 1 else 20 + i))
            forwards = FULL if k == 1 else {"prefill": 100, "full": 350, "partial": 350, "reused": 0}
            project.run(f"k{k}_{subset}", rows, forwards=forwards)
    assert kinds(project) == {"missing"}


def test_a_variant_with_another_threshold_is_another_computation(project):
    project.nine()
    project.run("k1_first+threshold=0.8", answers(300, range(30)), arguments={"threshold": 0.8}, forwards={"full": 500})
    assert kinds(project) == set()


def test_reuse_that_changed_nothing(project):
    project.nine()
    for subset in SUBSETS:
        project.run(f"k2_{subset}", answers(300, range(10)), forwards={**FULL, "reused": 0})
    names = {alarm.configs for alarm in found(project) if alarm.kind == "identical_answers"}
    assert names == {("k1_first", "k2_first")}


def test_a_sweep_that_changed_nothing(project):
    """Two thresholds may well give the same answers; seven that all do are not being passed on."""
    sweep = {f"t{t}": {"threshold": t} for t in (0.5, 0.7, 0.9, 1.0)}
    project.experiment("04_threshold", matrix={"configurations": sweep, "compare_with": "t1.0"})
    for config in ("t0.5", "t0.7"):
        project.run(config, answers(300, range(9)), experiment="04_threshold", arguments=sweep[config])
    project.run("t1.0", answers(300, range(8)), experiment="04_threshold", arguments=sweep["t1.0"])
    assert "identical_answers" not in kinds(project)
    assert "identical_answers" in kinds(project, level="note")
    for config, given in sweep.items():
        project.run(config, answers(300, range(9)), experiment="04_threshold", arguments=given)
    alarm = the(found(project), "identical_answers")
    assert alarm.configs == tuple(sweep)
    assert "none of 4 settings had any effect" in alarm.text


def test_reuse_that_saved_work_and_lost_no_answer_is_a_finding(project):
    project.nine(lost=(10, 10, 10))
    assert kinds(project) == set()


def test_an_accuracy_that_moved_though_nothing_was_reused(project):
    project.nine()
    for subset in SUBSETS:
        project.run(f"k2_{subset}", answers(300, range(20)), forwards={**FULL, "reused": 0})
    alarm = next(a for a in found(project) if a.kind == "unexplained_difference")
    assert "reused nothing and skipped no layer" in alarm.text


def test_a_log_likelihood_task_shown_as_reuse(project):
    project.run("plain", answers(300, range(90)), task="toy_choice", scored=True)
    assert kinds(project, "toy_choice") == set()
    for config in NINE:
        project.run(config, answers(300, range(90)), task="toy_choice", scored=True)
    alarm = the(found(project, "toy_choice"), "loglikelihood_reuse")
    assert "one result (70.0%) shown 10 times" in alarm.text


def test_answers_that_never_stop(project):
    project.nine()
    for subset in SUBSETS:
        project.run(f"k3_{subset}", answers(300, range(200)), new_tokens=300 * 2040, seconds=1000.0)
    assert "answers_never_stop" in kinds(project)


# ---- speeds ----


def test_speeds_of_two_kinds_of_gpu(project):
    project.nine()
    for subset in SUBSETS:
        edit_and_seal(project, f"k2_{subset}", gpu="NVIDIA H100")
    alarm = the(found(project), "mixed_gpu")
    assert (alarm.spoils, "NVIDIA H100 (k2_first, k2_middle and k2_last)" in alarm.text) == ("speed", True)


def edit_and_seal(project: Project, config: str, **changes: object) -> None:
    path = project.folder(config) / "summary.json"
    edit(path, **changes)
    reseal(path)


@pytest.mark.parametrize("changes", [{"host": "node17"}, {"git_commit": "d" * 40, "git_dirty": True}], ids=str)
def test_another_host_and_another_commit_of_the_same_code_are_no_fault(project, changes):
    project.nine()
    edit_and_seal(project, "k2_first", **changes)
    assert kinds(project) == set()


def test_runs_in_several_segments(project):
    project.nine()
    edit_and_seal(project, "k3_first", num_segments=4)
    assert the(found(project), "several_segments").configs == ("k3_first",)


@pytest.mark.parametrize("fact", ["num_processes", "num_shares"])
def test_processes_that_divide_a_cpu_are_not_compared_with_one_and_those_with_a_gpu_each_are(project, fact):
    """Seconds are summed over processes: on GPUs of their own that is the time of one."""
    project.nine()
    edit_and_seal(project, "k3_last", **{fact: 4})
    assert kinds(project) == set()
    for config in NINE:
        edit_and_seal(project, config, device="cpu", gpu=None)
    alarm = the(found(project), "mixed_num_processes")
    assert "speeds at different numbers of processes on one CPU: 1 (" in alarm.text
    assert "4 (k3_last)" in alarm.text


def test_batch_sizes(project):
    project.nine(arguments={"batch_size": 32})
    assert kinds(project) == set()
    project.run("k1_first", answers(300, range(10)), arguments={"batch_size": 1})
    assert kinds(project) == {"mixed_batch_size"}


def test_equal_work_in_half_as_long_again(project):
    project.nine()
    project.run("k1_first", answers(300, range(10)), seconds=22.0)
    alarm = the(found(project), "speed_outlier")
    assert "k1_first took 2.2 times as long as k1_middle and k1_last for the same 5,000 tokens" in alarm.text


def test_the_same_forwards_in_another_experiment_in_half_as_long_again(project):
    """Both are in one picture; columns of one table that are all slow do not see it among themselves."""
    project.nine()
    project.experiment("01_other", matrix={"configurations": {"usual": {}, "idea": {}}, "compare_with": "usual"})
    project.run("usual", answers(300, range(10)), experiment="01_other", seconds=14.0)
    project.run("idea", answers(300, range(10), tag="!"), experiment="01_other", seconds=14.0,
                forwards={**FULL, "full": 300})  # fmt: skip
    assert kinds(project) == set()
    project.run("usual", answers(300, range(10)), experiment="01_other", seconds=16.0)
    alarm = the(found(project), "speed_outlier")
    assert (alarm.table, alarm.configs, alarm.spoils) == ("01_other", ("usual",), "speed")
    assert "usual took up to 1.6 times as long as the very same forwards in 00_baseline/k1_first" in alarm.text


def test_no_time_of_a_cpu_is_an_outlier_or_slow(project):
    """Other programs change it."""
    project.nine()
    project.experiment("01_other", matrix=PLAIN)
    project.run("usual", answers(300, range(10)), experiment="01_other", seconds=30.0)
    project.run("k1_first", answers(300, range(10)), seconds=22.0)
    for subset in SUBSETS:
        project.run(f"k2_{subset}", answers(300, range(12)), forwards={**FULL, "full": 350}, seconds=14.0)
    assert {"speed_outlier", "reuse_slower"} <= kinds(project)
    for config in NINE:
        edit_and_seal(project, config, device="cpu", gpu=None)
    usual = project.folder("usual", "01_other") / "summary.json"
    edit(usual, device="cpu", gpu=None)
    reseal(usual)
    assert kinds(project) == {"missing"}


PLAIN = {"configurations": {"usual": {}, "idea": {}}, "compare_with": "usual"}
ONE_WRONG = answers(300, range(10), tag="!")  # as wrong as the others, in other words


def plain_alarms(project) -> list[tuple[str, tuple[str, ...]]]:
    return [(alarm.table, alarm.configs) for alarm in found(project, level=None) if alarm.kind == "plain_differs"]


def test_plain_decoding_that_differs_between_two_experiments(project):
    project.nine()
    project.experiment("01_other", matrix=PLAIN)
    project.run("usual", answers(300, range(10)), experiment="01_other")
    assert kinds(project) == {"missing"}
    project.run("usual", [("It is 0!", 1), *answers(300, range(10))[1:]], experiment="01_other")
    assert plain_alarms(project) == [("01_other", ("usual",))], "the other one is the control"
    alarm = the(found(project), "plain_differs")
    assert alarm.spoils == "accuracy"
    assert "usual and 00_baseline/k1_first are plain decoding with the same settings, but 1 answers" in alarm.text
    # a knob of its own that is set otherwise is no plain decoding
    project.run("idea", ONE_WRONG, experiment="01_other", arguments={"knob": 1})
    assert plain_alarms(project) == [("01_other", ("usual",))]


def test_what_plain_decoding_answered_is_on_record_or_is_not_judged(project):
    for name, given in (("01_other", ONE_WRONG), ("02_another", answers(300, range(10)))):
        project.experiment(name, matrix=PLAIN)
        project.run("usual", given, experiment=name, with_questions=False)
    assert plain_alarms(project) == []


def test_of_three_the_experiment_that_is_alone_is_told(project):
    project.run("k1_first", ONE_WRONG)
    for name in ("01_other", "02_another"):
        project.experiment(name, matrix=PLAIN)
        project.run("usual", answers(300, range(10)), experiment=name)
    assert plain_alarms(project) == [("00_baseline", ("k1_first",))]


@pytest.mark.parametrize(
    "changes",
    [{"gpu": "L40S"}, {"dtype": "bfloat16"}, {"model_revision": "files-sha256:2"}, {"graphs": "compiled"}],
    ids=str,
)
def test_plain_decoding_elsewhere_may_differ(project, changes):
    project.nine()
    project.experiment("01_other", matrix=PLAIN)
    project.run("usual", ONE_WRONG, experiment="01_other", changes=changes)
    assert plain_alarms(project) == []


@pytest.mark.parametrize(
    ("arguments", "forwards", "differs"),
    [
        ({"threshold": 0.8}, None, False),
        ({"refresh": "rows"}, None, False),
        ({"refresh": None}, FULL, False),  # it has no such knob, and ran sub-blocks: the paper's block cache
        ({"refresh": None}, {**FULL, "sub": 0}, True),
    ],
    ids=str,
)
def test_plain_decoding_of_other_settings_may_differ(project, arguments, forwards, differs):
    project.nine()
    project.experiment("01_other", matrix=PLAIN)
    project.run("usual", ONE_WRONG, experiment="01_other", arguments=arguments, forwards=forwards)
    assert bool(plain_alarms(project)) == differs


@pytest.mark.parametrize(("batch_size", "differs"), [(1, True), (32, False)])
def test_sixteen_bits_round_by_who_shares_the_batch(project, batch_size, differs):
    for name in ("01_other", "02_another"):
        project.experiment(name, matrix=PLAIN)
        given = answers(300, range(10)) if name == "01_other" else ONE_WRONG
        project.run(
            "usual", given, experiment=name, arguments={"batch_size": batch_size}, changes={"dtype": "bfloat16"}
        )
    assert bool(plain_alarms(project)) == differs


def test_reuse_that_is_slower_than_none(project):
    project.nine()
    for seconds in (10.2, 14.0):
        assert kinds(project) == set()  # as fast is not slower
        for subset in SUBSETS:
            project.run(f"k2_{subset}", answers(300, range(12)), forwards={**FULL, "full": 350}, seconds=seconds)
    alarm = the(found(project), "reuse_slower")
    assert "k = 2 is slower than k = 1 on the same hardware (0.71 times its tokens/s)" in alarm.text


# ---- what is mixed ----


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"dtype": "float16"}, "mixed_dtype"),
        ({"model_revision": "files-sha256:2"}, "mixed_model"),
        ({"model_args": {"model_path": "other"}}, "mixed_model"),
        ({"model_args": {"threshold": 0.8}}, "mixed_arguments"),
        ({"model_args": {"small_block_size": 32}}, "mixed_arguments"),
        ({"model_args": {"refresh": None}}, "mixed_arguments"),  # a summary without it ran `rows`
        ({"model_args": {"reuse_k": 3}}, "name_contradicts"),
        ({"model_args": {"layer_subset": "last"}}, "name_contradicts"),
        ({"seeds": [1, 2, 3, 4]}, "mixed_seeds"),
        ({"num_fewshot": 5}, "mixed_prompting"),
        ({"chat_template": False}, "mixed_prompting"),
        ({"metric": "exact_match,strict-match"}, "mixed_task_version"),
    ],
)
def test_one_run_unlike_the_others(project, changes, kind):
    project.nine()
    path = project.folder("k2_first") / "summary.json"
    now = json.loads(path.read_text())
    merged = {k: {**now[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    if merged.get("model_args", {}).get("refresh", "") is None:
        del merged["model_args"]["refresh"]
    edit_and_seal(project, "k2_first", **merged)
    alarms = [alarm for alarm in found(project) if alarm.kind == kind]
    assert alarms, kinds(project)
    assert "k2_first" in alarms[0].text


def test_a_threshold_sweep_is_not_mixed_thresholds(project):
    sweep = {f"t{t:.2f}": {"threshold": t} for t in (0.5, 0.7, 0.9, 1.0)}
    project.experiment("04_threshold", matrix={"configurations": sweep, "compare_with": "t1.00"})
    for i, (config, given) in enumerate(sweep.items()):
        project.run(config, answers(300, range(30 - 5 * i)), experiment="04_threshold", arguments=given,
                    forwards={"full": 300 + 100 * i})  # fmt: skip
    assert kinds(project) == set()
    edit_run = project.folder("t0.50", "04_threshold") / "summary.json"
    edit(edit_run, model_args=json.loads(edit_run.read_text())["model_args"] | {"threshold": 0.6})
    reseal(edit_run)
    assert kinds(project) == {"name_contradicts"}


def test_an_engine_whose_replay_is_recorded_is_not_mixed_code(project):
    project.nine()
    for config in NINE:
        edit_and_seal(project, config, decoding_sha256=("1" if config[1] == "1" else "2") * 64)
    assert kinds(project) == {"mixed_code"}
    record = {"schema_version": 1, "replayed": {"1" * 64: ["00_baseline"], "2" * 64: ["01_other"]}}
    (project.root / "experiments" / "replays.json").write_text(json.dumps(record))
    assert kinds(project) == {"mixed_code"}  # recorded, but for another experiment
    record["replayed"]["2" * 64].append("00_baseline")
    (project.root / "experiments" / "replays.json").write_text(json.dumps(record))
    assert kinds(project) == set()


def test_experiments_in_one_picture_share_model_and_dtype(project):
    project.nine()
    project.experiment("01_other")
    project.run("k1_first", answers(300, range(10)), experiment="01_other")
    assert not any(alarm.table == "all experiments" for alarm in found(project))
    path = project.folder("k1_first", "01_other") / "summary.json"
    edit(path, dtype="bfloat16")
    reseal(path)
    assert the([a for a in found(project) if a.table == "all experiments"], "mixed_dtype")


def test_other_prompts_in_one_table(project):
    project.nine()
    folder = project.folder("k2_first")
    content = json.loads(gzip.decompress((folder / questions.QUESTIONS_FILE).read_bytes()))
    content["tasks"]["toy_math"]["prompts_sha256"] = "0" * 64
    (folder / questions.QUESTIONS_FILE).write_bytes(questions._compressed(json.dumps(content)))
    reseal(folder / "summary.json")
    assert "mixed_task_version" in kinds(project)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"gen_kwargs": {"max_gen_toks": 12}}, "mixed_generation"),
        ({"samples": {"toy_math": [0, 2]}}, "mixed_samples"),
        ({"system_instruction": "Be brief."}, "mixed_prompting"),
        ({"fewshot_as_multiturn": False}, "mixed_prompting"),
    ],
)
def test_what_lm_eval_was_given_beside_the_model_arguments_is_one_in_a_table(project, changes, kind):
    """Also where the other summaries are old and do not record it: those ran as the scripts run."""
    project.nine()
    for subset in SUBSETS:
        given = json.loads((project.folder(f"k3_{subset}") / "summary.json").read_text())
        parse_summary(given | changes).write(project.folder(f"k3_{subset}"))
    assert the(found(project), kind).spoils == "accuracy"


# ---- the earlier form, made up ----


def imported(folder: Path, level: str | None = "alarm") -> list:
    return [alarm for alarm in find_alarms(read_import(folder)) if level in (None, alarm.level)]


def nine_earlier(folder: Path, accuracies=(0.8, 0.7, 0.6), tokens=(300_000, 310_000, 305_000), **given) -> None:
    for k in (1, 2, 3):
        for subset in SUBSETS:
            seconds = {1: 8000.0, 2: 7000.0, 3: 6500.0}[k]
            made = {"accuracy": accuracies[k - 1], "tokens": tokens[k - 1], "seconds": seconds, "limit": 1000.0}
            earlier(folder, f"k{k}_{subset}", **(made | given))


def test_a_sound_table_of_the_earlier_form_and_its_repetition(tmp_path):
    nine_earlier(tmp_path / "monday" / "gsm8k_limit_1000")
    assert imported(tmp_path) == []
    notes = imported(tmp_path, "note")
    assert {alarm.kind for alarm in notes} == {"earlier_form", "dirty_checkout"}
    assert "no result of this code; not recorded: the number of questions" in notes[0].text
    nine_earlier(tmp_path / "tuesday" / "gsm8k_limit_1000")
    assert imported(tmp_path) == []


def test_equal_tokens_and_other_accuracies(tmp_path):
    nine_earlier(tmp_path / "a" / "gsm8k_limit_1000")
    earlier(tmp_path / "a" / "gsm8k_limit_1000", "k2_last", 0.3, tokens=310_000, seconds=7000.0, limit=1000.0)
    alarms = imported(tmp_path)
    assert the(alarms, "equal_tokens").configs == ("k2_first", "k2_middle", "k2_last")
    assert "columns_differ" not in {alarm.kind for alarm in alarms}  # the answers do not


def test_columns_of_one_k_far_apart_and_close_together(tmp_path):
    folder = tmp_path / "a" / "gsm8k_limit_1000"
    nine_earlier(folder)
    earlier(folder, "k2_last", 0.702, tokens=310_077, seconds=7000.0, limit=1000.0)
    assert imported(tmp_path) == []
    assert "cannot be told apart" in the(imported(tmp_path, "note"), "columns_alike").text
    earlier(folder, "k2_last", 0.4, tokens=610_077, seconds=14000.0, limit=1000.0)
    assert the(imported(tmp_path), "columns_differ").configs == ("k2_first", "k2_middle", "k2_last")


def test_a_table_with_the_accuracies_of_another(tmp_path):
    first = [0.8, 0.71, 0.62]
    nine_earlier(tmp_path / "monday" / "gsm8k_limit_1000", first, (300_000, 310_000, 305_000))
    nine_earlier(tmp_path / "tuesday" / "gsm8k_limit_1000", first, (300_000, 330_000, 335_000), time="20260121_1200")
    alarm = the(imported(tmp_path), "accuracies_of_another_table")
    assert alarm.table == "tuesday (imported)"
    assert "all 9 accuracies are those of monday (imported)" in alarm.text


def test_a_log_likelihood_task_of_the_earlier_form(tmp_path):
    for config in NINE:
        earlier(tmp_path / "a" / "mmlu", config, 9342 / 14042, tokens=None, task="mmlu", limit=None)
    alarms = imported(tmp_path)
    assert [alarm.kind for alarm in alarms] == ["loglikelihood_reuse"]


def test_reuse_without_effect_in_the_earlier_form(tmp_path):
    nine_earlier(tmp_path / "a" / "gsm8k_limit_1000", (0.8, 0.8, 0.6), (300_000, 300_000, 305_000))
    assert the(imported(tmp_path), "identical_answers").configs == ("k1_first", "k2_first")


def test_limits_mixed_in_one_folder_and_one_that_the_folder_does_not_say(tmp_path):
    nine_earlier(tmp_path / "a" / "gsm8k")
    assert {alarm.kind for alarm in imported(tmp_path)} == {"mixed_limit"}
    shutil.rmtree(tmp_path / "a")
    nine_earlier(tmp_path / "a" / "some_runs")
    earlier(tmp_path / "a" / "some_runs", "k3_last", 0.6, tokens=30_500, seconds=650.0, limit=100.0)
    assert "mixed_limit" in {alarm.kind for alarm in imported(tmp_path)}


def test_an_incomplete_and_a_torn_import(tmp_path):
    folder = tmp_path / "a" / "gsm8k_limit_1000"
    nine_earlier(folder)
    shutil.rmtree(folder / "k2_first")
    (folder / "k2_last" / "summary.json").write_text('{"accuracy": 0.')
    alarms = imported(tmp_path)
    assert the(alarms, "missing").configs == ("k2_first",)
    assert the(alarms, "corrupt").configs == ("k2_last",)


def test_earlier_summaries_in_results_are_a_table_of_their_own(project):
    project.nine()
    folder = project.root / "results" / "00_baseline" / "gsm8k"
    nine_earlier(folder, tuple(round(1319 * a) / 1319 for a in (0.8, 0.7, 0.6)), limit=None)
    tables = read_tables(project.root, "00_baseline", "gsm8k")
    assert [(table.label, table.is_foreign) for table in tables] == [("00_baseline (earlier runner)", True)]
    assert {alarm.kind for alarm in find_alarms(tables)} == {"earlier_form", "dirty_checkout"}


def test_another_experiment_of_the_earlier_form_may_have_columns_that_differ(tmp_path):
    """Only for 00_baseline is it known that reuse reads stored outputs."""
    folder = tmp_path / "a" / "gsm8k_limit_1000"
    for i, config in enumerate(NINE):
        k = int(config[1])
        arguments = {"model_path": "m", "reuse_k": k, "layer_subset": config[3:], "experiment_name": "02_residual"}
        accuracy = 0.8 if k == 1 else 0.8 - 0.05 * i
        earlier(
            folder,
            config,
            accuracy,
            tokens=300_000 + (k > 1) * 1000 * i,
            seconds=8000,
            limit=1000,
            model_args=arguments,
        )
    assert {alarm.kind for alarm in imported(tmp_path)} <= {"reuse_slower"}
    arguments = {"model_path": "m", "reuse_k": 3, "layer_subset": "last", "experiment_name": "02_residual"}
    earlier(folder, "k3_last", 0.5, tokens=307_000, seconds=8000, limit=1000, model_args=arguments)
    assert the(imported(tmp_path), "equal_tokens").configs == ("k3_middle", "k3_last")


def test_a_limited_group_counts_in_each_subtask(tmp_path):
    for limit in (10.0, 100.0, 500.0):
        earlier(tmp_path / "a" / f"mmlu_limit_{limit:g}", "k1_first", 0.5, tokens=None, task="mmlu", limit=limit)
    sizes = {table.limit: table.runs["k1_first"].num_samples for table in read_import(tmp_path)}
    assert sizes == {10.0: 570, 100.0: 5700, 500.0: None}


# ---- the lab's own ----

EXPECTED = {
    ("january", "gsm8k"): {"speed_outlier", "reuse_slower"},
    ("january", "mmlu"): {"loglikelihood_reuse"},
    ("february_15", "gsm8k"): {
        "mixed_code",
        "too_few_questions",
        "equal_tokens",
        "columns_differ",
        "answers_never_stop",
    },
    ("february_16", "gsm8k"): {"equal_tokens", "accuracies_of_another_table", "too_few_questions", "reuse_slower"},
}


@pytest.fixture(scope="module")
def lab():
    if not LAB.is_dir():
        pytest.skip("no folder shared/lab beside this checkout: the lab's published summaries are not here")
    tables = read_import(LAB)
    return tables, find_alarms(tables)


@pytest.mark.parametrize("place", EXPECTED, ids="/".join)
def test_the_labs_faults_and_no_others(lab, place):
    tables, alarms = lab
    table = next(t for t in tables if (t.label.removesuffix(" (imported)"), t.task) == place)
    own = [a for a in alarms if a.table == table.label and set(a.configs) <= set(table.runs) and a.level == "alarm"]
    if place[0] == "january":  # two tables of one label: told apart by what their alarms are about
        own = [a for a in own if (a.kind == "loglikelihood_reuse") == (place[1] == "mmlu")]
    assert {alarm.kind for alarm in own} == EXPECTED[place]


def test_the_labs_losses(lab):
    from fast_dllm.report.compare import contrasts

    table = next(t for t in lab[0] if t.task == "gsm8k" and t.limit is None)
    by_config = {c.configs[0]: c for c in contrasts(table)}
    assert by_config["k2_first"].difference == pytest.approx(-0.0675, abs=5e-4)
    assert by_config["k3_first"].difference == pytest.approx(-0.1327, abs=5e-4)
    assert all(c.outcome == "loses" and c.interval.high < -0.03 for c in by_config.values())
    assert not any(c.paired for c in by_config.values())
