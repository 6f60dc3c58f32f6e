"""Layers that rest while others run: against a literal form that shares no code with the store, and what is refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from golden_models import eager, golden_model
from transfers import FakeDevice

from fast_dllm.decode import experiments
from fast_dllm.decode.decoding_run import Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decoding import Forward, Options, Reuse
from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.packing import BlockRows, pack_block
from fast_dllm.sampling import predict, rows_to_unmask

MASK, STOP, SIZE = 319, 2, 32
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 32, "threshold": 0.6}
RESIDUAL = experiments.load("02_residual_reuse")
subset_layers = sys.modules[RESIDUAL.decode_one.__module__].subset_layers


def prompt(length: int) -> list[int]:
    rng = random.Random(5)
    return [rng.randrange(3, 318) for _ in range(length)]


class Literal:
    """The policy in its plainest form, for one sequence: what each layer added is stored and added by itself."""

    def __init__(self, model, layers: range, part: str, order: int, tolerance: float | None):
        self.model, self.layers, self.part, self.order, self.tolerance = model, layers, part, order, tolerance
        self.stores: list[tuple[int, dict[int, torch.Tensor]]] = []  # (step, what each layer added), of this block
        self.entered = torch.zeros(0)

    def step(self, cache, tokens: list[int], counter: int, rests: bool) -> tuple[torch.Tensor, bool]:
        """Hidden rows (32, C) after the last layer, and whether the layers rested."""
        inputs = pack_block(cache, BlockRows([0], [tokens], [0], [list(range(SIZE))]))
        x, added = self.model.model.embed_tokens(inputs.ids), {}
        for index, layer in enumerate(self.model.model.layers):
            if index == self.layers.start:
                if rests and self.tolerance is not None:
                    rests = self.drift(x) < self.tolerance
                entering = x
            if index not in self.layers:
                x = layer(x, inputs.attend)
                continue
            middle = layer.attention(x, inputs.attend) if self.part == "mlp" or not rests else x
            base = middle if self.part == "mlp" else x
            if rests:
                x = base + self.forecast(index, counter)
                continue
            x = middle + layer.mlp(layer.post_attention_layernorm(middle))
            added[index] = x - base
        if not rests:
            self.stores.append((counter, added))
            self.entered = entering
        return self.model.model.norm(x)[0], rests

    def forecast(self, index: int, counter: int) -> torch.Tensor:
        (last_step, last), *_ = self.stores[:-2:-1]
        if not self.order or len(self.stores) < 2:
            return last[index]
        step, before = self.stores[-2]
        return last[index] + (last[index] - before[index]) / (last_step - step) * (counter - last_step)

    def drift(self, x: torch.Tensor) -> float:
        rows = self.read
        then = self.entered[0, rows].double()
        return ((x[0, rows].double() - then).abs().mean() / then.abs().mean()).item()

    def decode(self, ids: list[int], reuse_k: int) -> tuple[list[int], int, int]:
        """(new tokens, full forwards, partial forwards) of one block; sub-blocks of 8."""
        model, first = self.model, len(ids) // SIZE * SIZE
        executor = eager(model, 1, first + SIZE)
        cache = executor.cache
        if first:
            executor.prefill([0], [ids[:first]])
        tokens = ids[first:] + [MASK] * (first + SIZE - len(ids))
        counter, counts = 0, [0, 0]
        for start in range(0, SIZE, 8):
            while MASK in tokens[start : start + 8]:
                self.read = [max(row - 1, 0) for row in range(start, start + 8)]
                may = bool(self.stores) and counter - self.stores[-1][0] < reuse_k
                hidden, rested = self.step(cache, tokens, counter, may)
                counts[rested] += 1
                candidates, confidences = predict(model.lm_head(hidden[self.read])[None], MASK)
                masked = [token == MASK for token in tokens[start : start + 8]]
                for row in rows_to_unmask(confidences[0].tolist(), masked, COMMON["threshold"]):
                    tokens[start + row] = candidates[0, row].item()
                counter += 1
                if STOP in tokens and MASK not in tokens[: tokens.index(STOP)]:
                    return tokens[len(ids) - first : tokens.index(STOP) + 1], *counts
        return tokens[len(ids) - first :], *counts


@pytest.mark.sampled(3)
@pytest.mark.parametrize("part", ["both", "mlp"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize(("reuse_k", "subset"), [(2, "first"), (3, "middle"), (3, "20-35")])
def test_the_policy_is_the_literal_form(tiny36, part, order, tolerance, reuse_k, subset):
    ids = prompt(35)
    literal = Literal(tiny36, subset_layers(subset, 36), part, order, tolerance)
    with torch.inference_mode():
        expected, full, partial = literal.decode(ids, reuse_k)
    knobs = {"part": part, "order": order, "tolerance": tolerance, "reuse_k": reuse_k, "layer_subset": subset}
    (got,) = RESIDUAL.generate(tiny36, [ids], **COMMON, **knobs)
    assert (got.tokens, got.forwards["full"], got.forwards["partial"]) == (expected, full, partial)
    assert partial > 0 or tolerance is not None


def test_knobs_make_a_difference(tiny36):
    """Else the comparison above would be of plain decoding with itself."""
    found = set()
    for knobs in ({}, {"part": "mlp"}, {"order": 1}, {"layer_subset": "last"}, {"layer_subset": "first"}):
        settings = COMMON | {"reuse_k": 3, "layer_subset": "middle"} | knobs
        found.add(tuple(RESIDUAL.generate(tiny36, [prompt(35)], **settings)[0].tokens))
    plain = RESIDUAL.generate(tiny36, [prompt(35)], **COMMON)[0].tokens
    assert len(found | {tuple(plain)}) == 6


@pytest.mark.parametrize("part", ["residual", "mlp"])
def test_layers_that_rest_keep_their_keys_and_values_and_the_others_write_theirs(tiny36, part):
    layers, block = range(12, 24), slice(0, SIZE)
    store = LayerStore(layers, part, 1, SIZE, tiny36.lm_head.weight)
    executor = eager(tiny36, 1, SIZE)
    cache = executor.cache
    with torch.inference_mode():
        executor.run_block(BlockRows([0], [prompt(SIZE)], [0], [[0]]), store=store, choose=lambda *_: [False])
        keys, values = cache.keys[:, 0, block].clone(), cache.values[:, 0, block].clone()
        other = [token + 1 for token in prompt(SIZE)]
        executor.run_block(BlockRows([0], [other], [0], [[0]]), store=store, choose=lambda *_: [True])
    for layer in range(36):
        rests = layer in layers and part == "residual"
        assert torch.equal(cache.keys[layer, 0, block], keys[layer]) == rests, layer
        assert torch.equal(cache.values[layer, 0, block], values[layer]) == rests, layer


def test_a_decision_in_mid_forward_is_taken_for_each_sequence_by_itself(tiny36):
    """Sequences that rest and that run share a forward, and each is told which it was."""
    batch = [prompt(length) for length in (20, 35, 41, 60)]
    settings = COMMON | {"reuse_k": 3, "layer_subset": "middle", "tolerance": 0.05}
    together = RESIDUAL.generate(tiny36, batch, **settings)
    assert together == [RESIDUAL.generate(tiny36, [ids], **settings)[0] for ids in batch]
    beat = RESIDUAL.generate(tiny36, batch, **settings | {"tolerance": None})
    assert 0 < sum(got.forwards["partial"] for got in together) < sum(got.forwards["partial"] for got in beat)


def test_drift_is_relative_to_what_entered_when_the_layers_last_ran():
    """Of the rows that are read, for each sequence by itself."""
    store = LayerStore(range(3, 5), "residual", 2, SIZE, torch.zeros(1, 4))
    then, cache_rows, block_rows = torch.ones(2, 8, 4), torch.tensor([[1], [0]]), torch.arange(8, 16).expand(2, 8)
    store.write(then, then, cache_rows, block_rows)
    now = torch.stack((3 * then[0], 0.5 * then[1]))
    now[:, 5:] = 100.0  # rows that are not read
    assert store.drift(now, cache_rows, block_rows, torch.arange(5).expand(2, 5)).tolist() == [2.0, 0.5]


def test_a_decision_costs_one_transfer_more(monkeypatch):
    decisions = []
    drift = LayerStore.drift
    monkeypatch.setattr(LayerStore, "drift", lambda *given: decisions.append(1) or drift(*given))
    with torch.inference_mode(), FakeDevice() as device:
        model = device.move(golden_model("tiny36"))
        knobs = {"reuse_k": 3, "layer_subset": "middle", "order": 1, "tolerance": 0.05}
        (got,) = RESIDUAL.generate(model, [prompt(36)], **COMMON, **knobs)
    unread = 1  # the prefill of a prompt that ends within a block
    assert sum(device.to_host.values()) == sum(got.forwards.values()) - unread + len(decisions)
    assert decisions


def run_forwards(model, *made: Callable[[list[int]], Forward]) -> None:
    """What an engine says of a policy that asks for these, one after another, in a block of 32 tokens."""

    def decode_one(answer, options):
        answer.open_block(SIZE)
        for make in made:
            yield make(answer.tokens[:SIZE])
        yield Forward("nothing")

    list(Engine(model, decode_one, Options(MASK, STOP, 32)).run([Prompt(prompt(5))]))


@pytest.mark.parametrize(
    ("reuses", "message"),
    [
        (
            [Reuse(range(3, 5), "residual", read=True)],
            r"read from layers range\(3, 5\) before all of them were stored$",
        ),
        ([Reuse(range(3, 5), "mlp"), Reuse(range(3, 5), "residual", read=True)], "before all of them were stored$"),
        (
            [Reuse(range(3, 5), "mlp", order=1), Reuse(range(3, 5), "mlp", read=True, order=1, ahead=0.5)],
            "before all of them were stored twice",
        ),
        ([Reuse(range(3, 37), "mlp")], "not within the model's 36"),
        ([Reuse(range(3, 5), "keys")], "part must be one of output, residual, mlp"),
        ([Reuse(range(3, 5), "mlp", order=2)], "order must be one of 0, 1, not 2"),
        ([Reuse(range(3, 5), "mlp", order=1)] * 2 + [Reuse(range(3, 5), "mlp", read=True, order=1, ahead=0.5)], "kind"),
    ],
)
def test_a_store_that_cannot_be_read_or_made_is_refused(tiny36, reuses, message):
    made = [lambda tokens, reuse=reuse: Forward("full", tokens, wanted=range(8), reuse=reuse) for reuse in reuses]
    with pytest.raises(ValueError, match=message):
        run_forwards(tiny36, *made)
