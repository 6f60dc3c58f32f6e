"""Forwards with guesses give what forwards one by one give, whatever is guessed; and 06_lookahead guesses well."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tape
import torch
from golden_models import GOLDEN_MODELS, eager, golden_json, golden_model
from margins import BOUND, smallest_margin

from fast_dllm.decode import experiments
from fast_dllm.decode.decoding_run import DecodingRun, Prompt
from fast_dllm.decode.engine import Engine
from fast_dllm.decode.sequences import SequenceState
from fast_dllm.decoding import DenoisingEvent, Forward, Options, Reuse
from fast_dllm.network import packing, recordings
from fast_dllm.network.compiled import CompiledExecutor
from fast_dllm.network.graphs import GraphExecution
from fast_dllm.network.packing import BlockRows, Candidate

MASK, STOP, SIZE = 319, 2, 32
COMMON: dict[str, Any] = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 64, "threshold": 0.6}
PLAIN, ADAPTIVE = experiments.load(None), experiments.load("01_adaptive_skip")
LOOKAHEAD = experiments.load("06_lookahead")
KIND = {"guessed": "full", "guessed_commit": "commit"}


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# -- the mechanism: guesses that are right and guesses that are wrong --------------------------------------------------
def answered(model, decode_one, batch: list[list[int]], sampling: dict) -> list[DenoisingEvent]:
    given = [Prompt(*each) for each in zip(batch, generators(len(batch)), strict=True)]
    return list(Engine(model, decode_one, PLAIN.options_type(**COMMON), **sampling).run(given))


def plain_forwards(model, batch: list[list[int]], sampling: dict) -> tuple[list[list[Forward]], list[DenoisingEvent]]:
    """What plain decoding asks for, of each prompt one after another; and its events."""
    asked: list[list[Forward]] = [[] for _ in batch]

    def decode_one(answer, options):
        policy, sent = PLAIN.decode_one(answer, options), None
        while True:
            try:
                item = policy.send(sent)
            except StopIteration:
                return
            if isinstance(item, Forward):
                asked[answer.row].append(item)
            sent = yield item

    return asked, answered(model, decode_one, batch, sampling)


def with_next_forwards(following: Sequence[Forward], seed: int):
    """A policy: plain decoding that guesses the forwards which really follow, among wrong ones. following: of the
    answer, in order."""

    def decode_one(answer, options):
        policy, sent, rng, number = PLAIN.decode_one(answer, options), None, random.Random(seed), 0
        while True:
            try:
                item = policy.send(sent)
            except StopIteration:
                return
            if isinstance(item, Forward) and item.kind != "prefill":
                while number < len(following) and following[number].token_ids != item.token_ids:
                    number += 1
                assert number < len(following), "plain decoding never came to this state"
                item = replace(item, guesses=guesses_of(item, following[number + 1 : number + 4], rng))
            sent = yield item

    return decode_one


def guesses_of(own: Forward, following: Sequence[Forward], rng: random.Random) -> tuple[Forward, ...]:
    """Those that follow, up to the first state of the next block, each behind a copy with a wrong token."""
    guesses: list[Forward] = []
    before = own
    for each in following:
        if before.kind == "commit":
            finished = len(guesses)  # the state before; its wrong copy is one further back
            if finished > 1:
                guesses.append(wrong(each, rng, continues=finished - 1))
                guesses.append(replace(each, continues=finished - 1))  # the right tokens behind the wrong block
            return (*guesses, replace(each, continues=finished))
        guesses += [wrong(each, rng), each]
        before = each
    return tuple(guesses)


def wrong(forward: Forward, rng: random.Random, continues: int | None = None) -> Forward:
    tokens = list(forward.token_ids)
    row = rng.choice([row for row, token in enumerate(tokens) if token != MASK])
    tokens[row] = (tokens[row] + 7) % 300 + 3
    return replace(forward, token_ids=tokens, continues=continues)


def told(events: Sequence[DenoisingEvent]) -> list[tuple]:
    return [(KIND.get(each.kind, each.kind), each.start, each.end, each.positions, each.tokens) for each in events]


def assert_nothing_but_speed(model, lengths: Sequence[int] = (5, 38, 64), **sampling: float) -> None:
    """With perfect guesses among wrong ones, events and confidences are those of plain decoding."""
    batch, accepted = prompts(*lengths), Counter[str]()
    asked, plain = plain_forwards(model, batch, sampling)

    def decode_one(answer, given):
        return with_next_forwards(asked[answer.row], answer.row)(answer, given)

    events = answered(model, decode_one, batch, sampling)
    for row in range(len(batch)):
        got, expected = ([event for event in each if event.row == row] for each in (events, plain))
        assert told(got) == told(expected), f"row {row}: another answer"
        for one, other in zip(got, expected, strict=True):
            assert one.confidences == pytest.approx(other.confidences, abs=1e-4), f"row {row}, from {one.start}"
        generation = got[-1].generation
        assert generation is not None, "an answer's last event has it"
        accepted += Counter(generation.guesses_accepted)
    assert accepted.keys() == {"step", "commit", "opening"}
    assert accepted.total() == sum(event.kind in KIND for event in events)
    assert accepted.total() > len(events) / 2


def test_right_guesses_among_wrong_ones_change_nothing_but_the_number_of_forwards(short_model):
    assert_nothing_but_speed(short_model)


def test_nor_where_tokens_are_drawn(short_model):
    """The n-th step draws the n-th numbers of the sequence's stream, guessed or not; no rejected guess draws any."""
    assert_nothing_but_speed(short_model, temperature=1.0, top_p=0.95)


