"""07_rules and 08_phase: each rule on numbers worked by hand, and the policies against plain forms of them."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_models import eager

from fast_dllm.decode import experiments
from fast_dllm.decode.decoding_run import Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decoding import Forward
from fast_dllm.network.packing import BlockRows
from fast_dllm.sampling import measures, predict

MASK, STOP, SIZE = 319, 2, 32
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 32, "threshold": 0.6}
RULES, PHASE = experiments.load("07_rules"), experiments.load("08_phase")
PLAIN, RESIDUAL = experiments.load("04_threshold"), experiments.load("02_residual_reuse")
PAGE = sys.modules[RULES.decode_one.__module__]


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


# -- one step: scores -> rows ------------------------------------------------------------------------------------------
CONFIDENCES = [0.74, 0.99, 0.82, 0.95, 0.78]  # sorted: 0.99, 0.95, 0.82, 0.78, 0.74


@pytest.mark.parametrize(
    ("knobs", "scores", "rows"),
    [
        ({"rule": "threshold", "threshold": 0.8}, CONFIDENCES, [1, 2, 3]),
        ({"rule": "threshold", "threshold": 1.0}, CONFIDENCES, [1]),
        # (n + 1)(1 - c_(n)): 0.02, 0.15, 0.72, 1.1
        ({"rule": "factor", "bound": 0.75}, CONFIDENCES, [1, 2, 3]),
        ({"rule": "factor", "bound": 0.7}, CONFIDENCES, [1, 3]),
        # sum of 1 - c, plus 1 - c_(n): 0.02, 0.11, 0.42, 0.68, 0.98
        ({"rule": "profile", "bound": 0.75}, CONFIDENCES, [1, 2, 3, 4]),
        ({"rule": "profile", "bound": 0.4}, CONFIDENCES, [1, 3]),
        # from the left, sum of 1 - c: 0.26, 0.27, 0.45
        ({"rule": "prefix_sum", "bound": 0.4}, CONFIDENCES, [0, 1]),
        ({"rule": "prefix_sum", "bound": 0.1}, CONFIDENCES, [0]),
        ({"rule": "local", "threshold": 0.9, "bound": 0.75, "radius": 1}, [0.8, 0.7, 0.95, 0.8, 0.8], [2, 3]),
        ({"rule": "local", "threshold": 0.9, "bound": 0.75, "radius": 2}, [0.8, 0.7, 0.95, 0.8, 0.8], [0, 2, 3, 4]),
        ({"rule": "local", "threshold": 0.99, "bound": 0.75}, [0.8, 0.7, 0.95, 0.8, 0.8], [2]),
        # entropies sorted 0.02, 0.05, 0.2, 0.3; sums without the largest 0, 0.02, 0.07, 0.27
        ({"rule": "entropy", "bound": 0.1}, [0.05, 0.3, 0.02, 0.2], [0, 2, 3]),
        ({"rule": "entropy", "bound": 0.0}, [0.05, 0.3, 0.02, 0.2], [2]),
        ({"rule": "margin", "bound": 0.5}, [0.4, 0.6, 0.9], [1, 2]),
        ({"rule": "margin", "bound": 0.95}, [0.4, 0.6, 0.9], [2]),
    ],
)
def test_a_rule_unmasks_the_rows_that_its_paper_says(knobs, scores, rows):
    options = RULES.options_type(**COMMON | knobs)
    assert PAGE.rows_of_rule(scores, [True] * len(scores), options) == rows


@pytest.mark.parametrize("rule", PAGE.RULES)
def test_a_known_row_is_never_unmasked_and_one_masked_row_always_is(rule):
    options = RULES.options_type(**COMMON | {"rule": rule, "bound": 0.0, "threshold": 1.0})
    assert PAGE.rows_of_rule([0.999, 0.3, 0.2], [False, False, True], options) == [2]


def test_credit_grows_while_a_token_stays_best_and_fades_while_it_is_not():
    credit: dict[int, float] = {}
    # credit 0.8 ** 0.2 = 0.95635; odds 4 become 4 * 1.95635 ** 0.65 = 6.1872
    assert PAGE.with_credit(credit, 7, 0.8, 0.65) == pytest.approx(6.1872 / 7.1872, abs=1e-4)
    # 0.7 * 0.95635 + 0.95635 = 1.62580; odds 4 * 2.62580 ** 0.65 = 7.4917
    assert PAGE.with_credit(credit, 7, 0.8, 0.65) == pytest.approx(7.4917 / 8.4917, abs=1e-4)
    PAGE.with_credit(credit, 9, 0.5, 0.65)
    assert credit[7] == pytest.approx(0.7 * 1.62580, abs=1e-4)
    assert PAGE.with_credit({}, 7, 0.8, 0.0) == pytest.approx(0.8)


def test_entropy_and_margin_leave_the_mask_token_out():
    logits = torch.tensor([[0.7, 0.2, 0.1, 5.0]]).log()  # the last is the mask token
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert measures(logits, 3)[:, 0].tolist() == pytest.approx([entropy, 0.5], abs=1e-6)


# -- the policies ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("knobs", "plain"),
    [
        ({"window": SIZE}, {"small_block_size": SIZE}),
        ({"rule": "factor"}, {"threshold": 1.0}),
        ({"rule": "profile"}, {"threshold": 1.0}),
        ({"rule": "prefix_sum", "window": 8}, {"small_block_size": 1}),
        ({"rule": "local", "bound": 1.0}, {}),
        ({"rule": "credit", "bound": 0.0}, {}),
    ],
)
def test_a_rule_that_allows_nothing_more_is_plain_decoding(tiny36, knobs, plain):
    batch = prompts(20, 41)
    assert RULES.generate(tiny36, batch, **COMMON | knobs) == PLAIN.generate(tiny36, batch, **COMMON | plain)


def literal_window(model, ids: list[int], window: int) -> list[int]:
    """The new tokens of one block: rows of the first mask and behind it, above the threshold or the best."""
    first = len(ids) // SIZE * SIZE
    executor = eager(model, 1, first + SIZE)
    if first:
        executor.prefill([0], [ids[:first]])
    tokens = ids[first:] + [MASK] * (first + SIZE - len(ids))
    while MASK in tokens and not (STOP in tokens and MASK not in tokens[: tokens.index(STOP)]):
        rows = range(tokens.index(MASK), min(tokens.index(MASK) + window, SIZE))
        logits = executor.run_block(BlockRows([0], [tokens], [0], [[row - 1 for row in rows]]))
        candidates, confidences = (each[0].tolist() for each in predict(logits, MASK))
        masked = [index for index, row in enumerate(rows) if tokens[row] == MASK]
        best = max(masked, key=lambda index: confidences[index])
        for index in masked:
            if index == best or confidences[index] > COMMON["threshold"]:
                tokens[rows[index]] = candidates[index]
    found = tokens[len(ids) - first :]
    return found[: found.index(STOP) + 1] if STOP in found else found


@pytest.mark.parametrize("window", [3, 16])
def test_a_window_begins_at_the_first_mask(tiny36, window):
    for ids in prompts(20, 41):
        with torch.inference_mode():
            expected = literal_window(tiny36, ids, window)
        assert RULES.generate(tiny36, [ids], **COMMON, window=window)[0].tokens == expected


@pytest.mark.parametrize(("rule", "row"), [("entropy", 0), ("margin", 1)])
def test_the_engine_sends_what_a_forward_measures(tiny36, rule, row):
    """In a batch, one of whose members measures nothing, each number belongs to its position."""
    pairs = []

    def watched(answer, options):
        policy = RULES.decode_one(
            answer, options if answer.row else SimpleNamespace(**vars(options) | {"rule": "threshold"})
        )
        item = next(policy)
        while True:
            sent = yield item
            if isinstance(item, Forward) and item.kind == "full" and answer.row:
                pairs.append((item, sent))
            try:
                item = policy.send(sent)
            except StopIteration:
                return

    batch = prompts(20, 22)
    options = RULES.options_type(**COMMON, rule=rule, bound=0.3, window=8)
    list(Engine(tiny36, watched, options).run([Prompt(ids) for ids in batch]))
    assert pairs
    executor = eager(tiny36, 1, SIZE)
    with torch.inference_mode():
        for forward, prediction in pairs:
            logits = executor.run_block(BlockRows([0], [forward.token_ids], [0], [forward.rows_of(forward.wanted)]))
            expected = measures(logits[0], MASK)[row].tolist()
            assert prediction.measures == pytest.approx(expected, abs=1e-4)


def test_a_measure_that_does_not_exist_is_refused(tiny36):
    def policy(answer, options):
        answer.open_block(SIZE)
        yield Forward("full", answer.tokens, wanted=range(20, 28), measure="surprise")

    options = RULES.options_type(**COMMON)
    with pytest.raises(ValueError, match=r"'surprise' .* measures entropy, margin"):
        list(Engine(tiny36, policy, options).run([Prompt(prompts(20)[0])]))


def test_layers_that_rest_in_every_phase_are_k_2_of_02(tiny36):
    batch = prompts(20, 41)
    knobs = {"layer_subset": "middle", "masked_to": 1.0}
    expected = RESIDUAL.generate(tiny36, batch, **COMMON, layer_subset="middle", reuse_k=2)
    assert PHASE.generate(tiny36, batch, **COMMON | knobs) == expected


@pytest.mark.parametrize("interval", [(0.5, 1.0), (0.25, 0.5), (0.0, 0.25)])
def test_layers_rest_in_their_phase_alone(tiny36, interval):
    """Counted from the events: the masked share at the start of each step, and whether layers rested on it."""
    start = 33  # the answer's block begins with one known row
    masked, num_rests, previous = 2 * SIZE - start, 0, True
    knobs = {"layer_subset": "last", "masked_from": interval[0], "masked_to": interval[1], "small_block_size": 4}
    for event in PHASE.denoise(tiny36, prompts(start), **COMMON | knobs):
        if event.kind in ("full", "partial"):
            rests = event.kind == "partial"
            assert rests == (interval[0] < masked / SIZE <= interval[1] and not previous)
            masked, num_rests, previous = masked - len(event.positions), num_rests + rests, rests
    assert num_rests
