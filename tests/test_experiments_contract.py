"""What every folder under experiments/ owes, checked by existing; and proof that each check can fail.

With its defaults an experiment is plain decoding, token for token; a batch gives each prompt what it gets alone; what a
forward costs is counted by kind, as the layers really ran; its README and matrix say what it asks and what it runs.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from golden_models import GOLDEN_MODELS, ROOT

from fast_dllm.decode import experiments
from fast_dllm.decode.experiments import Experiment
from fast_dllm.decoding import FORWARD_KINDS, Answer
from fast_dllm.errors import UsageError
from fast_dllm.spec.matrix import matrix_of

COMMON = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 32, "threshold": 0.6}
SAMPLED = {"temperature": 1.0, "top_p": 0.95}
SHARED_KNOBS = ("threshold", "small_block_size", "max_new_tokens", "use_block_cache", "refresh")
README_PARTS = ("**Question.**", "**Method.**", "**Finding", "on the 7B**", "bash sbatch/run.sh --")
NAMES = experiments.available()


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def some_configurations(name: str) -> list[Mapping[str, object]]:
    """The first and the last of the matrix; the whole of a wide matrix would take minutes."""
    configurations = list(matrix_of(name, ROOT).configurations.values())
    return configurations[:: max(len(configurations) - 1, 1)]


def in_words(sampling: Mapping[str, object]) -> str:
    return " and sampling" if sampling else ""


# -- the contract ------------------------------------------------------------------------------------------------------
def assert_neutral_is_plain(experiment: Experiment, model, batch: list[list[int]]) -> None:
    """Its defaults, and whatever its knobs say where reuse_k is 1, give plain decoding's tokens and forwards."""
    settings = [{}]
    if "reuse_k" in experiment.knobs and experiment.name:
        settings += [{**some_configurations(experiment.name)[-1], "reuse_k": 1}]
    refresh = experiment.knobs.get("refresh", "block")
    for knobs in settings:
        shared = {"refresh": refresh} | {key: value for key, value in knobs.items() if key in SHARED_KNOBS}
        for sampling in ({}, SAMPLED):
            mine = experiment.generate(model, batch, generator=generators(len(batch)), **COMMON | sampling | knobs)
            plain = experiments.load(None).generate(
                model, batch, generator=generators(len(batch)), **COMMON | sampling | shared
            )
            assert mine == plain, (
                f"{experiment.name} with {knobs or 'its defaults'}{in_words(sampling)} does not answer as plain "
                f"decoding does (generation_functions.py with {shared}): each knob's default must change nothing"
            )


def assert_each_row_as_if_alone(experiment: Experiment, model, batch: list[list[int]], knobs: Mapping) -> None:
    for sampling in ({}, SAMPLED):
        settings = COMMON | sampling | knobs
        together = experiment.generate(model, batch, generator=generators(len(batch)), **settings)
        in_turn = experiment.generate(model, batch, generator=generators(len(batch)), num_rows=1, **settings)
        assert together == in_turn, (
            f"{experiment.name} with {dict(knobs)}{in_words(sampling)}: a prompt gets another answer, or other "
            "forwards, in a batch than alone; a policy must not know of its neighbours"
        )


