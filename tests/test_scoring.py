"""What inputs share is run once, in batches, and every score stays what it would be alone."""

from __future__ import annotations

import random

import pytest
import torch
from golden_models import eager

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.evaluate import scoring
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.evaluate.scoring import MaskedInput, SharedContext, batches
from fast_dllm.network.eager import EagerExecutor

SCORE = 1e-4  # see test_harness.py


def few_shot_load(seed: int = 0, subjects: int = 3, questions: int = 4, shots: int = 150) -> list[tuple[list, list]]:
    """(context, continuation) of questions behind their subject's examples: four letters each, some longer options."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, 318) for _ in range(count)]

    pairs = []
    for _ in range(subjects):
        examples = words(shots)
        for _ in range(questions):
            context = examples + words(rng.randrange(5, 90))
            pairs += [(context, [letter]) for letter in (65, 66, 67, 68)]
            pairs += [(context, words(rng.randrange(2, 40))) for _ in range(2)]
    rng.shuffle(pairs)
    return pairs


def plainly(lm: FastDLLM, pairs, chain: bool) -> list[tuple[float, bool]]:
    """Each input by itself, without a cache: what a score is."""
    scores = []
    for context, continuation in pairs:
        total, greedy = 0.0, True
        for (row, ids), target in lm.scorer.masked_inputs(context, continuation, chain):
            with torch.inference_mode():
                log_probs = lm.model(torch.tensor([ids])).logits[0, row].log_softmax(dim=-1)
            total, greedy = total + float(log_probs[target]), greedy and int(log_probs.argmax()) == target
        scores.append((total, greedy))
    return scores


@pytest.fixture(scope="module", params=[1, 5])
def lm(request, random_model) -> FastDLLM:
    return FastDLLM(ModelArguments.parse(model_path=str(random_model), batch_size=request.param, device="cpu"))


def test_a_continuation_is_greedy_only_if_each_of_its_tokens_is(lm):
    context = list(range(40, 90))
    best: list[int] = []
    for length in (1, 2):
        (row, ids), _ = lm.scorer.masked_inputs(context, [*best, 3], chain=True)[length - 1]
        with torch.inference_mode():
            best.append(int(lm.model(torch.tensor([ids])).logits[0, row].argmax()))
    pairs = [(context, best), (context, [best[0], best[1] + 1]), (context, [best[0] + 1, best[1]])]
    got = lm.scorer.score([lm.scorer.masked_inputs(*pair, chain=True) for pair in pairs], quiet=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in plainly(lm, pairs, chain=True)]
    assert [greedy for _, greedy in got][:2] == [True, False]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["reference", "chain"])
def test_every_score_and_letter_is_what_a_forward_of_its_own_gives(lm, chain):
    pairs = few_shot_load(questions=2 if chain else 4)
    got = lm.scorer.score([lm.scorer.masked_inputs(*pair, chain) for pair in pairs], quiet=True)
    expected = plainly(lm, pairs, chain)
    for (context, continuation), (value, greedy), (alone, best) in zip(pairs, got, expected, strict=True):
        tokens = len(continuation) if chain else 1
        assert value == pytest.approx(alone, abs=tokens * SCORE), (len(context), len(continuation))
        assert greedy == best
    by_question: dict[tuple, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) == 1:
            by_question.setdefault(tuple(context), []).append(index)
    for letters in by_question.values():
        assert max(letters, key=lambda index: got[index]) == max(letters, key=lambda index: expected[index])


def inputs_of(pairs, block_size: int = 32) -> list[MaskedInput]:
    found = {}
    for context, continuation in pairs:
        for masked, _ in scoring.masked_inputs(
            context, continuation, chain=False, mask_id=319, stop_token=2, block_size=block_size, max_length=2048
        ):
            found[masked] = None
    return list(found)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_input_is_in_one_batch_whose_inputs_begin_alike(batch_size):
    inputs = inputs_of(few_shot_load(seed=7))
    inputs += [MaskedInput(31, inputs[0].ids[:32]), MaskedInput(63, inputs[0].ids[:64])]  # one begins another
    planned = list(batches(inputs, block_size=32, batch_size=batch_size))
    assert sorted(masked for batch in planned for masked in batch.inputs) == sorted(inputs)
    for shared, together in planned:
        assert 0 < len(together) <= batch_size
        assert len({masked.ids[:shared] for masked in together}) == 1
        assert shared % 32 == 0
        assert all(shared <= masked.row for masked in together), "a block that is read is nobody else's"


def test_what_is_done_is_left_out_and_changes_nothing_else():
    inputs = inputs_of(few_shot_load(seed=3))
    before = {masked: batch.shared for batch in batches(inputs, block_size=32, batch_size=4) for masked in batch.inputs}
    done = set(inputs[::3])
    after = {
        masked: batch.shared
        for batch in batches(inputs, block_size=32, batch_size=4, done=done)
        for masked in batch.inputs
    }
    assert after == {masked: shared for masked, shared in before.items() if masked not in done}


def test_a_shared_block_is_run_once(lm, monkeypatch):
    pairs = few_shot_load(subjects=2, questions=5)
    blocks: list[int] = []
    original = EagerExecutor.prefill

    def prefill(executor, cache_rows, ids, **settings):
        blocks.append(len(cache_rows) * len(ids[0]) // 32)
        return original(executor, cache_rows, ids, **settings)

    monkeypatch.setattr(EagerExecutor, "prefill", prefill)
    lm.scorer.score([lm.scorer.masked_inputs(*pair, False) for pair in pairs], quiet=True)
    inputs = inputs_of(pairs)
    different = {masked.ids[:end] for masked in inputs for end in range(32, len(masked.ids), 32)}
    last = len(inputs)
    padding = 4 * len(list(batches(inputs, block_size=32, batch_size=lm.arguments.batch_size)))
    whole = sum(len(masked.ids) // 32 for masked in inputs)
    assert len(different) + last <= sum(blocks) <= len(different) + last + (padding if max(blocks) > 1 else 0)
    assert sum(blocks) < whole / 2


def test_the_context_that_is_held_is_what_was_asked_for(tiny36):
    """Rows that got an earlier context, or a batch's own blocks behind it, hold none of it afterwards."""
    context = SharedContext(tiny36, 3, 160, 32)
    rng = random.Random(1)
    ids = [tuple(rng.randrange(3, 318) for _ in range(32)) for _ in range(5)]
    with torch.inference_mode():
        for blocks, rows in (((0, 1), 3), ((0,), 1), ((0, 2, 3), 2), ((0, 2), 3), ((4,), 1), ((0, 2, 1), 3), ((), 2)):
            tokens = tuple(token for block in blocks for token in ids[block])
            context.set_prefix(tokens, rows)
            context.executor.prefill(range(rows), [ids[3]] * rows)  # a batch's own, behind the context
            alone = eager(tiny36, 1, 160)
            if tokens:
                alone.prefill([0], [tokens])
            cache, expected = context.executor.cache, alone.cache
            for row in range(rows):
                for mine, right in ((cache.keys, expected.keys), (cache.values, expected.values)):
                    held = mine[:, row, : len(tokens)], right[:, 0, : len(tokens)]
                    torch.testing.assert_close(*held, atol=1e-4, rtol=0)
