"""The five benchmarks through lm_eval's own task definitions: what the model is asked, and what its answers score."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import datasets
import langdetect
import nltk
import pytest
from benchmark_hub import HUB, MMLU_SUBGROUPS, mmlu_items, num_mmlu_questions, write_hub
from golden_models import ROOT
from planted import ScriptedLM, run_planted

import eval as program
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import harness, task_loading
from fast_dllm.guard import one_line
from fast_dllm.network.tokenizer import load_tokenizer

PROMPTS = HUB.parent / "prompts"
# task, examples in the prompt: the settings of the published scores, and one more of gsm8k
ASKED = [
    ("gsm8k", 0),
    ("gsm8k", 2),
    ("mmlu_abstract_algebra", 5),
    ("gpqa_main_n_shot", 0),
    ("minerva_math_algebra", 0),
    ("ifeval", 0),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("benchmarks") / "hub")


@pytest.fixture(autouse=True)
def offline(hub, monkeypatch):
    """In the folder with the data sets, with stand-in sentence data and a cache that only this file's tests use."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(hub.with_name("cache")))
    monkeypatch.setattr(nltk.data, "path", [str(HUB.parent / "nltk_data")])


@pytest.fixture(scope="module")
def lm():
    return ScriptedLM(lambda prompt: "")


@pytest.fixture
def plant(monkeypatch, lm):
    """plant(task, answer) -> (summary, samples); `answer` maps a prompt, or part of one, to what is answered."""

    def plant(task, answer, *options, num_fewshot=0):
        table = (
            answer if callable(answer) else lambda prompt: next(text for part, text in answer.items() if part in prompt)
        )
        monkeypatch.setattr(lm, "answer", table)
        return run_planted(monkeypatch, lm, task, *options, num_fewshot=num_fewshot)

    return plant


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny", "published"])
def named_tokenizer(request):
    if request.param == "tiny":
        return "tiny", load_tokenizer("tiny")
    folder = request.getfixturevalue("shared") / "reference" / "fast_dllm_v2_7b"
    return "published", load_tokenizer(str(folder))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("task", "num_fewshot"), ASKED)
def test_a_prompt_is_what_the_stored_text_says(monkeypatch, named_tokenizer, task, num_fewshot):
    name, tokenizer = named_tokenizer
    lm = ScriptedLM(lambda prompt: "", tokenizer)
    run_planted(monkeypatch, lm, task, "--limit", "1", num_fewshot=num_fewshot)
    stored = PROMPTS / f"{task}_{num_fewshot}_shot.{name}.txt"
    (asked,) = lm.asked.values()
    assert asked.text == stored.read_text()


# ---- what an answer scores -------------------------------------------------------------------------------------------


def by_document(samples, metric, name=None):
    """{filter: [score of each question]}."""
    (rows,) = [rows for task, rows in samples.items() if name in (None, task)]
    table = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        table.setdefault(row["filter"], []).append(float(row[metric]))
    return table


# a word of each question; the answers below stand in this order
GSM8K = ("marbles", "boat", "lake", "pages")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("answers", "flexible", "strict"),
    [
        ([r"4*6+3 gives \boxed{27}.", r"\boxed{1234}", r"\boxed{-5}", r"\boxed{63}"], [1, 1, 1, 1], [0, 0, 0, 0]),
        (["#### 27", "#### 1,234", "#### -5", "#### 63"], [1, 1, 1, 1], [1, 1, 1, 1]),
        ([r"\boxed{26}", r"\boxed{234}", r"\boxed{5}", r"\boxed{6.3}"], [0, 0, 0, 0], [0, 0, 0, 0]),
        (["I do not know.", "", r"\boxed{}", "sixty-three"], [0, 0, 0, 0], [0, 0, 0, 0]),
        # several: the last number counts
        (
            [r"\boxed{24}, no: \boxed{27}", "It is 1,234. Or 5", r"\boxed{-5}, as $3-8=-5$.", "63"],
            [1, 0, 1, 1],
            [0] * 4,
        ),
        # thousands separators, currencies, a full stop; decimals are another number
        ([r"$\boxed{27}$", "$1,234", "-5.", "63.00"], [1, 1, 1, 0], [0, 0, 0, 0]),
        (["27 marbles", r"\boxed{\$1,234}", "−5", "63%"], [1, 1, 0, 1], [0, 0, 0, 0]),
        # what stands behind a stop string is not read
        (["27\n\nQuestion: 9?", "1,234Question: 5", "-5</s> 7", "Question: 63"], [1, 1, 1, 0], [0, 0, 0, 0]),
    ],
    ids=["boxed", "strict form", "wrong", "no answer", "several", "separators", "dollars", "stop strings"],
)
def test_gsm8k(plant, answers, flexible, strict):
    summary, samples = plant("gsm8k", dict(zip(GSM8K, answers, strict=True)))
    assert by_document(samples, "exact_match") == {"flexible-extract": flexible, "strict-match": strict}
    assert (summary["metric"], summary["num_samples"]) == ("exact_match,flexible-extract", 4)
    assert summary["accuracy"] == sum(flexible) / 4
    assert summary["accuracy_stderr"] == pytest.approx(sum_stderr(flexible))


