"""What the engine does beside a policy: transfers, admission, grouping, and the numbers that it refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from golden_models import ROOT, denoise, few_layers, generate
from margins import assert_same_but_for_rounding
from torch import Tensor, nn
from transfers import FakeDevice

from fast_dllm.decode import experiments
from fast_dllm.decode.decoding_run import DecodingRun, Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decoding import Forward, Options
from fast_dllm.errors import NonFiniteError
from fast_dllm.network import packing
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.spec.matrix import matrix_of

COMMON = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 32, "threshold": 0.5}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reuse", [{}, {"reuse_k": 2, "layer_subset": "2-4"}, {"refresh": "rows"}])
def test_a_forward_costs_one_transfer_to_the_host(reuse):
    with torch.inference_mode(), FakeDevice() as device:
        model = device.move(few_layers())
        (got,) = generate(model, [[5, 6, 7] * 12], **COMMON, **reuse)
    forwards = {kind: count for kind, count in got.forwards.items() if count}
    unread = 1  # the prefill of a prompt that ends within a block
    assert sum(device.to_host.values()) == sum(forwards.values()) - forwards.get("reused", 0) - unread
    assert device.to_host


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, 318) for _ in range(length)]


def counted(module: nn.Module, fault: Callable[[int, Tensor], Tensor]) -> Callable[[], None]:
    """Puts a module's n-th output through fault(n, output); returns what takes it off."""
    calls = itertools.count()
    return module.register_forward_hook(lambda module, given, output: fault(next(calls), output)).remove


@pytest.mark.parametrize(("value", "temperature"), [(float("nan"), 0.0), (float("-inf"), 0.7)])
def test_logits_that_are_no_numbers_are_an_error_at_every_step(short_model, value, temperature):
    """Prefill, full, sub and commit, whichever row and token it is: no answer is made of them."""
    settings = COMMON | {"max_new_tokens": 64, "refresh": "rows", "temperature": temperature}
    rng = random.Random(2)
    whole_block = [rng.randrange(3, 318) for _ in range(32)]
    spoilt = last = -1

    def spoil(number: int, logits: Tensor) -> Tensor:
        nonlocal last
        last = number
        if number == spoilt:
            logits = logits.clone()
            logits.view(-1, logits.shape[-1])[-1, number % logits.shape[-1]] = value
        return logits

    def answer() -> None:
        remove = counted(short_model.lm_head, spoil)
        try:
            generate(short_model, [whole_block], **settings, generator=torch.Generator().manual_seed(0))
        finally:
            remove()

    answer()
    num_forwards, kinds = last + 1, []
    assert num_forwards > 15
    every = range(num_forwards) if value != value else (0, 1, 9)
    for number in every:
        spoilt = number
        with pytest.raises(NonFiniteError, match=r"^the model's logits are not finite in a \w+ forward$") as told:
            answer()
        kinds.append(str(told.value).split()[-2])
    assert kinds[:2] == ["prefill", "full"]
    if value != value and not temperature:
        assert set(kinds) == {"prefill", "full", "sub", "commit"}


def spied(monkeypatch, name: str) -> list[tuple]:
    """The arguments of every call of an executor's method from here on."""
    calls, method = [], getattr(EagerExecutor, name)

    def call(executor, *given, **named):
        calls.append((*given, named))
        return method(executor, *given, **named)

    monkeypatch.setattr(EagerExecutor, name, call)
    return calls


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_requests_beyond_the_rows_are_admitted_as_rows_become_free(short_model, monkeypatch, num_rows):
    """In the order they came, each into a row that another has left, and each answered as it is alone."""
    prompts = [prompt(length) for length in (70, 5, 33, 64, 12)]
    alone = [generate(short_model, [each], **COMMON)[0] for each in prompts]
    caches, begun = [], []
    admit = DecodingRun._admit

    def admitted(run, index, request):
        begun.append(index)
        assert len([row for row in begun if got[row] is None]) <= num_rows
        return admit(run, index, request)

    monkeypatch.setattr(DecodingRun, "_admit", admitted)
    make = short_model.new_cache
    monkeypatch.setattr(short_model, "new_cache", lambda *given: caches.append(make(*given)) or caches[-1])
    blocks = spied(monkeypatch, "run_block")
    got = [None] * len(prompts)
    for event in denoise(short_model, prompts, num_rows=num_rows, **COMMON):
        got[event.row] = event.generation
    assert got == alone
    assert begun == sorted(begun)
    assert [cache.batch_size for cache in caches] == [num_rows]
    assert max(len(block.cache_rows) for block, _ in blocks) == num_rows, "rows that are there are used together"
    assert {row for block, _ in blocks for row in block.cache_rows} == set(range(num_rows))


