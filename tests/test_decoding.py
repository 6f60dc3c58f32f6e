"""Pairs of decodings that must be equal, and the reference's defects that must not come back."""

from __future__ import annotations

import copy
import random
import sys

import pytest
import torch
from golden_models import GOLDEN_MODELS, denoise, eager, generate, golden_json, in_each_subset

from fast_dllm.decode import experiments
from fast_dllm.network.packing import BlockRows, pack_block
from fast_dllm.sampling import predict, rows_to_unmask, top_p_sample

MASK, STOP = 319, 2
subset_layers = sys.modules[experiments.load(None).decode_one.__module__].subset_layers
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 64}


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def test_block_cache_changes_nothing_when_a_sub_forward_runs_every_row(tiny36):
    settings = COMMON | {"small_block_size": 32, "threshold": 0.6, "refresh": "rows"}
    for prompt in prompts(5, 40, 64):
        on, off = (generate(tiny36, [prompt], use_block_cache=cached, **settings)[0] for cached in (True, False))
        assert on.tokens == off.tokens
        assert on.forwards["sub"] > 0
        assert off.forwards["sub"] == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("reuse_k", "refresh"), [(1, "rows"), (1, "block"), (3, "block"), (3, "rows")])
def test_a_batch_of_mixed_lengths_equals_one_by_one(tiny36, reuse_k, refresh):
    batch = prompts(1, 31, 32, 33, 64, 70, 100)
    settings = COMMON | {"threshold": 0.7, "reuse_k": reuse_k, "layer_subset": "last", "refresh": refresh}
    assert generate(tiny36, batch, **settings) == [generate(tiny36, [prompt], **settings)[0] for prompt in batch]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("refresh", ["block", "rows"])
def test_a_sampled_batch_equals_one_by_one_and_rows_differ_with_their_generators(tiny36, refresh):
    batch = prompts(20, 20, 41)
    settings = COMMON | {"temperature": 1.0, "top_p": 0.9, "reuse_k": 2, "layer_subset": "first", "refresh": refresh}

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    together = generate(tiny36, batch, generator=generators(), **settings)
    alone = [
        generate(tiny36, [prompt], generator=[own], **settings)[0]
        for prompt, own in zip(batch, generators(), strict=True)
    ]
    assert together == alone
    # One shared generator: every row still gets what it would get alone.
    shared = generate(tiny36, batch, generator=torch.Generator().manual_seed(5), **settings)
    assert shared == [
        generate(tiny36, [prompt], generator=torch.Generator().manual_seed(5), **settings)[0] for prompt in batch
    ]
    twins = generate(tiny36, [batch[0]] * 2, generator=generators()[:2], **settings)
    assert twins[0].tokens != twins[1].tokens


def test_a_prompt_of_exactly_one_block_is_seen(tiny36):
    one, other = prompts(32, 32)
    first, second = (generate(tiny36, [prompt], **COMMON)[0] for prompt in (one, other))
    assert first.tokens != second.tokens
    assert first.forwards["prefill"] == 1
    with torch.inference_mode():
        logits = tiny36(torch.tensor([one])).logits[0, -1]
    assert first.tokens[0] == logits.argmax().item()


def test_a_short_prompt_whose_answer_stops_in_its_first_block_returns(tiny36):
    (prompt,) = prompts(5)
    answer = generate(tiny36, [prompt], **COMMON)[0].tokens
    stopped = generate(tiny36, [prompt], **COMMON | {"stop_token": answer[0]})[0]
    assert stopped.tokens == answer[:1]
    assert stopped.forwards["commit"] == 0


def test_nothing_runs_after_the_first_stop_token_has_no_mask_before_it(tiny36):
    (prompt,) = prompts(32)
    first = generate(tiny36, [prompt], **COMMON)[0].tokens[0]
    stopped = generate(tiny36, [prompt], **COMMON | {"stop_token": first})[0]
    assert stopped.tokens == [first]
    assert sum(stopped.forwards.values()) == stopped.forwards["prefill"] == 1


