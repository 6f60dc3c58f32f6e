"""Re-reading by confidence, windows that carry rows, two bars: against plain forms of the rules, without the engine."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from golden_models import eager

from fast_dllm.decode import experiments
from fast_dllm.decode.decoding_run import Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decoding import Forward
from fast_dllm.network.packing import BlockRows
from fast_dllm.sampling import predict

MASK, STOP, SIZE, SUB = 319, 2, 32, 8
COMMON = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 32}
ADAPTIVE, CARRY = experiments.load("01_adaptive_skip"), experiments.load("03_carry_rows")
TWO_BARS = experiments.load("05_two_bars")


def prompt(length: int, seed: int = 7) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 318) for _ in range(length)]


@dataclass
class Literal:
    """What one block of one sequence got. `steps`: for each step, the rows that ran (none: a re-read)."""

    tokens: list[int]
    steps: list[range]


def literal(model, ids: list[int], threshold: float, bar: float, most: int, carry: bool | None) -> Literal:
    """carry None: every computing step runs the whole block; else windows as 03_carry_rows says them."""
    first = len(ids) // SIZE * SIZE
    executor = eager(model, 1, first + SIZE)
    if first:
        executor.prefill([0], [ids[:first]])
    tokens = ids[first:] + [MASK] * (first + SIZE - len(ids))
    as_run = [None] * SIZE  # every row's token when it last ran
    found, shared, reach = Literal([], []), most, 0
    confidences: dict[int, float] = {}
    best_tokens: dict[int, int] = {}
    while MASK in tokens:
        start = tokens.index(MASK) // SUB * SUB
        masked = [row for row in range(start, start + SUB) if tokens[row] == MASK]
        chosen: list[int] = []
        if shared < most and start + SUB <= reach and bar < 1:
            chosen = [row for row in masked if confidences[row] > bar]
            shared += 1
        if chosen:
            found.steps.append(range(0))
        else:
            window = range(SIZE)
            if carry is not None and as_run[0] is not None:
                stale = [row for row in range(SIZE) if as_run[row] != tokens[row]]
                begin = start - SUB if tokens[start] == MASK else start
                begin = min([begin] + [row // SUB * SUB for row in stale]) if carry else begin
                if carry or tokens[start] != MASK:
                    window = range(begin, min(start + SUB * (2 if bar < 1 else 1), SIZE))
            for row in window:
                as_run[row] = tokens[row]
            read = [max(row - 1, window.start) - window.start for row in window]
            logits = executor.run_block(BlockRows([0], [[tokens[row] for row in window]], [window.start], [read]))
            candidates, given = predict(logits, MASK)
            confidences = dict(zip(window, given[0].tolist(), strict=True))
            best_tokens = dict(zip(window, candidates[0].tolist(), strict=True))
            best = max(masked, key=lambda row: confidences[row])
            chosen = [row for row in masked if row == best or confidences[row] > threshold]
            shared, reach = 1, window.stop
            found.steps.append(window)
        for row in chosen:
            tokens[row] = best_tokens[row]
        if STOP in tokens and MASK not in tokens[: tokens.index(STOP)]:
            break
    found.tokens = tokens[len(ids) - first :]
    if STOP in found.tokens:
        found.tokens = found.tokens[: found.tokens.index(STOP) + 1]
    return found


def windows_of(experiment, model, ids: list[int], **knobs) -> tuple[list[int], list[range]]:
    """New tokens, and for each denoising step that unmasked something the rows that it ran."""
    steps: list[range] = []

    def watched(answer, options):
        policy = experiment.decode_one(answer, options)
        item, window = next(policy), None
        while True:
            if isinstance(item, Forward):
                window = range(item.offset, item.offset + len(item.token_ids)) if item.kind != "prefill" else None
                sent = yield item
            else:
                if window is not None:
                    steps.append(window)
                sent = yield item
            try:
                item = policy.send(sent)
            except StopIteration:
                return

    options = experiment.options_type(**COMMON, **knobs)
    events = list(Engine(model, watched, options).run([Prompt(ids)]))
    return events[-1].generation.tokens, steps


@pytest.mark.sampled(3)
@pytest.mark.parametrize("length", [20, 35, 41])
@pytest.mark.parametrize(("bar", "cap"), [(0.3, None), (0.6, None), (0.6, 2), (0.3, 3), (0.9, 1)])
def test_re_reading_by_confidence_is_the_rule_of_its_readme(tiny36, length, bar, cap):
    ids = prompt(length)
    with torch.inference_mode():
        expected = literal(tiny36, ids, 0.6, bar, cap or SIZE, None)
    got = windows_of(ADAPTIVE, tiny36, ids, threshold=0.6, reread_above=bar, reuse_k=cap)
    assert got == (expected.tokens, expected.steps)
    assert (range(0) in expected.steps) == (cap != 1), "with another prompt re-reading shows"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("length", [20, 35, 41])
@pytest.mark.parametrize(("carry", "bar"), [(True, 1.0), (True, 0.5), (False, 1.0), (False, 0.5)])
def test_windows_are_the_rule_of_their_readme(tiny36, length, carry, bar):
    ids = prompt(length, seed=8)
    with torch.inference_mode():
        expected = literal(tiny36, ids, 0.6, bar, SIZE, carry)
    got = windows_of(CARRY, tiny36, ids, threshold=0.6, reread_above=bar, carry=carry)
    assert got == (expected.tokens, expected.steps)


def literal_two_bars(model, ids: list[int], near: float, far: float, sub: int) -> tuple[list[int], list[list[int]]]:
    """New tokens of the first block, and the rows that each step unmasked."""
    first = len(ids) // SIZE * SIZE
    executor = eager(model, 1, first + SIZE)
    if first:
        executor.prefill([0], [ids[:first]])
    tokens = ids[first:] + [MASK] * (first + SIZE - len(ids))
    steps: list[list[int]] = []
    while MASK in tokens and not (STOP in tokens and MASK not in tokens[: tokens.index(STOP)]):
        logits = executor.run_block(BlockRows([0], [tokens], [0], [[max(row - 1, 0) for row in range(SIZE)]]))
        candidates, given = (each[0].tolist() for each in predict(logits, MASK))
        masked = [row for row in range(SIZE) if tokens[row] == MASK]
        here = [row for row in masked if row < (masked[0] // sub + 1) * sub]
        chosen = {row for row in here if given[row] > far}
        for row in masked:  # in order, up to the first that is not sure
            if given[row] <= near:
                break
            chosen.add(row)
        if not chosen:
            chosen = {max(here, key=lambda row: given[row])}
        for row in chosen:
            tokens[row] = candidates[row]
        steps.append(sorted(chosen))
    new = tokens[len(ids) - first :]
    return new[: new.index(STOP) + 1] if STOP in new else new, steps


@pytest.mark.parametrize("length", [20, 35, 41])
@pytest.mark.parametrize(("near", "far", "sub"), [(0.3, 0.9, 1), (0.3, 0.6, 8), (0.5, 0.9, 32), (0.9, 0.3, 8)])
def test_two_bars_are_the_rule_of_their_readme(tiny36, length, near, far, sub):
    ids = prompt(length, seed=9)
    with torch.inference_mode():
        expected = literal_two_bars(tiny36, ids, near, far, sub)
    settings = COMMON | {"prefix_above": near, "threshold": far, "small_block_size": sub}
    events = list(TWO_BARS.denoise(tiny36, [ids], **settings))
    start = len(ids) // SIZE * SIZE
    steps = [sorted(p - start for p in event.positions) for event in events if event.kind == "full"]
    assert (events[-1].generation.tokens, steps) == expected