def test_prompts_of_like_length_are_prefilled_together(short_model, monkeypatch):
    """In one forward where the shortest is at most two blocks shorter than the longest, whether or not their last
    logits are wanted; what is run for the padding is nothing that another forward sees."""
    lengths = (40, 64, 41, 70, 63, 96, 127, 128)
    prompts = [prompt(length) for length in lengths]
    alone = [generate(short_model, [each], **COMMON)[0] for each in prompts]
    calls = spied(monkeypatch, "prefill")
    assert generate(short_model, prompts, **COMMON) == alone
    found = [([lengths[row] for row in rows], named["read"] is not None) for rows, _, named in calls]
    assert found == [([128, 96, 127, 64, 70], True), ([40, 41, 63], False)]


def test_on_a_cpu_large_forwards_are_of_one_length(short_model, monkeypatch):
    """Eight of one length are 256 rows; the three of 100 are too few to run by themselves, so the next length joins."""
    wanted = [(32,) * 8, (64,) * 9, (96,) * 3 + (128,)]
    lengths = [40] * 8 + [70] * 9 + [100] * 3 + [150]
    random.Random(3).shuffle(lengths)
    prompts = [prompt(length) for length in lengths]
    alone = {length: generate(short_model, [prompt(length)], **COMMON)[0] for length in set(lengths)}
    ran: list[tuple[int, ...]] = []
    pack = packing.pack_numbers

    def packed(cache, block, *rest):
        rows = list(block.cache_rows)
        assert rows == sorted(rows), "first rows stay first, so that none is copied"
        if len(block.token_ids[0]) == cache.block_size:
            ran.append(tuple(sorted(cache.lengths[row] for row in rows)))
        return pack(cache, block, *rest)

    monkeypatch.setattr(packing, "pack_numbers", packed)
    together = generate(short_model, prompts, **COMMON)
    for length, each, got in zip(lengths, prompts, together, strict=True):
        assert_same_but_for_rounding(short_model, experiments.load(None), each, COMMON, alone[length], got)
    assert ran[: len(wanted)] == wanted
    assert max(map(len, ran)) == max(map(len, wanted))


@pytest.mark.slow
def test_a_request_that_joins_is_prefilled_beside_the_others_blocks(short_model, monkeypatch):
    """Its prompt's blocks run in forwards that the others need anyway; the cost that is told is that of a prefill."""
    settings = COMMON | {"max_new_tokens": 96, "threshold": 0.9}
    prompts = [prompt(length) for length in (5, 6, 7, 100, 64, 200)]
    alone = [generate(short_model, [each], **settings)[0] for each in prompts]
    prefills, blocks = (spied(monkeypatch, name) for name in ("prefill", "run_block"))
    assert generate(short_model, prompts, num_rows=3, **settings) == alone
    assert [each.forwards["prefill"] for each in alone] == [0, 0, 0, 1, 1, 1]
    assert len(prefills) == 1, "the one of 200 tokens is too long to join"
    assert len(blocks) < sum(sum(each.forwards.values()) - each.forwards["prefill"] for each in alone)


def engine_of(model, **settings) -> Engine:
    experiment = experiments.load(None)
    return Engine(model, experiment.decode_one, experiment.options_type(**COMMON | settings))