def sum_stderr(values):
    """The standard error of the mean, from the sample's variance."""
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


# part of a question: what is boxed
MATH = {
    "right": {
        "x>0": "3", "fraction": r"\frac{3}{4}", "tank": "10{,}000", "books": "24", "coins": r"\frac14",
        "triangle has legs": r"\sqrt{5}", "equilateral": r"60^\circ", "Factor": "(x-2)(x+2)", "interval": "(-2,2)",
        "remainder": "9", "base two": "1101_2", "15": "6", "Round": "2.7", "theta": r"\left(3,\frac{\pi}{2}\right)",
        "pmatrix": r"\begin{pmatrix}2\\5\end{pmatrix}",
    },
    "equivalent": {
        "x>0": "x=3", "fraction": r"\dfrac{6}{8}", "tank": "10,000", "books": "4!", "coins": "0.25",
        "triangle has legs": r"5^{1/2}", "equilateral": "60", "Factor": "(x+2)(x-2)", "interval": r"\left(-2, 2\right)",
        "remainder": r"\mathbf{9}", "base two": "1101", "15": "6.0", "Round": r"\frac{27}{10}",
        "theta": r"(3, \pi/2)", "pmatrix": r"\begin{bmatrix}2\\5\end{bmatrix}",
    },
    "wrong": {
        "x>0": "-3", "fraction": r"\frac{4}{3}", "tank": "1000", "books": "42", "coins": r"\frac12",
        "triangle has legs": "5", "equilateral": "90", "Factor": "(x-2)^2", "interval": "[-2,2]",
        "remainder": "8", "base two": "1011_2", "15": "60", "Round": "2.8", "theta": r"(3,\pi)",
        "pmatrix": r"\begin{pmatrix}5\\2\end{pmatrix}",
    },
}  # fmt: skip


MATH["last of several"] = {
    part: rf"0}}$. At second thought it is $\boxed{{{text}" for part, text in MATH["right"].items()
}
MATH["no answer"] = dict.fromkeys(MATH["right"], "")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", MATH)
def test_minerva_math(plant, kind):
    summary, samples = plant(
        "minerva_math", {part: rf"So it is $\boxed{{{text}}}$." for part, text in MATH[kind].items()}
    )
    right = float(kind not in ("wrong", "no answer"))
    for task in samples:
        assert set(by_document(samples, "math_verify", task)["none"]) == {right}, task
    assert (summary["accuracy"], summary["metric"], summary["num_samples"]) == (right, "math_verify,none", 15)
    assert {name: value["num_samples"] for name, value in summary["subtasks"].items()} == {
        f"minerva_math_{name}": 3 if name == "algebra" else 2
        for name in (
            "algebra",
            "counting_and_prob",
            "geometry",
            "intermediate_algebra",
            "num_theory",
            "prealgebra",
            "precalc",
        )
    }


def test_minerva_math_weighs_its_subtasks_by_their_questions(plant):
    subtasks = {"algebra": ("x>0", "fraction", "tank"), "geometry": ("triangle has legs",)}
    right = [part for parts in subtasks.values() for part in parts]
    summary, _ = plant(
        "minerva_math", {part: rf"$\boxed{{{text}}}$" if part in right else "?" for part, text in MATH["right"].items()}
    )
    assert summary["accuracy"] == pytest.approx(4 / 15)
    assert summary["accuracy_stderr"] > 0
    found = {name: value["accuracy"] for name, value in summary["subtasks"].items() if value["accuracy"]}
    assert found == {"minerva_math_algebra": 1.0, "minerva_math_geometry": 0.5}


