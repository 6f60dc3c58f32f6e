"""Pairs of decodings that must be equal, and the reference's defects that must not come back."""

from __future__ import annotations

import copy
import random
import sys

import pytest
import torch
from golden_models import denoise, generate

from fast_dllm.decode import experiments
from fast_dllm.sampling import predict, rows_to_unmask, top_p_sample

MASK, STOP = 319, 2
subset_layers = sys.modules[experiments.load(None).decode_one.__module__].subset_layers
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 64}


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def test_block_cache_changes_nothing_when_a_sub_forward_runs_every_row(short_model):
    settings = COMMON | {"small_block_size": 32, "threshold": 0.6, "refresh": "rows"}
    for prompt in prompts(5, 40, 64):
        on, off = (generate(short_model, [prompt], use_block_cache=cached, **settings)[0] for cached in (True, False))
        assert on.tokens == off.tokens
        assert on.forwards["sub"] > 0
        assert off.forwards["sub"] == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("reuse_k", "refresh"), [(1, "rows"), (1, "block"), (3, "block"), (3, "rows")])
def test_a_batch_of_mixed_lengths_equals_one_by_one(short_model, reuse_k, refresh):
    batch = prompts(1, 31, 32, 70, 100)
    settings = COMMON | {"threshold": 0.7, "reuse_k": reuse_k, "layer_subset": "2-4", "refresh": refresh}
    assert generate(short_model, batch, **settings) == [
        generate(short_model, [prompt], **settings)[0] for prompt in batch
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("refresh", ["block", "rows"])
def test_a_sampled_batch_equals_one_by_one_and_rows_differ_with_their_generators(short_model, refresh):
    batch = prompts(20, 20, 41)
    settings = COMMON | {"temperature": 1.0, "top_p": 0.9, "reuse_k": 2, "layer_subset": "2-4", "refresh": refresh}

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    together = generate(short_model, batch, generator=generators(), **settings)
    alone = [
        generate(short_model, [prompt], generator=[own], **settings)[0]
        for prompt, own in zip(batch, generators(), strict=True)
    ]
    assert together == alone
    # One shared generator: every row still gets what it would get alone.
    shared = generate(short_model, batch, generator=torch.Generator().manual_seed(5), **settings)
    assert shared == [
        generate(short_model, [prompt], generator=torch.Generator().manual_seed(5), **settings)[0] for prompt in batch
    ]
    twins = generate(short_model, [batch[0]] * 2, generator=generators()[:2], **settings)
    assert twins[0].tokens != twins[1].tokens


def test_a_prompt_of_exactly_one_block_is_seen(short_model):
    one, other = prompts(32, 32)
    first, second = (generate(short_model, [prompt], **COMMON)[0] for prompt in (one, other))
    assert first.tokens != second.tokens
    assert first.forwards["prefill"] == 1
    with torch.inference_mode():
        logits = short_model(torch.tensor([one])).logits[0, -1]
    assert first.tokens[0] == logits.argmax().item()


def test_a_short_prompt_whose_answer_stops_in_its_first_block_returns(short_model):
    (prompt,) = prompts(5)
    answer = generate(short_model, [prompt], **COMMON)[0].tokens
    stopped = generate(short_model, [prompt], **COMMON | {"stop_token": answer[0]})[0]
    assert stopped.tokens == answer[:1]
    assert stopped.forwards["commit"] == 0


def test_nothing_runs_after_the_first_stop_token_has_no_mask_before_it(short_model):
    (prompt,) = prompts(32)
    first = generate(short_model, [prompt], **COMMON)[0].tokens[0]
    stopped = generate(short_model, [prompt], **COMMON | {"stop_token": first})[0]
    assert stopped.tokens == [first]
    assert sum(stopped.forwards.values()) == stopped.forwards["prefill"] == 1


def test_a_sampled_row_draws_one_number_for_each_row_of_its_sub_block_on_every_step(short_model, monkeypatch):
    """However many rows are kept for re-reading, and on re-reads too: so it draws the same in any batch."""
    drawn = []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **rest: drawn.append(size) or original(*size, **rest))
    settings = COMMON | {"temperature": 1.0, "threshold": 0.5, "layer_subset": "2-4"}
    for reuse_k in (1, 2, 3):
        drawn.clear()
        (got,) = generate(short_model, prompts(41), reuse_k=reuse_k, **settings)
        assert set(drawn) == {(8,)}
        assert len(drawn) == got.forwards["full"] + got.forwards["reused"]


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
def test_the_mask_token_is_never_a_candidate(short_model, temperature):
    model = copy.deepcopy(short_model)
    model.lm_head = FavouriteToken(MASK, 77, short_model.lm_head)
    (got,) = generate(model, prompts(33), **COMMON | {"temperature": temperature, "top_p": 0.5})
    assert set(got.tokens) == {77}