@pytest.mark.parametrize("in_threads", [False, True])
def test_two_runs_of_one_engine_do_not_meet(short_model, in_threads):
    """Two iterators advanced in turns, or two threads: each run answers its own prompts as it does alone."""
    engine = engine_of(short_model)
    batches = [[prompt(70), prompt(5)], [prompt(33), prompt(64), prompt(12)]]
    alone = [list(engine.run([Prompt(each) for each in batch])) for batch in batches]
    runs = [engine.run([Prompt(each) for each in batch]) for batch in batches]
    if in_threads:
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(list, runs))
    else:
        events = list(itertools.zip_longest(*runs))
        together = [[event for event in column if event is not None] for column in zip(*events, strict=True)]
    assert together == alone


@pytest.mark.parametrize(
    "forward",
    [
        Forward("full", [5, *[319] * 31], wanted=range(8)),
        Forward("sub", [319] * 8, offset=8, wanted=range(8, 16)),
    ],
)
def test_the_first_position_of_a_window_cannot_be_filled(short_model, forward):
    """The row that predicts it stands before the window."""

    def decode_one(answer, options):
        answer.open_block(32)
        prediction = yield forward
        yield answer.fill(prediction, 0, 32, {forward.offset: 0})

    with pytest.raises(ValueError, match="nothing predicts the first position of a window"):
        list(Engine(short_model, decode_one, Options(319, 2, max_new_tokens=32)).run([Prompt([5])]))


def test_drawn_tokens_are_those_of_the_wanted_positions_whatever_else_is_kept(short_model):
    keeps, predictions = [range(8, 16), range(1, 24)], []

    def decode_one(answer, options):
        answer.open_block(32)
        keep = keeps[answer.row]
        predictions.append((yield Forward("full", list(answer.tokens), wanted=range(8, 16), keep=keep)))

    engine = Engine(short_model, decode_one, Options(319, 2, max_new_tokens=32), temperature=1.0)
    list(engine.run([Prompt([5], torch.Generator().manual_seed(0)) for _ in keeps]))
    assert predictions[0].tokens == predictions[1].tokens
    assert predictions[0].confidences == pytest.approx(predictions[1].confidences, abs=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["00_baseline", "02_residual_reuse", "06_lookahead"])
def test_rows_that_join_at_any_time_get_what_they_get_alone(tiny36, name):
    """Mixed lengths and stop times, joining in three orders; a token that differed would be told with its margin."""
    experiment = experiments.load(name)
    rng = random.Random(7)
    prompts = [prompt(length) for length in (5, 90, 33, 64, 130, 31)]
    knobs = dict(list(matrix_of(name, ROOT).configurations.values())[-1])
    settings = COMMON | {"max_new_tokens": 64} | knobs
    alone = {tuple(each): experiment.generate(tiny36, [each], **settings)[0] for each in prompts}
    for num_rows in (2, 5):
        rng.shuffle(prompts)
        together = experiment.generate(tiny36, prompts, num_rows=num_rows, **settings)
        for each, got in zip(prompts, together, strict=True):
            assert_same_but_for_rounding(tiny36, experiment, each, settings, alone[tuple(each)], got)


def test_the_check_of_rounding_sees_a_real_difference(short_model):
    """A neighbour's token, and a threshold that is off by a hundredth, are no rounding."""
    experiment = experiments.load(None)
    (right,) = experiment.generate(short_model, [prompt(40)], **COMMON)
    wrong = replace(right, tokens=[*right.tokens[:3], right.tokens[3] ^ 1, *right.tokens[4:]])
    with pytest.raises(AssertionError, match="margin"):
        assert_same_but_for_rounding(short_model, experiment, prompt(40), COMMON, right, wrong)
    other = experiment.generate(short_model, [prompt(40)], **COMMON | {"threshold": 0.3})[0]
    assert other.forwards != right.forwards, "this threshold tells"
    with pytest.raises(AssertionError, match="margin"):
        assert_same_but_for_rounding(short_model, experiment, prompt(40), COMMON, right, other)