@pytest.mark.slow
def test_and_so_it_is_in_recorded_forwards_and_in_their_shapes(monkeypatch):
    monkeypatch.setattr(recordings, "PLAIN_RUNS", 0)
    model = golden_model("tiny36")
    model.execution = GraphExecution(model, lambda: tape.record)
    assert_nothing_but_speed(model, (38,))
    recorded = model.execution.counts["recorded"]
    assert_nothing_but_speed(model, (38,))
    assert model.execution.counts["recorded"] < recorded * 2
    assert model.execution.counts["replayed"] > recorded


def test_candidates_run_as_written_where_layers_are_compiled(short_model):
    compiled = CompiledExecutor(short_model, short_model.new_cache(1, 64, SIZE), libraries=None)  # type: ignore[arg-type]
    rows = BlockRows([0, 0], [[5] * SIZE, [6] * SIZE], [0, 0], [[3], [4]], [Candidate(0), Candidate(1)])
    with torch.inference_mode():
        assert torch.equal(compiled.run_block(rows), eager(short_model, 1, 64).run_block(rows))


def accept_one_wrong_token(monkeypatch) -> None:
    original = SequenceState.matching_guess

    def lenient(self, forward, length):
        for guess in self.guesses:
            different = sum(a != b for a, b in zip(guess.forward.token_ids, forward.token_ids, strict=False))
            if guess.start == length and guess.forward.kind == forward.kind and different == 1:
                return guess
        return original(self, forward, length)

    monkeypatch.setattr(SequenceState, "matching_guess", lenient)


def see_another_candidate(monkeypatch) -> None:
    original = packing._candidate_places

    def shared(*given):
        places = original(*given)
        size = SIZE * 2
        if places.sources is None and len(places.destinations) >= size:
            sources = torch.arange(len(places.destinations))
            sources[SIZE - 1] = size - 1  # the first candidate sees the second one's last row
            return replace(places, sources=sources)
        return places

    monkeypatch.setattr(packing, "_candidate_places", shared)


def draw_for_the_guesses_too(monkeypatch) -> None:
    original = DecodingRun._guesses

    def draws(self, sequence, forward, *others):
        for _ in forward.guesses:
            torch.rand(8, generator=sequence.generator)
        return original(self, sequence, forward, *others)

    monkeypatch.setattr(DecodingRun, "_guesses", draws)


