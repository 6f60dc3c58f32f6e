"""Two settings on several sets of questions: ratios of forwards with intervals, pooled p, losses that are excluded."""

from __future__ import annotations

import random

import numpy as np
import pytest
from report_project import Project, answers

from fast_dllm.record.cost import Cost
from fast_dllm.report.build import control_runs
from fast_dllm.report.claims import compare, largest_loss, pooled, runs_of_task, speed_ratio, tables_of_task
from fast_dllm.report.statistics import mcnemar

NUM = 400


def costs_of(task: str, layers: list[int], tokens: int = 10) -> dict[tuple[str, int], Cost]:
    """A prefill of 36 layers and the rest in denoising steps."""
    return {
        (task, i): Cost(new_tokens=tokens, layer_forwards={"prefill": 36, "full": count - 36})
        for i, count in enumerate(layers)
    }


@pytest.fixture
def project(tmp_path):
    made = Project(tmp_path)
    for name in ("01_adaptive_skip", "04_threshold", "07_rules"):
        made.experiment(name)

    def run(experiment, config, wrong, layers=None, task="toy_math", **more):
        costs = costs_of(task, layers) if layers else {}
        folder = made.run(config, answers(NUM, wrong=wrong), experiment=experiment, task=task, costs=costs, **more)
        target = made.folder(config, experiment, task, base="artifacts")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)

    draw = random.Random(2)
    layers = [draw.randrange(100, 400) for _ in range(NUM)]
    for task, wrong in (("toy_math", range(10)), ("toy_math_new", range(20))):
        run("04_threshold", "s8_t0.90", wrong, layers, task=task)
        run("01_adaptive_skip", "r0.90_s1", range(4), [(each + 36) // 2 for each in layers], task=task)
    run("07_rules", "w16_t0.90", range(10), [draw.randrange(100, 400) for _ in range(NUM)], forwards={"full": 500})
    run("07_rules", "prefix0.20", range(10), None, forwards={"full": 400, "commit": 100})
    return made


def test_a_ratio_of_forwards_has_the_interval_of_its_questions(project):
    runs = runs_of_task(project.root, "toy_math")
    plain, reread, window = (
        runs[name] for name in ("04_threshold/s8_t0.90", "01_adaptive_skip/r0.90_s1", "07_rules/w16_t0.90")
    )
    steps = speed_ratio(reread, plain, steps_only=True)
    assert steps.value == pytest.approx(2, abs=0.01)
    assert steps.interval.high - steps.interval.low < 0.01  # every question has half the steps
    assert speed_ratio(reread, plain).value < 1.9  # the prefills are not halved
    found = speed_ratio(window, plain)
    own, its = (np.array([q.layers for q in run.questions.questions]) for run in (window, plain))
    value = its.sum() / own.sum()
    error = np.std(its / its.mean() - own / own.mean()) / np.sqrt(NUM) * value  # the delta method
    assert found.value == pytest.approx(value)
    assert found.interval.low == pytest.approx(value - 1.96 * error, abs=0.2 * error)
    assert found.interval.high == pytest.approx(value + 1.96 * error, abs=0.2 * error)


def test_without_the_forwards_of_each_question_a_ratio_has_no_interval(project):
    runs = runs_of_task(project.root, "toy_math")
    found = speed_ratio(runs["07_rules/prefix0.20"], runs["07_rules/w16_t0.90"])
    assert (found.value, found.interval) == (pytest.approx(1.0), None)
    assert speed_ratio(runs["07_rules/prefix0.20"], runs["07_rules/w16_t0.90"], True).value == pytest.approx(500 / 400)


def test_a_claim_is_compared_on_each_set_and_pooled(project):
    tasks = {task: runs_of_task(project.root, task) for task in ("toy_math", "toy_math_new")}
    pair = "01_adaptive_skip/r0.90_s1", "04_threshold/s8_t0.90"
    found = compare([pair, ("07_rules/w16_t0.90", pair[1])], tasks)
    assert [(each.setting[:2], each.task) for each in found] == [
        ("01", "toy_math"),
        ("01", "toy_math_new"),
        ("07", "toy_math"),
    ]
    assert all(each.contrast.p_adjusted >= each.contrast.p_value for each in found)
    gain, interval, p = pooled([each.contrast for each in found[:2]])
    assert gain == pytest.approx(22 / (2 * NUM))
    assert interval.low > 0
    assert p == mcnemar(22, 0)


def test_the_loss_that_is_excluded_grows_with_the_number_of_settings(project):
    tasks = {"toy_math": runs_of_task(project.root, "toy_math")}
    (found,) = compare([("07_rules/w16_t0.90", "04_threshold/s8_t0.90")], tasks)
    assert largest_loss(found.contrast, 1) == pytest.approx(-found.contrast.interval.low)
    assert largest_loss(found.contrast, 20) > largest_loss(found.contrast, 1)


def test_every_rule_of_a_control_experiment_is_on_the_curve_to_beat(project):
    path = project.root / "experiments" / "07_rules" / "matrix.json"
    path.write_text(
        '{"compare_with": "w16_t0.90", "control": true, "configurations": {"w16_t0.90": {"threshold": 0.9}, '
        '"prefix0.20": {"threshold": 0.8}}}'
    )
    names = {f"{run.experiment}/{run.config}" for run in control_runs(tables_of_task(project.root, "toy_math"))}
    assert {"07_rules/w16_t0.90", "07_rules/prefix0.20"} <= names
    assert "01_adaptive_skip/r0.90_s1" not in names