@pytest.mark.slow
def test_mmlu_weighs_its_subjects_by_their_questions(plant):
    """Right in the subjects with four questions, in the others always B; each asked with its own examples."""

    def right(prompt):
        (subject,) = re.findall(r"multiple choice questions \(with answers\) about (.*)\.\n", prompt)
        assert re.findall(r"A course in (.*) has", prompt) == [subject] * 6
        name, last = subject.replace(" ", "_"), prompt.rsplit("seats and adds ", 1)[1].split(".")[0]
        (item,) = [item for item in items[name] if f"adds {last}." in item["question"]]
        return "ABCD"[item["answer"]] if len(items[name]) == 4 else "B"

    items = {subject: mmlu_items(subject, "test", num_mmlu_questions(subject)) for subject in MMLU_SUBGROUPS}
    hits = {subject: [len(rows) == 4 or row["answer"] == 1 for row in rows] for subject, rows in items.items()}
    summary, _ = plant("mmlu", right, num_fewshot=5)
    subtasks = summary["subtasks"]
    assert len(subtasks) == 57 + 4
    for subject, values in hits.items():
        assert subtasks[f"mmlu_{subject}"]["accuracy"] == sum(values) / len(values)
    for subgroup in set(MMLU_SUBGROUPS.values()):
        values = [hit for subject, row in hits.items() if MMLU_SUBGROUPS[subject] == subgroup for hit in row]
        assert subtasks[f"mmlu_{subgroup}"]["accuracy"] == pytest.approx(sum(values) / len(values))
        assert subtasks[f"mmlu_{subgroup}"]["num_samples"] == len(values)
    values = [hit for row in hits.values() for hit in row]
    assert summary["accuracy"] == pytest.approx(sum(values) / len(values))
    assert summary["accuracy"] != pytest.approx(sum(sum(row) / len(row) for row in hits.values()) / 57, abs=0.01)
    assert (summary["metric"], summary["num_samples"]) == ("acc,none", len(values))
    assert summary["accuracy_stderr"] > 0
    assert all(subtask["stderr"] is not None for subtask in subtasks.values())


@pytest.mark.parametrize(("task", "num_fewshot", "there"), [("mmlu_anatomy", 6, 5), ("minerva_math_algebra", 9, 4)])
def test_more_examples_than_a_benchmark_has_are_told_before_a_model_is_loaded(plant, task, num_fewshot, there):
    """These take the first ones, which lm_eval asserts at the first question."""
    with pytest.raises(
        UsageError, match=rf"--num_fewshot {num_fewshot} is more .* than {task} has, which are {there}$"
    ):
        plant(task, {"": ""}, num_fewshot=num_fewshot)