def test_a_sampled_row_draws_one_number_for_each_row_of_its_sub_block_on_every_step(tiny36, monkeypatch):
    """However many rows are kept for re-reading, and on re-reads too: so it draws the same in any batch."""
    drawn = []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **rest: drawn.append(size) or original(*size, **rest))
    settings = COMMON | {"temperature": 1.0, "threshold": 0.5, "layer_subset": "last"}
    for reuse_k in (1, 2, 3):
        drawn.clear()
        (got,) = generate(tiny36, prompts(41), reuse_k=reuse_k, **settings)
        assert set(drawn) == {(8,)}
        assert len(drawn) == got.forwards["full"] + got.forwards["reused"]


def test_a_sampled_re_read_draws_anew_from_the_logits_that_were_kept(tiny36):
    """Not the tokens that the computing step drew: with everything at stake on one token a step, the draws differ."""
    counts = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        (got,) = generate(
            tiny36, prompts(41), reuse_k=3, layer_subset="last", temperature=2.0, generator=generator, **COMMON
        )
        counts.add(tuple(got.tokens))
    assert len(counts) == 6


class FavouriteToken(torch.nn.Module):
    """An lm_head that always prefers one token, then another."""

    def __init__(self, favourite: int, second: int, like: torch.nn.Linear):
        super().__init__()
        self.weight, self.favourite, self.second = like.weight, favourite, second

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.weight.shape[0])
        logits[..., self.favourite], logits[..., self.second] = 19.0, 15.0
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_a_candidate(tiny36, temperature):
    model = copy.deepcopy(tiny36)
    model.lm_head = FavouriteToken(MASK, 77, tiny36.lm_head)
    (got,) = generate(model, prompts(33), **COMMON | {"temperature": temperature, "top_p": 0.5})
    assert set(got.tokens) == {77}


def test_a_greedy_confidence_is_a_softmax_over_the_whole_vocabulary():
    logits = torch.tensor([[[2.0, 1.0, 3.0]]])
    candidates, confidences = predict(logits, mask_id=2)
    assert candidates.item() == 0
    assert confidences.item() == pytest.approx(logits.softmax(-1)[0, 0, 0].item())


def test_a_prompt_may_contain_the_mask_token(tiny36):
    (prompt,) = prompts(40)
    prompt[36] = MASK
    (got,) = generate(tiny36, [prompt], **COMMON)
    assert got.tokens
    assert MASK not in got.tokens


def test_answers_stay_within_the_block_budget(tiny36):
    for length in (1, 31, 32, 50):
        (got,) = generate(tiny36, prompts(length), **COMMON | {"stop_token": 318})
        assert len(got.tokens) == 64 - length % 32 or got.tokens[-1] == 318
    assert generate(tiny36, [], **COMMON) == []


class LiteralLayers:
    """Layer reuse as the lab's code does it, in its plainest form: each layer of the subset stores what it gives for
    the 32 rows of the block, and on a step that reuses returns it (output), or adds what it added then (residual)."""

    def __init__(self, model, layers: range, mode: str):
        self.model, self.layers, self.mode, self.reading = model, layers, mode, False
        self.stored = {index: torch.zeros(32, model.config.hidden_size) for index in layers}
        self.window = slice(0, 32)

    def run(self, cache, tokens: list[int], offset: int, read: list[int], reading: bool) -> torch.Tensor:
        self.reading, self.window = reading, slice(offset, offset + len(tokens))
        inputs = pack_block(cache, BlockRows([0], [tokens], [offset], [read]))
        x = self.model.model.embed_tokens(inputs.ids)
        for index, layer in enumerate(self.model.model.layers):
            x = self.layer(index, layer, x, inputs.attend)
        return self.model.lm_head(self.model.model.norm(x)[:, read])

    def layer(self, index: int, layer, x: torch.Tensor, attend) -> torch.Tensor:
        if index in self.layers and self.reading:
            stored = self.stored[index][self.window][None]
            return stored if self.mode == "output" else x + stored
        given = layer(x, attend)
        if index in self.layers:
            self.stored[index][self.window] = (given if self.mode == "output" else given - x)[0]
        return given