FAULTS = [accept_one_wrong_token, see_another_candidate, draw_for_the_guesses_too]


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_of_the_mechanism_is_caught(short_model, monkeypatch, plant: Callable):
    plant(monkeypatch)
    sampling = {"temperature": 1.0, "top_p": 0.95} if plant is draw_for_the_guesses_too else {}
    with pytest.raises((AssertionError, IndexError)):
        assert_nothing_but_speed(short_model, (5, 38), **sampling)


FULL = Forward("full", [MASK] * SIZE, wanted=range(8))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (replace(FULL, guesses=(FULL,) * 8), "at most 8 states, not 9"),
        (replace(FULL, guesses=(replace(FULL, token_ids=[5]),)), "state 1 of a forward with guesses is no plain"),
        (replace(FULL, guesses=(replace(FULL, continues=1),)), "guess 1 continues state 1, which is none of this"),
        (Forward("guessed", wanted=range(8)), "a policy asks for a guessed forward by its plain kind"),
    ],
)
def test_guesses_that_cannot_run_are_refused_in_words(short_model, forward, message):
    def decode_one(answer, options):
        yield forward

    with pytest.raises(ValueError, match=message):
        list(Engine(short_model, decode_one, Options(MASK, STOP)).run([Prompt([5])]))


def test_a_window_that_would_read_what_no_guess_writes_is_refused(short_model):
    def decode_one(answer, options):
        yield replace(FULL, guesses=(FULL,))
        yield Forward("sub", [MASK] * 8, 0, wanted=range(8))

    with pytest.raises(ValueError, match="a sub forward reads the block cache"):
        list(Engine(short_model, decode_one, Options(MASK, STOP)).run([Prompt([5])]))


def test_a_window_of_a_block_that_only_a_guess_has_run_is_refused(short_model):
    """The guess ran in scratch room, so the block cache has nothing of its block."""
    opening = Forward("full", [MASK] * SIZE, wanted=range(1, 8))
    kinds = []

    def decode_one(answer, options):
        yield Forward("commit", answer.tokens, guesses=(replace(opening, continues=0),))
        kinds.append((yield opening).kind)
        yield Forward("sub", [MASK] * 8, 0, wanted=range(1, 8))

    with pytest.raises(ValueError, match="a sub forward reads the block cache"):
        list(Engine(short_model, decode_one, Options(MASK, STOP, max_new_tokens=64)).run([Prompt([5] * SIZE)]))
    assert kinds == ["guessed"]


def test_a_window_beside_a_neighbour_that_guesses_reads_its_block(short_model):
    """All blocks of the shared forward run in scratch room; that of the sequence without guesses is copied from it."""
    seen = []

    def decode_one(answer, options):
        answer.open_block(SIZE)
        first = Forward("full", list(answer.tokens), wanted=range(8))
        if answer.row == 1:
            yield replace(first, guesses=(FULL,))
            return
        yield first
        seen.append((yield Forward("sub", [9] * 8, offset=8, wanted=range(9, 16))))

    engine = Engine(short_model, decode_one, Options(MASK, STOP, max_new_tokens=64))
    list(engine.run([Prompt([5, 6])]))
    list(engine.run([Prompt([5, 6]), Prompt([7])]))
    alone, beside = seen
    assert beside.tokens == alone.tokens
    assert beside.confidences == pytest.approx(alone.confidences, abs=1e-4)


def test_what_was_stored_for_a_block_is_forgotten_when_a_guess_commits_it(short_model):
    reuse, kinds = Reuse(range(1, 3), "output"), []

    def decode_one(answer, options):
        block = list(answer.tokens)
        yield Forward("full", block, reuse=reuse)
        yield Forward("full", block, guesses=(Forward("commit", block),))
        kinds.append((yield Forward("commit", block)).kind)
        yield FULL
        yield replace(FULL, reuse=replace(reuse, read=True))

    with pytest.raises(ValueError, match="before all of them were stored"):
        list(Engine(short_model, decode_one, Options(MASK, STOP, max_new_tokens=64)).run([Prompt([5] * SIZE)]))
    assert kinds == ["guessed_commit"]