def right_option(prompt):
    """The letter of GPQA's right answer, in parentheses, as the options stand in the prompt."""
    with (HUB / "Idavidrein" / "gpqa" / "gpqa_main.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["Question"] in prompt]
    answer = re.escape(row["Correct Answer"].replace(" [title]", "."))
    (letter,) = re.findall(rf"^(\([A-D]\)) {answer}$", prompt, re.MULTILINE)
    return letter


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cached", [False, True])
def test_gpqa_scores_the_options_that_it_showed(plant, monkeypatch, tmp_path, cached):
    """Before documents are in its cache, lm_eval would take the right letters from another shuffle than the prompts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", cached)
    for _ in range(2):  # in the second run the documents may come from the cache
        summary, samples = plant("gpqa_main_n_shot", right_option)
        assert (summary["accuracy"], summary["metric"], summary["num_samples"]) == (1.0, "acc,none", 6)
    assert len({row["doc"]["answer"] for row in samples["gpqa_main_n_shot"]}) > 1, "the right letter moves"
    summary, samples = plant("gpqa_main_n_shot", lambda prompt: "(A)")
    hits = [row["doc"]["answer"] == "(A)" for row in samples["gpqa_main_n_shot"]]
    assert summary["accuracy"] == sum(hits) / 6
    assert summary["accuracy_stderr"] == pytest.approx(sum_stderr(hits))


def test_without_this_project_lm_eval_would_score_another_shuffle(plant, monkeypatch):
    """Why keep_documents exists; when this fails, lm_eval has mended it and keep_documents can go."""
    monkeypatch.setattr(task_loading, "keep_documents", lambda manager: manager)
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    summary, _ = plant("gpqa_main_n_shot", right_option)
    assert summary["accuracy"] < 1


@pytest.mark.slow
def test_gpqa_shows_the_same_options_in_every_process(plant, hub, tmp_path):
    _, samples = plant("gpqa_main_n_shot", lambda prompt: "(A)")
    script = (
        "import json, eval, lm_eval.tasks\n"
        "from pathlib import Path\n"
        "from fast_dllm.evaluate.task_loading import keep_documents\n"
        "folder = Path(lm_eval.tasks.__file__).parent / 'gpqa'\n"
        "manager = keep_documents(lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False))\n"
        "(task,) = manager.load(['gpqa_main_n_shot'])['tasks'].values()\n"
        "print(json.dumps([list(task.eval_docs[i].values()) for i in range(6)]))\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=hub, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [list(row["doc"].values()) for row in samples["gpqa_main_n_shot"]]


IFEVAL = ("lighthouse", "rivers", "seasons", "rain", "water made of")
GOOD_IFEVAL = {
    "lighthouse": "It stands on a rock. Mr. Bo keeps it. It shines at night.",
    "rivers": '"Rhine and Danube"',
    "seasons": '{"seasons": ["spring", "summer", "autumn", "winter"]}',
    "rain": "A puddle. A cloud. RAIN falls on the OLD road.",
    "water made of": "Wasser besteht aus Wasserstoff und Sauerstoff, die miteinander verbunden sind.",
}


@pytest.mark.parametrize(
    ("changes", "strict", "loose"),
    [
        ({}, ["11", "1", "1", "111", "1"], ["11", "1", "1", "111", "1"]),
        (
            {
                "lighthouse": "On a rock, it stands. It is old.",
                "rivers": "The Rhine and the Danube",
                "seasons": "spring, summer, autumn, winter",
                "rain": "It falls.",
                "water made of": "Water is made of hydrogen and oxygen, which are bound to each other.",
            },
            ["00", "0", "0", "010", "0"],
            ["00", "0", "0", "010", "0"],
        ),
        (dict.fromkeys(IFEVAL, " "), ["00", "0", "0", "000", "0"], ["00", "0", "0", "000", "0"]),
        # loose: also without asterisks, without the first line, without the last
        (
            {
                "lighthouse": "Sure, gladly:\nIt stands on a rock. It is old. It shines.",
                "rivers": '**"Rhine and Danube"**',
                "seasons": 'Here it is:\n{"seasons": 4}\nBye!',
                "rain": "A puddle. A cloud. RAIN falls on the OLD road.\nThat was it, and I hope that you like it.",
            },
            ["10", "0", "0", "101", "1"],
            ["11", "1", "1", "111", "1"],
        ),
    ],
    ids=["right", "wrong", "no answer", "strict and loose differ"],
)
def test_ifeval(plant, changes, strict, loose):
    summary, samples = plant("ifeval", GOOD_IFEVAL | changes)
    rows = sorted(samples["ifeval"], key=lambda row: row["doc_id"])
    for level, expected in (("strict", strict), ("loose", loose)):
        followed = ["".join(str(int(hit)) for hit in row[f"inst_level_{level}_acc"]) for row in rows]
        assert followed == expected
        assert [row[f"prompt_level_{level}_acc"] for row in rows] == ["0" not in hits for hits in expected]
    hits = ["0" not in row for row in strict]
    assert (summary["accuracy"], summary["metric"]) == (sum(hits) / 5, "prompt_level_strict_acc,none")
    assert summary["accuracy_stderr"] == pytest.approx(sum_stderr(hits))


def test_an_answer_in_two_languages_is_always_scored_the_same(plant, monkeypatch):
    def detected():
        return {langdetect.detect("Bonsoir hello") for _ in range(20)}

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    assert len(detected()) > 1
    plant("ifeval", GOOD_IFEVAL)
    assert len(detected()) == 1


def test_without_its_sentence_data_ifeval_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("a model was loaded, or a download begun")

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", never)
    monkeypatch.setattr(harness, "FastDLLM", never)
    given = ["--model", "fast_dllm_v2", "--tasks", "gsm8k,ifeval", "--model_args", "model_path=tiny,device=cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *given])
    with pytest.raises(SystemExit) as stopped, one_line():
        program.main()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(
        "eval.py: error: ifeval needs nltk's sentence data, which is not there; run: bash sbatch/prefetch"
    )
