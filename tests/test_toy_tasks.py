"""toy_math and toy_choice: what the questions are, what the harness makes of them, what is held out."""

import hashlib
import random
import re
import socket
from fractions import Fraction
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from tasks.toy.problems import (
    CHOICE_KINDS,
    STEP_WEIGHTS,
    WIDE_KINDS,
    choice_questions,
    make_choice,
    make_problem,
    math_questions,
    new_questions,
)

TASKS = Path(__file__).resolve().parent.parent / "tasks"


@pytest.fixture(scope="module")
def test_problems():
    return math_questions("test")


@pytest.fixture(scope="module")
def tasks():
    def no_network(*_):
        raise OSError("a toy task asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        names = ["toy_math", "toy_math_wide", "toy_math_held_out", "toy_math_new", "toy_math_train", "toy_choice"]
        return manager.load(names)["tasks"]


def contents(split, count=6000):
    rng = random.Random(f"contents {split}")
    return {make_problem(rng, split).content for _ in range(count)}


def test_no_test_content_is_met_in_training(test_problems):
    held_out = {problem.content for problem in test_problems}
    assert len(held_out) >= 1000
    assert not held_out & contents("train")
    for kind in CHOICE_KINDS:
        choices = [make_choice(random.Random(f"{kind} {seed}"), kind, "train") for seed in range(300)]
        assert not held_out & {choice.problem.content for choice in choices}
        assert {choice.problem.split for choice in choice_questions(kind, "test")} == {"test"}


def test_new_questions_are_of_the_test_split_and_none_of_toy_math(test_problems):
    new = {problem.content: problem.split for problem in new_questions("a seed", 500)}
    assert set(new.values()) == {"test"}
    assert len(new) == 500
    assert not new.keys() & {problem.content for problem in test_problems}


def test_working_and_result_are_right(test_problems):
    for problem in test_problems:
        *lines, last = problem.answer.split("\n")
        results = []
        for line in lines:
            left, op, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+) [a-z]+\.", line).groups()
            left, right = Fraction(left), Fraction(right)
            expected = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op]
            assert expected == int(result)
            assert 1 <= expected <= 99
            results.append(int(result))
        assert last == f"#### {results[-1]}"


@pytest.mark.parametrize("wording", ["wide", "held_out"])
def test_other_wordings_tell_right_problems_of_the_same_split(wording):
    problems = math_questions("test", 400, wording)
    assert {problem.split for problem in problems} == {"test"}
    assert {problem.kind for problem in problems} == set(WIDE_KINDS)
    assert {len(problem.steps) for problem in problems} == set(range(1, len(STEP_WEIGHTS[wording]) + 1))
    test_working_and_result_are_right(problems)
    for problem in problems:
        assert "{" not in problem.question
        assert not re.search(r"(^|[.?] )[a-z]", problem.question)  # every sentence begins with a capital or a number


def test_test_questions_are_always_the_same(test_problems):
    choices = [choice for kind in CHOICE_KINDS for choice in choice_questions(kind, "test")]
    assert digest((p.question, p.answer) for p in test_problems) == "c8f4a09f47d1671b"
    wide, held_out = (math_questions("test", 300, wording) for wording in ("wide", "held_out"))
    assert digest((p.question, p.answer) for p in wide) == "8f15d444b1e1e8bc"
    assert digest((p.question, p.answer) for p in held_out) == "bad57178126ddd71"
    assert digest((c.question, c.choices, c.answer) for c in choices) == "1e6a88bd84cc6182"


def digest(items):
    return hashlib.sha256("\n".join(map(repr, items)).encode()).hexdigest()[:16]


def test_choices_hold_one_right_answer():
    for kind in CHOICE_KINDS:
        for choice in choice_questions(kind, "test"):
            step = choice.problem.steps[0]
            assert choice.choices[choice.answer] == (str(step) if kind == "working" else str(step.result))
            assert len(set(choice.choices)) == 4
    answers = [choice.answer for kind in CHOICE_KINDS for choice in choice_questions(kind, "test")]
    assert all(answers.count(letter) > len(answers) / 5 for letter in range(4))


def test_settings_are_tried_on_questions_of_the_training_split(tasks, test_problems):
    task = tasks["toy_math_train"]
    asked, examples = list(task.test_docs()), list(task.fewshot_docs())
    assert len(asked) == 1200
    problems = {problem.content for problem in test_problems}
    assert not problems & {doc["content"] for doc in asked}
    assert not {doc["content"] for doc in examples} & {doc["content"] for doc in asked}
    assert task.config.metric_list == tasks["toy_math"].config.metric_list


def test_toy_math_is_scored_as_gsm8k_is():
    def load(path):
        text = re.sub(r"!function \S+", "function", path.read_text())
        return yaml.safe_load(text)

    ours, gsm8k = (
        load(path) for path in (TASKS / "toy/toy_math.yaml", Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml")
    )
    for key in ("doc_to_target", "output_type", "metric_list", "filter_list", "repeats"):
        assert ours[key] == gsm8k[key]
    assert ours["generation_kwargs"]["until"] == gsm8k["generation_kwargs"]["until"]