def test_a_greedy_confidence_is_a_softmax_over_the_whole_vocabulary():
    logits = torch.tensor([[[2.0, 1.0, 3.0]]])
    candidates, confidences = predict(logits, mask_id=2)
    assert candidates.item() == 0
    assert confidences.item() == pytest.approx(logits.softmax(-1)[0, 0, 0].item())


def test_a_prompt_may_contain_the_mask_token(short_model):
    (prompt,) = prompts(40)
    prompt[36] = MASK
    (got,) = generate(short_model, [prompt], **COMMON)
    assert got.tokens
    assert MASK not in got.tokens


def test_answers_stay_within_the_block_budget(short_model):
    for length in (1, 31, 32, 50):
        (got,) = generate(short_model, prompts(length), **COMMON | {"stop_token": 318})
        assert len(got.tokens) == 64 - length % 32 or got.tokens[-1] == 318
    assert generate(short_model, [], **COMMON) == []


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


def test_events_tell_every_token_once_and_end_with_the_generation(short_model):
    batch = prompts(10, 64)
    expected = generate(short_model, batch, **COMMON)
    told: dict[int, dict[int, int]] = {0: {}, 1: {}}
    ended = {}
    for event in denoise(short_model, batch, **COMMON):
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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": 2}, "threshold"),
        ({"max_new_tokens": 8}, "at least one block"),
        ({"reuse_k": 2, "layer_subset": "2-4", "use_block_cache": False}, "needs the block cache"),
        ({"reuse_k": 3, "layer_subset": "2-4", "use_block_cache": False, "refresh": "rows"}, "needs the block cache"),
        ({"layer_subset": "2-6"}, "not a range within the model's 0-5"),
        ({"layer_subset": "2-"}, "no range of layers"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"mask_id": STOP}, "both"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(short_model, bad, message):
    with pytest.raises(ValueError, match=message):
        denoise(short_model, prompts(5), **COMMON | bad)


def test_an_empty_prompt_is_refused(short_model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(short_model, [[1], []], **COMMON)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    probs = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    for top_p, allowed in ((0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (1.0, {0, 1, 2, 3})):
        drawn = [top_p_sample(probs, top_p, torch.tensor([[u / 100]])) for u in range(100)]
        assert {token.item() for token, _ in drawn} == allowed
        total = probs[0, 0, : len(allowed)].sum()
        for token, confidence in drawn:
            assert confidence.item() == pytest.approx((probs[0, 0, token.item()] / total).item(), rel=1e-5)


def test_draws_follow_the_truncated_distribution():
    probs = torch.tensor([0.45, 0.3, 0.2, 0.05]).expand(1, 4000, 4)
    uniforms = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0))
    tokens, _ = top_p_sample(probs, 0.9, uniforms)
    shares = torch.bincount(tokens.flatten(), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.45, 0.3, 0.2, 0.0]) / 0.95, atol=0.03, rtol=0)


def test_ties_unmask_the_first_row_and_threshold_is_strict():
    assert rows_to_unmask([0.9, 0.4, 0.4], [False, True, True], 0.9) == [1]
    assert rows_to_unmask([0.9, 0.95, 0.96], [True, True, True], 0.9) == [1, 2]
    assert rows_to_unmask([0.2, 0.1], [True, True], 0.0) == [0, 1]
