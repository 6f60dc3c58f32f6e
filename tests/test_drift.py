"""The drift map against a literal recomputation, its sums and its command."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import golden_model

from fast_dllm.decode import experiments
from fast_dllm.drift import __main__ as command
from fast_dllm.drift.pictures import PICTURES
from fast_dllm.drift.recorder import Recorder
from fast_dllm.drift.sums import CLASSES, DISTANCES, PARTS, QUANTITIES, SKIPPED_STEPS, SUMS, DriftSums, margin
from fast_dllm.errors import UsageError
from fast_dllm.network.cache import Attend, block_causal_mask, mask_for_heads, rope_tables
from fast_dllm.network.compiled import CompiledExecution
from fast_dllm.network.modes import use_padded_shapes
from fast_dllm.report.drift_maps import drift_maps

MASK, STOP, SIZE, SUB = 319, 2, 32, 8
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 32, "threshold": 0.6}
PLAIN = experiments.load("04_threshold")


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def empty(**changes) -> DriftSums:
    settings = {"model": "golden", "task": "none", "threshold": 0.6, "small_block_size": SUB}
    return DriftSums.empty(36, SIZE, **settings | changes)


def recorded(model, batch: list[list[int]]) -> DriftSums:
    sums = empty()
    with Recorder(model, sums, MASK):
        for ids in batch:
            PLAIN.generate(model, [ids], **COMMON)
    return sums


@pytest.mark.parametrize("mode", ["graphs", "compiled"])
def test_forwards_run_module_by_module_while_they_are_recorded(mode):
    """No hook sees a replayed forward, nor what compiled layers do."""
    model = golden_model("tiny36")
    expected = recorded(model, prompts(40))
    if mode == "graphs":
        use_padded_shapes(model)
    else:
        model.execution = CompiledExecution(model, Path("/none/is/compiled"))
    execution = model.execution
    got = recorded(model, prompts(40))
    assert got.steps == expected.steps > 0
    assert not execution.counts
    assert model.execution is execution


class Watching(Attend):
    """Without a cache; keeps every layer's keys and values."""

    def keys_and_values(self, layer, keys, values):
        self.seen[layer] = keys[0, -SIZE:].flatten(1).double().numpy(), values[0, -SIZE:].flatten(1).double().numpy()
        return keys, values


def literal_step(model, tokens: list[int]) -> dict[str, np.ndarray]:
    """What every layer gives for the last block of `tokens`, by one forward of everything, no cache. (L, 32, C)."""
    length = len(tokens)
    cos, sin = rope_tables(torch.arange(length), model.config, torch.float32)
    mask = mask_for_heads(block_causal_mask(length, length, SIZE, torch.device("cpu")), model.config)
    attend = Watching(cos[:, None], sin[:, None], mask)
    object.__setattr__(attend, "seen", {})
    x, found = model.model.embed_tokens(torch.tensor([tokens])), {name: [] for name in QUANTITIES}
    for layer in model.model.layers:
        attention = layer.self_attn(layer.input_layernorm(x), attend)
        mlp = layer.mlp(layer.post_attention_layernorm(x + attention))
        given = {"attention": attention, "mlp": mlp, "output": x + attention + mlp, "residual": attention + mlp}
        for name, value in given.items():
            found[name].append(value[0, -SIZE:].double().numpy())
        x = x + attention + mlp
    for index in range(len(model.model.layers)):
        found["keys"].append(attend.seen[index][0])
        found["values"].append(attend.seen[index][1])
    return {name: np.stack(each) for name, each in found.items()}


def literal_map(model, batch: list[list[int]]) -> DriftSums:
    sums = empty()
    for question, ids in enumerate(batch):
        tokens, before, earlier, step = list(ids), None, None, 0
        for event in PLAIN.denoise(model, [ids], **COMMON):
            if event.kind == "full":
                end = event.start // SIZE * SIZE + SIZE
                now_tokens = tokens + [MASK] * (end - len(tokens))
                now = literal_step(model, now_tokens), now_tokens
                if before is not None:
                    add_literally(sums, now, before, earlier, step, question % PARTS)
                before, earlier, step, tokens = now, before, step + 1, list(now_tokens)
            else:
                before, earlier, step = None, None, 0
            for position, token in zip(event.positions, event.tokens, strict=True):
                tokens[position : position + 1] = [token]
    return sums