class LayersRun:
    """Rows that the layers of a model really ran: attention and MLP by their shares of a layer's weights."""

    def __init__(self, model):
        layer = model.model.layers[0]
        size = {part: sum(each.numel() for each in part.parameters()) for part in (layer, layer.mlp)}
        self.mlp_share, self.row_layers = size[layer.mlp] / size[layer], 0.0
        self.hooks = []
        for layer in model.model.layers:
            self.hooks += [layer.self_attn.register_forward_hook(self._of(1 - self.mlp_share))]
            self.hooks += [layer.mlp.register_forward_hook(self._of(self.mlp_share))]

    def _of(self, share: float):
        def count(module, inputs, output) -> None:
            self.row_layers += share * inputs[0].shape[0] * inputs[0].shape[1]

        return count

    def __enter__(self) -> LayersRun:
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def assert_costs_are_counted(experiment: Experiment, model, batch: list[list[int]], knobs: Mapping) -> None:
    depth, size = model.config.num_hidden_layers, 32
    told: list[Counter] = [Counter() for _ in batch]
    found = {}
    with LayersRun(model) as ran:
        for event in experiment.denoise(model, batch, **COMMON | knobs):
            told[event.row][event.kind] += 1
            assert (event.kind == "partial") == (0 < len(event.layers_at_rest) < depth), (
                f"a {event.kind} forward with {len(event.layers_at_rest)} of {depth} layers at rest: some of them rest "
                "in a partial forward and in no other"
            )
            if event.generation is not None:
                found[event.row] = event.generation
    for row, got in found.items():
        counted = {kind: count for kind, count in got.forwards.items() if count}
        assert counted == dict(told[row]), (
            f"{experiment.name} with {dict(knobs)}: forwards counted {counted}, told in events {dict(told[row])}"
        )
        for kind, layers in got.layer_forwards.items():
            count, rows = got.forwards[kind], got.row_layer_forwards[kind]
            assert FORWARD_KINDS[kind].runs_layers, f"layers are counted for {kind} forwards, which run none"
            is_right = (layers < count * depth) if kind == "partial" else layers == count * depth
            assert is_right, f"{count} {kind} forwards count {layers} layers; the model has {depth}"
            most = count * depth * size
            if kind in ("full", "commit") and not got.guesses_offered:
                assert rows == most, f"{count} {kind} forwards count {rows} rows times layers, not {most}: whole blocks"
            if kind == "sub":
                assert rows < most, f"{count} sub forwards count {rows} rows times layers, as many as whole blocks"
        states = sum(got.forwards[kind] for kind in ("full", "commit")) + sum(got.guesses_offered.values())
        rows = sum(got.row_layer_forwards.get(kind, 0) for kind in ("full", "commit"))
        assert not got.guesses_offered or rows == states * depth * size, (
            f"{states} states count {rows} rows times layers"
        )
    counted = sum(sum(got.row_layer_forwards.values()) for got in found.values())
    assert counted == pytest.approx(ran.row_layers), (
        f"{experiment.name} with {dict(knobs)}: {counted} rows times layers are counted, {ran.row_layers} ran"
    )


def assert_folder_is_whole(name: str, root) -> None:
    text = (root / "experiments" / name / "README.md").read_text()
    title = text.partition("\n")[0]
    assert text.startswith(f"# {name}: "), f"experiments/{name}/README.md must begin with '# {name}: ', not {title!r}"
    missing = [part for part in README_PARTS if part not in text]
    assert missing == [], f"experiments/{name}/README.md lacks {', '.join(missing)}"
    experiment = experiments.load(name)
    for configuration, arguments in matrix_of(name, root).configurations.items():
        options = experiment.options_type(**{"mask_id": 319, "stop_token": 2} | dict(arguments))
        for num_layers in (28, 36):  # the published 7B's, and the embedded model's
            try:
                options.check(num_layers)
            except ValueError as error:
                pytest.fail(f"experiments/{name}: configuration {configuration}, {num_layers} layers: {error}")


# -- every experiment keeps it -----------------------------------------------------------------------------------------
@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", GOLDEN_MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_its_neutral_knobs_are_plain_decoding(golden_models, name, model):
    assert_neutral_is_plain(experiments.load(name), golden_models[model], prompts(20, 41))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_batch_gets_what_it_gets_alone(tiny36, name):
    for knobs in some_configurations(name):
        assert_each_row_as_if_alone(experiments.load(name), tiny36, prompts(20, 32), knobs)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_costs_is_counted_by_kind_as_the_layers_ran(tiny36, name):
    for knobs in some_configurations(name):
        assert_costs_are_counted(experiments.load(name), tiny36, prompts(20, 41), {"max_new_tokens": 64} | knobs)


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_and_its_matrix_are_whole(name):
    assert_folder_is_whole(name, ROOT)


