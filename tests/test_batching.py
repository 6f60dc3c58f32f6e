"""How many sequences the memory holds, and that `auto` is taken wherever a batch size is."""

from __future__ import annotations

import pytest
import torch
from golden_models import golden_model

from fast_dllm.decode import batching
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decode.batching import rows_that_fit
from fast_dllm.errors import UsageError
from fast_dllm.evaluate import harness
from fast_dllm.evaluate.harness import FastDLLM


@pytest.fixture
def model():
    return golden_model("tiny36")


def free_memory(monkeypatch, amount: float) -> None:
    monkeypatch.setattr(batching, "available_on_host", lambda: int(amount))


def test_rows_follow_the_memory_and_the_length(model, monkeypatch):
    found = []
    for megabytes in (1, 40, 80, 100_000):
        free_memory(monkeypatch, megabytes * 1e6)
        found.append(rows_that_fit(model, 512, 32))
    assert found[0] == 1, "one row is always tried"
    assert found[0] < found[1] < found[2] < found[3] == batching.MOST_ROWS["cpu"]
    free_memory(monkeypatch, 80e6)
    assert rows_that_fit(model, 1024, 32) < found[2], "longer sequences, fewer of them"


def test_auto_is_a_batch_size_and_other_words_are_not():
    assert ModelArguments.parse(batch_size="auto").batch_size == "auto"
    assert ModelArguments.parse(batch_size="8").batch_size == 8
    for wrong in ("automatic", "0", "auto:2"):
        with pytest.raises(UsageError, match="batch_size must be a whole number of at least 1, or auto, not"):
            ModelArguments.parse(batch_size=wrong)


def test_auto_answers_as_any_batch_size_does_and_says_what_it_took(short_random, monkeypatch, tmp_path):
    from test_harness import asks

    texts = [f"{'x' * (index * 7)} {index}" for index in range(5)]
    given = {"model_path": str(short_random), "max_new_tokens": 32, "device": "cpu"}
    expected = FastDLLM(ModelArguments.parse(**given, batch_size=2)).generate_until(asks(texts), disable_tqdm=True)
    lm = FastDLLM(ModelArguments.parse(**given, batch_size="auto"))
    lm.keep_answers(tmp_path)
    monkeypatch.setattr(batching, "MOST_ROWS", {"cpu": 3})
    said: list[str] = []
    monkeypatch.setattr(harness.logger, "warning", lambda text, *values: said.append(text % values))
    assert lm.generate_until(asks(texts), disable_tqdm=True) == expected
    [template, line] = said
    assert "--apply_chat_template" in template  # these prompts were made without the tokenizer's chat template
    assert line.startswith("batch_size auto: 3 sequences of up to")
    assert lm.answers.total().batch_sizes == {3: 5}


def test_requests_that_are_given_no_answer_are_an_error():
    with pytest.raises(RuntimeError, match="2 requests were given no answer"):
        list(batching.streamed(lambda requests, num_rows: iter(()), ["a", "b"], 2))


def test_every_request_is_given_its_own_answer_in_the_order_they_end(model):
    from test_engine import COMMON, prompt

    from fast_dllm.decode import experiments

    experiment = experiments.load(None)
    prompts = [prompt(length) for length in (70, 5, 33, 64, 12)]
    alone = [experiment.generate(model, [each], **COMMON)[0] for each in prompts]
    got = list(
        batching.streamed(lambda given, rows: experiment.denoise(model, given, num_rows=rows, **COMMON), prompts, 4)
    )
    assert sorted(prompts.index(asked) for asked, *_ in got) == list(range(5))
    for asked, generation, seconds, rows in got:
        assert generation == alone[prompts.index(asked)]
        assert seconds >= 0
        assert rows == 4


def test_a_gpu_that_is_full_is_asked_for_its_free_memory(model, monkeypatch):
    """On a machine without one: what torch would say of it."""
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(2e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(3e8))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(1e8))
    few = rows_that_fit(model, 30000, 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(70e9), int(80e9)))
    assert 1 <= few < rows_that_fit(model, 30000, 32) == batching.MOST_ROWS["cuda"]