def literal_reuse(model, case: dict, layer_subset: str, *, mode: str = "output", refresh: str = "rows"):
    """(new tokens, forwards by width) of the algorithm in its plainest form, layers really standing still.

    With `block`, as in the lab's code: a step that reuses runs full where it opens a sub-block, and gets all 32 stored
    rows, else a sub forward that gets the rows of its window. Keys and values fall as they fall.
    """
    prompt, mask, size, sub = case["prompt"], case["mask_id"], 32, case["small_block_size"]
    start_block = len(prompt) // size
    end_block = start_block + case["max_new_tokens"] // size
    tokens, widths = list(prompt), {"full": 0, "sub": 0}
    executor = eager(model, 1, end_block * size)
    cache = executor.cache
    literal = LiteralLayers(model, subset_layers(layer_subset, model.config.num_hidden_layers), mode)
    if start_block:
        logits = executor.prefill([0], [prompt[: start_block * size]])
        if len(prompt) % size == 0:
            tokens.append(logits.argmax().item())
    for block in range(start_block, end_block):
        first = block * size
        tokens += [mask] * (first + size - len(tokens))
        counter = 0
        for start in range(first, first + size, sub):
            while mask in tokens[start : start + sub]:
                opens, reuses = counter == 0 or tokens[start] == mask, counter % case["reuse_k"] != 0
                if refresh == "block":
                    full, reading = opens or not reuses, reuses
                else:
                    full, reading = opens, not opens and reuses
                widths["full" if full else "sub"] += 1
                begin, width = (first, size) if full else (start, sub)
                read = [max(start - begin + row - 1, 0) for row in range(sub)]
                logits = literal.run(cache, tokens[begin : begin + width], begin - first, read, reading)
                candidates, confidences = predict(logits, mask)
                masked = [token == mask for token in tokens[start : start + sub]]
                for row in rows_to_unmask(confidences[0].tolist(), masked, case["threshold"]):
                    tokens[start + row] = candidates[0, row].item()
                counter += 1
        logits = executor.run_block(BlockRows([0], [tokens[first : first + size]], [0], [[size - 1]]))
        executor.commit(0)
        if block + 1 < end_block:
            tokens.append(logits.argmax().item())
        answer = tokens[len(prompt) :]
        if case["stop_token"] in answer:
            return answer[: answer.index(case["stop_token"]) + 1], widths
    return tokens[len(prompt) :], widths


REUSE_CASES = [case for case in golden_json("tiny36.layer_output_reuse.json") if case["reuse_k"] > 1][::3]
LAB_CASES = [
    pytest.param(name, case, id=f"{name}-k{reuse_k}-{len(case['prompt'])}")
    for name in GOLDEN_MODELS
    for reuse_k in (2, 3)
    for case in [case for case in golden_json(f"{name}.lab_baseline.json") if case["reuse_k"] == reuse_k][::4]
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer_subset", ["first", "middle", "last"])
def test_literal_output_reuse_and_the_free_form_give_the_same_tokens(tiny36, layer_subset):
    with torch.inference_mode():
        for case in REUSE_CASES:
            literal, _ = literal_reuse(tiny36, case, layer_subset)
            assert literal == case["expected_by_subset"][layer_subset]
            settings = {key: case[key] for key in COMMON | {"small_block_size": 0, "threshold": 0, "reuse_k": 0}}
            (free,) = generate(tiny36, [case["prompt"]], layer_subset=layer_subset, refresh="rows", **settings)
            assert free.tokens == literal


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "case", "layer_subset"), in_each_subset(LAB_CASES))
def test_layers_that_really_stand_still_give_the_labs_tokens_and_widths(golden_models, name, case, layer_subset):
    """The identity, for `block`: what stands still is 12 layers here, and the whole forward in the policy's form."""
    with torch.inference_mode():
        literal, widths = literal_reuse(golden_models[name], case, layer_subset, refresh="block")
    assert literal == case["expected_by_subset"][layer_subset]
    assert widths == {"full": case["forwards"]["full"], "sub": case["forwards"]["sub"]}