# -- and each check can fail -------------------------------------------------------------------------------------------
@pytest.fixture
def planted(tmp_path, monkeypatch):
    """plant(old, new): 01_adaptive_skip with one thing changed, loaded."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.setattr(experiments, "EXPERIMENTS", tmp_path / "experiments")

    def plant(old: str, new: str, file: str = "generation_functions.py", name: str = "01_adaptive_skip") -> Experiment:
        path = tmp_path / "experiments" / name / file
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))
        return experiments.load(name)

    return plant


FULL = 'Forward("full", block, wanted=rows, keep=keep)'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reread_above: float = 1.0", "reread_above: float = 0.3"),
        ("most_shared = 1 if bar == 1 else options.reuse_k or size", "most_shared = options.reuse_k or 2"),
        (FULL, 'Forward("full", block, wanted=range(start, size))'),  # greedy the same, other draws
    ],
)
def test_knobs_that_are_not_neutral_are_caught(tiny36, planted, old, new):
    with pytest.raises(AssertionError):
        assert_neutral_is_plain(planted(old, new), tiny36, prompts(20, 41))


def test_rows_that_know_of_each_other_are_caught(tiny36, planted):
    planted("@dataclass(frozen=True)", "BEGUN: list[int] = []\n\n\n@dataclass(frozen=True)")
    planted("    size, sub_size, bar =", "    BEGUN.append(answer.row)\n    size, sub_size, bar =")
    experiment = planted("confidence > bar for", "confidence > bar * (len(BEGUN) % 3 > 1) for")
    with pytest.raises(AssertionError):
        assert_each_row_as_if_alone(experiment, tiny36, prompts(3, 32, 41), {"reread_above": 0.5})


def test_a_forward_under_another_name_is_caught(tiny36, planted):
    experiment = planted(FULL, FULL.replace("full", "sub"))
    with pytest.raises(AssertionError):
        assert_costs_are_counted(experiment, tiny36, prompts(41), {"reread_above": 0.5})


@pytest.mark.parametrize("factor", [0, 2])
def test_layers_that_are_counted_wrongly_are_caught(tiny36, monkeypatch, factor):
    count = Answer.count

    def wrong(answer, kind, layers, row_layers):
        count(answer, kind, layers, row_layers * (factor if kind == "prefill" else 1))

    monkeypatch.setattr(Answer, "count", wrong)
    with pytest.raises(AssertionError):
        assert_costs_are_counted(experiments.load("01_adaptive_skip"), tiny36, prompts(41), {"reread_above": 0.5})


def test_a_step_that_is_told_and_not_counted_is_caught(tiny36, monkeypatch):
    fill = Answer.fill

    def forgetful(answer, prediction, *rest):
        event = fill(answer, prediction, *rest)
        generation = event.generation
        if generation is None:
            return event
        return replace(event, generation=replace(generation, forwards={**generation.forwards, "reused": 0}))

    monkeypatch.setattr(Answer, "fill", forgetful)
    with pytest.raises(AssertionError):
        assert_costs_are_counted(experiments.load("01_adaptive_skip"), tiny36, prompts(41), {"reread_above": 0.5})


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("README.md", "**Method.**", "Method.", "README.md lacks "),
        (
            "matrix.json",
            '"reread_above": 0.5}',
            '"reread_above": 5}',
            "configuration r0.50, 28 layers: reread_above must",
        ),
        ("matrix.json", '"compare_with": "r1.00"', '"compare_with": "r2.00"', "compare_with must be one of"),
    ],
)
def test_a_folder_that_is_not_whole_is_caught_in_words(planted, tmp_path, file, old, new, message):
    planted(old, new, file)
    with pytest.raises((AssertionError, UsageError, pytest.fail.Exception), match=message):
        assert_folder_is_whole("01_adaptive_skip", tmp_path)


def test_every_folder_is_looked_at():
    """`available` is what the checks above go through; a folder that is no experiment would go unchecked."""
    folders = sorted(path.name for path in (ROOT / "experiments").iterdir() if path.is_dir() and path.name[0] != "_")
    assert folders == NAMES
    assert json.loads((ROOT / "experiments" / "04_threshold" / "matrix.json").read_text())["compare_with"] == "s8_t0.90"