# -- the policy --------------------------------------------------------------------------------------------------------
def assert_lossless(model, batch: list[list[int]], settings: dict, states: int, base=PLAIN) -> tuple[int, int]:
    """Answers of a batch of unlike lengths are those of plain decoding. Returns forwards of both, without prefills."""
    mine = LOOKAHEAD.generate(model, batch, generator=generators(len(batch)), states=states, **settings)
    plain = base.generate(model, batch, generator=generators(len(batch)), **settings)
    for prompt, one, other in zip(batch, mine, plain, strict=True):
        if one.tokens != other.tokens:
            margin = smallest_margin(model, base, prompt, settings)
            assert margin < BOUND, f"{settings}, {states} states: another answer; the smallest margin is {margin:g}"
            print(f"another answer, smallest margin {margin:g}")
    kinds = ("full", "commit")
    counts = [sum(each.forwards[kind] for each in answers for kind in kinds) for answers in (mine, plain)]
    assert counts[0] <= counts[1]
    return counts[0], counts[1]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("states", [2, 8])
@pytest.mark.parametrize("sub_size", [8, 32])
@pytest.mark.parametrize("threshold", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_setting_gives_plain_decodings_tokens(short_model, threshold, sub_size, states, temperature):
    """Sampled too: each step's random numbers are its own, however many forwards there are."""
    settings = {**COMMON, "max_new_tokens": 64, "threshold": threshold, "small_block_size": sub_size}
    if temperature:
        settings |= {"temperature": temperature, "top_p": 0.3}
    assert_lossless(short_model, prompts(5, 38, 64, 75), settings, states)


def golden_cases() -> list:
    return [
        pytest.param(name, {**case, "temperature": case.get("temperature", 0.0)}, id=f"{name}-{kind}-{index}")
        for name in GOLDEN_MODELS
        for kind in ("generate", "lab_baseline")
        for index, case in enumerate(golden_json(f"{name}.{kind}.json"))
        if case.get("reuse_k", 1) == 1
    ]


@pytest.mark.sampled(30)
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_golden_cases_are_answered_as_by_plain_decoding(golden_models, name, case):
    names = ("mask_id", "stop_token", "max_new_tokens", "block_size", "small_block_size", "threshold", "temperature")
    settings = {key: case[key] for key in names if key in case}
    for states in (2, 8):
        assert_lossless(golden_models[name], [case["prompt"]], settings, states)


@pytest.mark.parametrize(("bar", "sampling"), [(0.3, {}), (0.8, {"temperature": 1.0, "top_p": 0.3})])
def test_rereading_with_lookahead_gives_the_tokens_of_rereading(short_model, bar, sampling):
    settings = COMMON | {"small_block_size": 4, "reread_above": bar} | sampling
    for states in (1, 4):
        assert_lossless(short_model, prompts(5, 38), settings, states, base=ADAPTIVE)


def test_an_answer_may_stop_in_a_guessed_block(short_model):
    """At the first token of a block that was guessed, and at one that a guessed step wrote."""
    (prompt,) = prompts(38)
    settings = COMMON | {"threshold": 1.0}
    events = list(LOOKAHEAD.denoise(short_model, [prompt], states=8, **settings))
    written = {kind: event.tokens[0] for event in events for kind in [event.kind] if kind in KIND}
    assert written.keys() == KIND.keys()
    for kind, token in written.items():
        stopped = list(LOOKAHEAD.denoise(short_model, [prompt], states=8, **settings | {"stop_token": token}))
        plain = PLAIN.generate(short_model, [prompt], **settings | {"stop_token": token})
        assert stopped[-1].generation.tokens == plain[0].tokens
        assert stopped[-1].generation.tokens[-1] == token, kind