@pytest.mark.parametrize(
    ("num_layers", "subset", "expected"),
    [
        (36, "first", range(1, 12)),
        (36, "middle", range(12, 24)),
        (36, "last", range(24, 36)),
        (28, "first", range(1, 12)),
        (28, "middle", range(8, 20)),
        (28, "last", range(16, 28)),
    ],
)
def test_layer_subsets_are_the_documented_ranges(num_layers, subset, expected):
    assert subset_layers(subset, num_layers) == expected


def test_events_tell_every_token_once_and_end_with_the_generation(tiny36):
    batch = prompts(10, 64)
    expected = generate(tiny36, batch, **COMMON)
    told: dict[int, dict[int, int]] = {0: {}, 1: {}}
    ended = {}
    for event in denoise(tiny36, batch, **COMMON):
        assert len(event.positions) == len(event.tokens) == len(event.confidences)
        assert all(0 <= confidence <= 1 for confidence in event.confidences)
        assert not told[event.row].keys() & set(event.positions)
        told[event.row].update(zip(event.positions, event.tokens, strict=True))
        if event.generation:
            ended[event.row] = event.generation
    assert [ended[row] for row in range(2)] == expected
    for row, prompt in enumerate(batch):
        answer = [token for _, token in sorted(told[row].items())]
        assert answer[: len(expected[row].tokens)] == expected[row].tokens
        assert min(told[row]) == len(prompt)


def test_closing_the_events_early_leaves_the_model_as_it_was(tiny36):
    batch = prompts(40)
    expected = generate(tiny36, batch, **COMMON)
    events = denoise(tiny36, batch, reuse_k=2, layer_subset="middle", **COMMON)
    for _ in range(5):
        next(events)
    events.close()
    assert generate(tiny36, batch, **COMMON) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": 2}, "threshold"),
        ({"max_new_tokens": 8}, "at least one block"),
        ({"reuse_k": 2, "layer_subset": "last", "use_block_cache": False}, "needs the block cache"),
        ({"reuse_k": 3, "layer_subset": "last", "use_block_cache": False, "refresh": "rows"}, "needs the block cache"),
        ({"layer_subset": "8-36"}, "not a range within the model's 0-35"),
        ({"layer_subset": "8-"}, "no range of layers"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"mask_id": STOP}, "both"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(tiny36, bad, message):
    with pytest.raises(ValueError, match=message):
        denoise(tiny36, prompts(5), **COMMON | bad)


def test_an_empty_prompt_is_refused(tiny36):
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny36, [[1], []], **COMMON)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    probs = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    for top_p, allowed in ((0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (1.0, {0, 1, 2, 3})):
        drawn = [top_p_sample(probs, top_p, torch.tensor([[u / 100]])) for u in range(100)]
        assert {token.item() for token, _ in drawn} == allowed
        total = probs[0, 0, : len(allowed)].sum()
        for token, confidence in drawn:
            assert confidence.item() == pytest.approx((probs[0, 0, token.item()] / total).item(), rel=1e-5)


def test_draws_follow_the_truncated_distribution():
    probs = torch.tensor([0.45, 0.3, 0.2, 0.05]).expand(1, 20000, 4)
    uniforms = torch.rand(1, 20000, generator=torch.Generator().manual_seed(0))
    tokens, _ = top_p_sample(probs, 0.9, uniforms)
    shares = torch.bincount(tokens.flatten(), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.45, 0.3, 0.2, 0.0]) / 0.95, atol=0.015, rtol=0)


def test_ties_unmask_the_first_row_and_threshold_is_strict():
    assert rows_to_unmask([0.9, 0.4, 0.4], [False, True, True], 0.9) == [1]
    assert rows_to_unmask([0.9, 0.95, 0.96], [True, True, True], 0.9) == [1, 2]
    assert rows_to_unmask([0.2, 0.1], [True, True], 0.0) == [0, 1]
