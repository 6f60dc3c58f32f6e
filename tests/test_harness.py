"""The lm_eval adapter: requests in, texts and scores out, in order and within their limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import golden_json, oracle
from lm_eval.api.instance import Instance
from oracle import assert_float32_of

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import scoring
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.evaluate.prompts import cut_at_stop_strings
from fast_dllm.network.tokenizer import load_tokenizer

# What float32 may cost one token's log-probability: 22 orders of summation gave 3.5e-5 at most, and two forwards, of
# different lengths or batches, need not sum in the same order.
SCORE = 1e-4
ANSWERS = {"until": [], "do_sample": False}


def adapter(model: Path, **changes: object) -> FastDLLM:
    given = {"model_path": str(model), "max_new_tokens": 64, "threshold": 0.6, "batch_size": 3, "device": "cpu"}
    return FastDLLM(ModelArguments.parse(**given | changes))


@pytest.fixture(scope="module")
def lm(random_model) -> FastDLLM:
    return adapter(random_model)


@pytest.fixture(scope="module")
def short_lm(short_random) -> FastDLLM:
    return adapter(short_random)


def asks(texts: list[str], settings: dict | None = None, task: str = "made_up", kind: str = "generate_until"):
    return [
        Instance(kind, {}, (text, dict(ANSWERS if settings is None else settings)), index, metadata=(task, index, 1))
        for index, text in enumerate(texts)
    ]


def scored(lm: FastDLLM, triples, mode: str) -> list[tuple[float, bool]]:
    parts = [lm.scorer.masked_inputs(context, continuation, mode == "chain") for context, continuation in triples]
    return lm.scorer.score(parts, quiet=True)


def test_reference_scores_equal_the_reference(lm):
    cases = golden_json("tiny36.loglikelihood.json")
    assert {(case["mask_id"], case["eos_token"]) for case in cases} == {(lm.loaded.ids.mask, lm.loaded.ids.stop)}
    got = scored(lm, [(case["context"], case["continuation"]) for case in cases], "reference")
    truth = []
    for case in cases:
        ids = [*case["context"], lm.loaded.ids.mask, *case["continuation"][1:], lm.loaded.ids.stop]
        truth.append(log_prob_and_best(lm, ids, len(case["context"]), case["continuation"][0])[0])
    reference = np.array([case["loglikelihood"] for case in cases])
    # a dozen numbers say less about a spread than all the logits do: 20 orders of summation gave 1.5 and 2.6 at most
    assert_float32_of(np.array(truth), np.array([value for value, _ in got]), reference, rms=3, largest=5)


def test_the_modes_agree_on_one_token_and_differ_on_more(lm):
    cases = golden_json("tiny36.loglikelihood.json")
    for case in cases:
        pair = (case["context"], case["continuation"])
        (reference,), (chain,) = scored(lm, [pair], "reference"), scored(lm, [pair], "chain")
        if len(case["continuation"]) == 1:
            assert chain == pytest.approx(reference, abs=1e-5)
        else:
            assert abs(chain[0] - reference[0]) > 1e-3


def log_prob_and_best(lm: FastDLLM, ids: list[int], position: int, target: int) -> tuple[float, bool]:
    """Of `target` at `position`, in float64: masks fill the block, nothing is cut, nothing is shared."""
    logits = oracle("tiny36").logits([*ids, *[lm.loaded.ids.mask] * (-len(ids) % 32)])[position - 1]
    logits -= logits.max()
    return float(logits[target] - np.log(np.exp(logits).sum())), int(logits.argmax()) == target


@pytest.mark.parametrize("context_length", [5, 31, 32])
def test_chain_masks_each_token_and_all_that_follow(lm, context_length):
    context, continuation = list(range(10, 10 + context_length)), [7, 200, 33]
    expected, greedy = 0.0, True
    for index, target in enumerate(continuation):
        ids = [*context, *continuation[:index], *[lm.loaded.ids.mask] * (3 - index), lm.loaded.ids.stop]
        value, best = log_prob_and_best(lm, ids, context_length + index, target)
        expected, greedy = expected + value, greedy and best
    assert scored(lm, [(context, continuation)], "chain") == [(pytest.approx(expected, abs=3 * SCORE), greedy)]


def test_equal_masked_inputs_need_one_forward(short_lm):
    before = short_lm.cost.forwards.get("score", 0)
    context = list(range(40, 80))
    scores = scored(short_lm, [(context, [letter]) for letter in (65, 66, 67, 68)], "reference")
    assert short_lm.cost.forwards["score"] == before + 1
    assert len({value for value, _ in scores}) == 4


def test_loglikelihood_keeps_the_order_of_mixed_lengths_and_takes_an_empty_list(short_lm):
    pairs = [
        ("a longer context than the others, over one block of bytes", " x"),
        ("b", " yy"),
        ("", "z"),
        ("c d", " e"),
    ]
    together = short_lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    alone = [short_lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=SCORE)
    assert short_lm.loglikelihood([], disable_tqdm=True) == []


def letters_after_a_chat(lm) -> list[tuple[list[int], list[int]]]:
    chat = lm.apply_chat_template([{"role": "user", "content": "Which one?\nA. x\nB. y\nC. z\nD. w\nAnswer:"}])
    assert chat.endswith("\n")
    return [lm._encode_pair(chat, letter) for letter in "ABCD"]


def assert_only_the_letter_is_masked(lm, pairs) -> None:
    assert all(len(continuation) == 1 for _, continuation in pairs)
    inputs = {lm.scorer.masked_inputs(context, continuation, False)[0][0] for context, continuation in pairs}
    assert len(inputs) == 1, "the four letters of a question need one forward"


def test_a_letter_after_a_chat_prompt_is_the_masked_token(lm):
    assert_only_the_letter_is_masked(lm, letters_after_a_chat(lm))


def test_so_it_is_with_the_published_tokenizer(lm, shared, monkeypatch):
    monkeypatch.setattr(lm.loaded, "tokenizer", load_tokenizer(str(shared / "reference" / "fast_dllm_v2_7b")))
    assert_only_the_letter_is_masked(lm, letters_after_a_chat(lm))
    context, continuation = lm._encode_pair("Answer: ", "A")  # here the space belongs to the letter's token
    assert lm.tokenizer.decode(continuation) == " A"
    assert lm.tokenizer.decode(context) == "Answer:"


def test_rolling_is_the_chain_rule_over_the_whole_text(lm):
    text = "Ten bytes and a few more, over a block."
    ids = lm.tok_encode(text)
    assert len(ids) > 32
    expected = 0.0
    for index, target in enumerate(ids):
        row = [lm.prefix_token_id, *ids[:index], *[lm.loaded.ids.mask] * (len(ids) - index)]
        expected += log_prob_and_best(lm, row, index + 1, target)[0]
    got = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert got == [pytest.approx(expected, abs=1e-3)]
    assert lm.loglikelihood_rolling([], disable_tqdm=True) == []


def test_answers_come_in_order_whatever_the_batches(short_lm):
    texts = [f"Question {'x' * (7 * index)} {index}" for index in range(4)]  # batches of 3: the last one is short
    together = short_lm.generate_until(asks(texts), disable_tqdm=True)
    alone = [short_lm.generate_until(asks([text]), disable_tqdm=True)[0] for text in texts]
    assert together == alone
    assert len(set(together)) > 1
    assert short_lm.generate_until([], disable_tqdm=True) == []


def test_max_gen_toks_of_a_task_holds_to_the_token(short_lm):
    prompt = "p" * 45
    (full,) = short_lm.generate_until(asks([prompt], ANSWERS | {"max_gen_toks": 64}), disable_tqdm=True)
    for limit in (5, 33):
        request = short_lm.generator.request(asks([prompt], ANSWERS | {"max_gen_toks": limit})[0], 0)
        (generation,) = short_lm.experiment.generate(
            short_lm.model, [list(request.prompt_ids)], **short_lm.generator.decoding(request.max_new_tokens, 0.0, 1.0)
        )
        assert len(generation.tokens) >= limit or generation.tokens[-1] == short_lm.loaded.ids.stop
        (short,) = short_lm.generate_until(asks([prompt], ANSWERS | {"max_gen_toks": limit}), disable_tqdm=True)
        assert short == short_lm.tokenizer.decode(generation.tokens[:limit], skip_special_tokens=True)
        assert len(short) <= len(full)


@pytest.mark.parametrize(
    ("until", "expected"),
    [(["b"], "a"), (["cd", "bc"], "ab"[:1]), ([], "abcd"), ([""], "abcd"), (["x"], "abcd"), (["a"], "")],
)
def test_text_ends_before_the_earliest_stop_string(until, expected):
    assert cut_at_stop_strings("abcd", until) == expected


def test_until_is_honoured_as_list_and_as_string(short_lm):
    (whole,) = short_lm.generate_until(asks(["Tell me"]), disable_tqdm=True)
    stop = whole[3:5]
    for until in ([stop, "never there"], stop):
        (cut,) = short_lm.generate_until(asks(["Tell me"], {"until": until}), disable_tqdm=True)
        assert cut == whole[: whole.index(stop)]


@pytest.mark.slow
def test_sampling_depends_on_the_question_and_the_seed_and_not_on_the_batch(short_lm):
    settings = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    texts = ["one", "two", "three", "four"]
    together = short_lm.generate_until(asks(texts, settings), disable_tqdm=True)
    assert together == short_lm.generate_until(asks(texts, settings), disable_tqdm=True)
    assert together[2:] == short_lm.generate_until(asks(texts, settings)[2:], disable_tqdm=True)
    (instance,) = asks(["one"], settings)
    instance.repeats = 2
    assert len(set(short_lm.generate_until([instance, instance], disable_tqdm=True))) == 2


def test_padding_copies_of_a_request_are_not_answered_again(short_lm):
    settings = {"until": [], "do_sample": True, "temperature": 1.0}
    (instance,) = asks(["once"], settings)
    before = short_lm.cost.requests
    first, copy = short_lm.generate_until([instance, instance], disable_tqdm=True)  # repeats is 1: this is padding
    assert first == copy
    assert short_lm.cost.requests == before + 1


def test_an_unsupported_generation_setting_is_refused(short_lm):
    with pytest.raises(UsageError, match=r"num_beams.*until, max_gen_toks"):
        short_lm.generate_until(asks(["x"], ANSWERS | {"num_beams": 4}), disable_tqdm=True)


def test_a_prompt_longer_than_the_context_is_cut_from_the_left_and_counted(short_lm):
    long = "y" * 3000 + "the end"
    request = short_lm.generator.request(asks([long])[0], 0)
    assert request.truncated
    assert not short_lm.generator.request(asks(["short"])[0], 0).truncated
    assert len(request.prompt_ids) + request.max_new_tokens <= short_lm.model.config.max_position_embeddings
    assert short_lm.tokenizer.decode(request.prompt_ids).endswith("the end")


def test_the_cost_of_generation_adds_up(short_random):
    lm = adapter(short_random, reuse_k=2, layer_subset="2-4")
    texts = ["a", "b" * 40]
    lm.generate_until(asks(texts), disable_tqdm=True)
    direct = lm.experiment.generate(
        lm.model, [lm.tok_encode(text) for text in texts], **lm.generator.decoding(64, 0.0, 1.0)
    )
    assert lm.cost.new_tokens == sum(len(generation.tokens) for generation in direct)
    for kind in ("prefill", "full", "sub", "commit", "reused"):
        assert lm.cost.forwards.get(kind, 0) == sum(generation.forwards[kind] for generation in direct)
    assert lm.cost.forwards["reused"] > 0
    assert lm.cost.seconds_generating > 0


class Killed(BaseException):
    """Stands for a SIGKILL: nothing may catch it."""


def killed_after(lm: FastDLLM, num_answers: int, monkeypatch) -> None:
    """As the next answer would be complete."""
    original, answers = lm.generator.denoise, iter(range(num_answers))

    def denoise(requests, num_rows):
        for event in original(requests, num_rows):
            if event.generation is not None and next(answers, None) is None:
                raise Killed
            yield event

    monkeypatch.setattr(lm.generator, "denoise", denoise)


def test_an_interrupted_run_answers_only_what_is_missing(short_random, tmp_path, monkeypatch):
    texts = [f"{'x' * index} {index}" for index in range(5)]

    def new_lm(**changes) -> FastDLLM:
        lm = adapter(short_random, **{"max_new_tokens": 32, "batch_size": 2} | changes)
        lm.keep_answers(tmp_path)
        return lm

    undisturbed = adapter(short_random, max_new_tokens=32, batch_size=2)
    expected = undisturbed.generate_until(asks(texts), disable_tqdm=True)

    first = new_lm()
    killed_after(first, 4, monkeypatch)
    with pytest.raises(Killed):
        first.generate_until(asks(texts), disable_tqdm=True)
    second = new_lm()
    assert second.generate_until(asks(texts), disable_tqdm=True) == expected
    assert second.cost.requests == 1
    assert len(second.answers.total().segments) == 2
    total, whole = second.answers.total().cost, undisturbed.answers.total().cost
    assert replace(total, seconds_generating=0) == replace(whole, seconds_generating=0)
    both = first.cost.seconds_generating + second.cost.seconds_generating
    assert total.seconds_generating == pytest.approx(both, rel=1e-12)

    other = new_lm(threshold=0.5)
    other.generate_until(asks(texts), disable_tqdm=True)
    assert other.cost.requests == 5, "another threshold must not find these answers"


def test_an_interrupted_scoring_run_scores_only_what_is_missing(short_random, tmp_path, monkeypatch):
    requests = [
        Instance("loglikelihood", {}, (context, letter), 0) for context in ("one", "two", "three") for letter in "AB"
    ]

    def new_lm(folder) -> FastDLLM:
        lm = adapter(short_random, batch_size=1)
        lm.keep_answers(folder)
        return lm

    whole = new_lm(tmp_path / "undisturbed")
    expected = whole.loglikelihood(requests, disable_tqdm=True)
    first = new_lm(tmp_path / "disturbed")
    calls, original = iter(range(2)), scoring.target_scores

    def target_scores(*arguments, **options):
        if next(calls, None) is None:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "target_scores", target_scores)
        with pytest.raises(Killed):
            first.loglikelihood(requests, disable_tqdm=True)
    second = new_lm(tmp_path / "disturbed")
    assert [tuple(score) for score in second.loglikelihood(requests, disable_tqdm=True)] == expected
    assert second.cost.forwards["score"] == 1
    totals = [lm.answers.total().cost for lm in (second, whole)]
    assert len({(cost.scored_requests, cost.scored_tokens, cost.forwards["score"]) for cost in totals}) == 1
    second.answers.store.discard()
    assert not any((tmp_path / "disturbed").iterdir())
