"""Pairs of decodings that must be equal, and the reference's defects that must not come back."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from golden_models import ROOT, golden_json

from fast_dllm.layer_reuse import LayerReuse, is_reuse_step, subset_layers
from fast_dllm.sampling import predict, rows_to_unmask, top_p_sample
from generation_functions import denoise, generate

MASK, STOP = 319, 2
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 64}


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def test_block_cache_changes_nothing_when_a_sub_forward_runs_every_row(tiny36):
    settings = COMMON | {"small_block_size": 32, "threshold": 0.6}
    for prompt in prompts(5, 40, 64):
        on, off = (generate(tiny36, [prompt], use_block_cache=cached, **settings)[0] for cached in (True, False))
        assert on.tokens == off.tokens
        assert on.forwards["sub"] > 0
        assert off.forwards["sub"] == 0


def test_reuse_k_1_equals_no_reuse(tiny36):
    (prompt,) = prompts(40)
    plain = generate(tiny36, [prompt], **COMMON)
    for subset in ("first", "middle", "last"):
        assert generate(tiny36, [prompt], reuse_k=1, layer_subset=subset, **COMMON) == plain


@pytest.mark.parametrize("reuse_k", [1, 3])
def test_a_batch_of_mixed_lengths_equals_one_by_one(tiny36, reuse_k):
    batch = prompts(1, 31, 32, 33, 64, 70, 100)
    settings = COMMON | {"threshold": 0.7, "reuse_k": reuse_k, "layer_subset": "last"}
    assert generate(tiny36, batch, **settings) == [generate(tiny36, [prompt], **settings)[0] for prompt in batch]


def test_decoding_twice_gives_the_same(tiny36):
    batch = prompts(17, 45)
    settings = COMMON | {"temperature": 0.8}
    first, second = (generate(tiny36, batch, generator=torch.Generator().manual_seed(7), **settings) for _ in range(2))
    assert first == second


def test_a_sampled_batch_equals_one_by_one_and_rows_differ_with_their_generators(tiny36):
    batch = prompts(20, 20, 41)
    settings = COMMON | {"temperature": 1.0, "top_p": 0.9, "reuse_k": 2, "layer_subset": "first"}

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


def literal_reuse(model, prompt: list[int], mode: str, case: dict, layer_subset: str) -> list[int]:
    """ALGORITHM in its plainest form for one sequence, with the subset's layers really skipped on reuse steps."""
    mask, stop, size, sub = case["mask_id"], case["stop_token"], 32, case["small_block_size"]
    start_block = len(prompt) // size
    end_block = start_block + case["max_new_tokens"] // size
    tokens = list(prompt)
    cache = model.new_cache(1, end_block * size)
    layers = subset_layers(layer_subset, model.config.num_hidden_layers)
    store = LayerReuse(layers, mode, 1, size, model.config.hidden_size, dtype=torch.float32, device="cpu")
    if start_block:
        logits = model.prefill(cache, 0, prompt[: start_block * size])
        if len(prompt) % size == 0:
            tokens.append(logits.argmax().item())
    for block in range(start_block, end_block):
        first = block * size
        tokens += [mask] * (first + size - len(tokens))
        counter, cached = 0, False
        for start in range(first, first + size, sub):
            while mask in tokens[start : start + sub]:
                full = not cached or tokens[start] == mask
                skip = not full and is_reuse_step(counter, case["reuse_k"])
                begin, width = (first, size) if full else (start, sub)
                read = [max(start - begin + row - 1, 0) for row in range(sub)]
                window = tokens[begin : begin + width]
                logits = model.run_block(cache, [0], [window], [begin - first], [read], reuse=store, skip=skip)
                candidates, confidences = predict(logits, mask)
                masked = [token == mask for token in tokens[start : start + sub]]
                for row in rows_to_unmask(confidences[0].tolist(), masked, case["threshold"]):
                    tokens[start + row] = candidates[0, row].item()
                cached, counter = True, counter + 1
        logits = model.run_block(cache, [0], [tokens[first : first + size]], [0], [[size - 1]])
        model.commit(cache, 0)
        if block + 1 < end_block:
            tokens.append(logits.argmax().item())
        answer = tokens[len(prompt) :]
        if stop in answer:
            return answer[: answer.index(stop) + 1]
    return tokens[len(prompt) :]


REUSE_CASES = [case for case in golden_json("tiny36.layer_output_reuse.json") if case["reuse_k"] > 1][::3]


@pytest.mark.parametrize("layer_subset", ["first", "middle", "last"])
def test_literal_output_reuse_and_the_free_form_give_the_same_tokens(tiny36, layer_subset):
    with torch.inference_mode():
        for case in REUSE_CASES:
            literal = literal_reuse(tiny36, case["prompt"], "output", case, layer_subset)
            assert literal == case["expected_by_subset"][layer_subset]
            settings = {key: case[key] for key in COMMON | {"small_block_size": 0, "threshold": 0, "reuse_k": 0}}
            (free,) = generate(tiny36, [case["prompt"]], layer_subset=layer_subset, **settings)
            assert free.tokens == literal


def test_residual_reuse_depends_on_the_layers_it_skips(tiny36):
    with torch.inference_mode():
        answers = {
            subset: [literal_reuse(tiny36, case["prompt"], "residual", case, subset) for case in REUSE_CASES]
            for subset in ("first", "middle", "last")
        }
    assert answers["first"] != answers["last"]
    assert answers["last"] != [case["expected_by_subset"]["last"] for case in REUSE_CASES]


def test_layer_reuse_reads_a_row_only_from_its_own_position():
    store = LayerReuse(range(3, 5), "residual", 2, 8, 4, dtype=torch.float32, device="cpu")
    rows, offsets = torch.tensor([[1]]), torch.tensor([[4, 5]])
    given, output = torch.ones(1, 2, 4), torch.full((1, 2, 4), 3.0)
    store.store(4, given, output, rows, offsets)
    assert torch.equal(store.read(4, given * 10, rows, offsets), given * 12)
    assert torch.equal(store.read(4, given, rows, offsets - 4), given)  # nothing stored there
    assert torch.equal(store.read(3, given, rows, offsets), given)  # nor for another layer
    assert torch.equal(store.read(4, given, rows * 0, offsets), given)  # nor for another sequence


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
        ({"small_block_size": 5}, "must divide"),
        ({"max_new_tokens": 8}, "at least one block"),
        ({"reuse_k": 0}, "reuse_k must be one of 1, 2, 3"),
        ({"reuse_k": 2}, "needs a layer_subset"),
        ({"layer_subset": "top"}, "first, middle, last"),
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


def test_the_active_file_and_the_baseline_experiment_are_contract_equal():
    from fast_dllm import experiments

    for name in (None, *experiments.available()):
        experiments.load(name)
    assert (ROOT / "experiments" / "00_baseline" / "generation_functions.py").is_file()