def add_literally(sums: DriftSums, now, before, earlier, step: int, part: int) -> None:
    sums.steps += 1
    (given, tokens), (old, old_tokens) = now, before
    tokens, old_tokens = tokens[-SIZE:], old_tokens[-SIZE:]
    new = [row for row in range(SIZE) if tokens[row] != old_tokens[row]]
    for q, quantity in enumerate(QUANTITIES):
        for layer in range(sums.num_layers):
            for row in range(SIZE):
                a, b = given[quantity][layer, row], old[quantity][layer, row]
                values = [abs(a - b).sum(), abs(b).sum(), a @ b / np.linalg.norm(a) / np.linalg.norm(b), 1.0]
                kind = "just unmasked" if row in new else "still masked" if tokens[row] == MASK else "unmasked before"
                sums.by_class[q, :, layer, step, CLASSES.index(kind)] += values
                for d, (least, most) in enumerate(DISTANCES):
                    if least <= min(abs(row - other) for other in new) <= most:
                        sums.by_distance[q, :, layer, d] += values
    start = tokens.index(MASK) // SUB * SUB
    rows = [max(row - 1, 0) for row in range(start, start + SUB)]
    for lag, past in enumerate((before, earlier)):
        if past is None:
            continue
        change = (given["residual"] - past[0]["residual"])[:, rows]
        for a in range(sums.num_layers + 1):
            for b in range(sums.num_layers + 1):
                low, high = sorted((a, b))
                sums.ranges[part, lag, step % 6, a, b] += abs(change[low:high].sum(axis=0)).sum()
        entering = np.concatenate([given["output"][:1] - given["residual"][:1], given["output"]])
        sums.leaving[part, lag, step % 6] += abs(entering[:, rows]).sum(axis=(1, 2))


@pytest.fixture(scope="module")
def both(golden_models) -> tuple[DriftSums, DriftSums]:
    model, batch = golden_models["tiny36"], prompts(20, 41)
    with torch.inference_mode():
        return recorded(model, batch), literal_map(model, batch)


def assert_same(found: DriftSums, expected: DriftSums) -> None:
    assert found.steps == expected.steps > 8
    for name in ("by_class", "by_distance", "ranges", "leaving"):
        mine, literal = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(mine, literal, rtol=2e-3, atol=1e-4 * abs(literal).max(), err_msg=name)
        assert ((literal != 0) == (mine != 0)).mean() > 0.99, name


def test_the_map_is_a_literal_recomputation(both):
    assert_same(*both)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_rows_read", lambda self, tokens: list(range(8))),
        ("_of_this_step", lambda self, attend, row: {**ORIGINAL(self, attend, row), "keys": torch.ones(36, 32, 16)}),
    ],
)
def test_a_planted_fault_is_seen(tiny36, both, monkeypatch, name, fault):
    monkeypatch.setattr(Recorder, name, fault)
    with pytest.raises(AssertionError):
        assert_same(recorded(tiny36, prompts(20, 41)), both[1])


ORIGINAL = Recorder._of_this_step


def test_recording_changes_no_token_and_leaves_nothing_behind(tiny36):
    ids = prompts(41)
    plain = PLAIN.generate(tiny36, ids, **COMMON)
    sums = empty()
    with Recorder(tiny36, sums, MASK):
        assert PLAIN.generate(tiny36, ids, **COMMON) == plain
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny36.modules())
    steps = sums.steps
    PLAIN.generate(tiny36, ids, **COMMON)
    assert sums.steps == steps > 0


def test_several_sequences_or_a_window_are_refused(tiny36):
    with pytest.raises(ValueError, match="one whole block at a time"), Recorder(tiny36, empty(), MASK):
        PLAIN.generate(tiny36, prompts(5, 6), **COMMON)


def test_maps_of_two_runs_add_up_to_the_map_of_both(tiny36, tmp_path):
    one, two = (recorded(tiny36, [ids]) for ids in prompts(20, 41))
    one.questions, two.questions = 1, 1
    one.write(tmp_path / "one.json")
    merged = DriftSums.read(tmp_path / "one.json") + two
    together = recorded(tiny36, prompts(20, 41))
    np.testing.assert_allclose(merged.by_class, together.by_class, rtol=1e-5)  # a file has seven digits
    np.testing.assert_allclose(merged.ranges.sum(axis=0), together.ranges.sum(axis=0), rtol=1e-5)
    assert (merged.questions, merged.steps) == (2, together.steps)
    for other in (replace(two, threshold=1.0), replace(two, model="7B"), DriftSums.empty(28, 32, model="golden",
                  task="none", threshold=0.6, small_block_size=8)):  # fmt: skip
        with pytest.raises(UsageError, match="do not add up"):
            one + other


def test_costs_are_of_ranges_and_the_table_marks_the_least(both):
    found = both[0]
    two, _, three = (found.cost(skipped) for skipped in SKIPPED_STEPS)
    assert two.shape == (36, 37)
    assert np.isnan(two[5, 5])
    assert np.isfinite(two[np.triu_indices(36, 1, 37)]).all()
    assert (three > two)[np.triu_indices(36, 1, 37)].mean() > 0.9  # a store two steps old is worse
    rows = found.table().splitlines()[2:]
    assert len(rows) == 25
    least = min(range(25), key=lambda first: two[first, first + 12])
    assert "(least)" in rows[least].split("|")[2]
    assert sum("(least)" in row.split("|")[2] for row in rows) == 1
    # on even steps every layer runs at k = 2: what was recorded there is nothing to it
    found = replace(found, ranges=found.ranges.copy())
    found.ranges[:, :, ::2] = 1e9
    np.testing.assert_array_equal(found.cost(SKIPPED_STEPS[0]), two)
    assert (found.cost(SKIPPED_STEPS[2]) > three)[np.triu_indices(36, 1, 37)].all()
    with pytest.raises(UsageError, match="a range of 40 layers does not fit in the model's 36"):
        found.table(40)


def test_a_margin_is_that_of_a_mean_where_the_statistic_is_a_mean():
    values = np.random.default_rng(3).normal(size=PARTS)
    without = np.array([np.delete(values, index).mean() for index in range(PARTS)])
    expected = 2.2622 * values.std(ddof=1) / PARTS**0.5  # Student's t of 9 degrees of freedom
    np.testing.assert_allclose(margin(without), expected, rtol=1e-4)


def test_the_table_has_margins_and_marks_ranges_that_cannot_be_told_from_the_least():
    noise = np.random.default_rng(4).normal(size=(PARTS, 1, 1))
    sums = DriftSums.empty(3, SIZE, model="m", task="t", threshold=0.9, small_block_size=SUB)
    sums.leaving += 100.0
    changes = {(0, 1): 30 + noise, (1, 2): 20 + noise, (2, 3): 20.5 - noise}  # of the three ranges of one layer
    for (first, stop), change in changes.items():
        sums.ranges[..., first, stop] += change  # (P, G, C)
    rows = [row.split("|")[2].strip() for row in sums.table(1).splitlines()[2:]]
    half = 100 * margin(sums.costs_without(SKIPPED_STEPS[0])[:, 0, 1])
    assert rows[0] == f"{30 + noise.mean():.2f}% ± {half:.2f}"
    assert rows[1].endswith(" (least)") != rows[2].endswith(" (least)")
    assert rows[1].endswith(" (as low)") != rows[2].endswith(" (as low)")


def test_the_command_writes_the_map_its_table_and_its_pictures(tmp_path, capsys):
    folder = tmp_path / "results" / "drift" / "toy_math_limit_2"
    words = ["--model", "tiny", "--task", "toy_math", "--limit", "2", "--output", str(folder)]
    assert command.main(words) == 0
    told = capsys.readouterr().out
    assert "2 questions" in told
    assert (folder / "ranges.md").read_text() in told
    assert set(drift_maps(tmp_path, "toy_math", {"tiny"})) == {
        f"drift_toy_math_limit_2_{name}" for name in ("depth", "layer_step", "ranges", "row_class")
    }
    assert not drift_maps(tmp_path, "toy_math", {"another"})
    axes = PICTURES["depth"](DriftSums.read(folder / "drift.json")).axes
    for panel in axes:  # no raw LaTeX
        assert "$" not in "".join(panel.yaxis.get_major_formatter()(value) for value in (1, 10, 100))
    content = json.loads((folder / "drift.json").read_text())
    assert (content["model"], content["questions"], content["sums"]) == ("tiny", 2, list(SUMS))
    twice = tmp_path / "twice"
    assert command.main(["--merge", *[str(folder / "drift.json")] * 2, "--output", str(twice)]) == 0
    assert (twice / "ranges.md").read_text() == (folder / "ranges.md").read_text()
    assert DriftSums.read(twice / "drift.json").steps == 2 * content["steps"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "nope"], "no task named 'nope'; valid: gsm8k"),
        (["--task", "toy_choice", "--model", "tiny"], "toy_choice is scored by log-likelihood"),
        (["--limit", "0", "--model", "tiny"], "--limit must be at least 1, not 0"),
        (["--threshold", "2", "--model", "tiny"], "threshold must be a number from 0 to 1"),
        (["--merge", "none.json"], "--merge needs --output"),
        (["--merge", "none.json", "--output", "x"], "none.json is no drift map"),
        (["--depth", "3"], "unrecognized arguments: --depth 3"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(words, message, capsys):
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("fast_dllm.drift: error: ")
    assert message in told
    assert told.count("\n") == 1
