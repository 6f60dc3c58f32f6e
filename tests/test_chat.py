"""Conversations and the frames of their answers, without a browser or a terminal."""

from __future__ import annotations

import pytest
from golden_models import generate

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.ui.chat import Chatbot, ChatSettings, Conversation


@pytest.fixture(scope="module")
def chatbot(random_model) -> Chatbot:
    return Chatbot(ModelArguments.parse(model_path=str(random_model), max_new_tokens=64, threshold=0.5, device="cpu"))


@pytest.fixture
def conversation(chatbot) -> Conversation:
    return Conversation(chatbot, chatbot.default_settings())


def test_frames_lead_to_what_generate_returns(chatbot, conversation):
    prompt = chatbot.prompt_ids([{"role": "user", "content": "Hello"}])
    ids = chatbot.ids
    (expected,) = generate(
        chatbot.model, [prompt], mask_id=ids.mask, stop_token=ids.stop, max_new_tokens=64, threshold=0.5
    )
    frames = list(conversation.ask("Hello")[0])
    last = frames[-1]
    assert last.done
    assert not any(frame.done for frame in frames[:-1])
    assert last.forwards == expected.forwards
    assert last.num_tokens == len(last.cells) == len(expected.tokens)
    without_stop = expected.tokens[:-1] if expected.tokens[-1] == ids.stop else expected.tokens
    assert last.text == chatbot.tokenizer.decode(without_stop, skip_special_tokens=True)
    assert conversation.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": last.text}]


def test_every_frame_shows_whole_blocks_and_what_is_new(chatbot, conversation):
    start = len(chatbot.prompt_ids([{"role": "user", "content": "Hello"}]))
    before: dict[int, str] = {}
    for frame in conversation.ask("Hello")[0]:
        if frame.kind in ("full", "sub", "reused") and not frame.done:
            assert (frame.cells[-1].position + 1) % frame.block_size == 0
        assert [cell.position for cell in frame.cells] == list(range(start, start + len(frame.cells)))
        now = {cell.position: cell.text for cell in frame.cells if cell.text is not None}
        new = {cell.position for cell in frame.cells if frame.is_new(cell)}
        assert new == now.keys() - before.keys()
        assert all(before[position] == now[position] for position in before.keys() & now.keys())
        before = now
    assert frame.tokens_per_step == frame.num_tokens / frame.steps
    assert "denoising steps" in frame.statistics()


def test_stopping_stops_within_one_step_and_keeps_what_was_said(conversation, monkeypatch):
    calls = []
    original = EagerExecutor.run_block
    monkeypatch.setattr(EagerExecutor, "run_block", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    frames, _ = conversation.ask("Hello")
    seen = [next(frames) for _ in range(5)]
    made = len(calls)
    frames.close()
    assert len(calls) == made
    assert conversation.messages[-1] == {"role": "assistant", "content": seen[-1].text}


def test_a_refused_message_leaves_no_trace(conversation):
    for text in ("", "  \n", "x" * 5000):
        with pytest.raises(UsageError):
            conversation.ask(text)
    assert conversation.messages == []


def test_the_oldest_turns_are_left_out_where_they_no_longer_fit(chatbot):
    messages = []
    for turn in range(30):
        messages += [{"role": "user", "content": f"{turn} " + "q" * 60}, {"role": "assistant", "content": "a" * 60}]
    messages.append({"role": "user", "content": "last"})
    system = {"role": "system", "content": "Be brief."}
    for head in ([], [system]):
        kept, dropped = chatbot.fit([*head, *messages], ChatSettings.parse(max_new_tokens=64))
        assert dropped > 0
        assert kept == head + messages[dropped:]
        assert kept[len(head)]["role"] == "user"
        assert len(chatbot.prompt_ids(kept)) <= chatbot.max_length - 64
        longer = head + messages[dropped - 2 :]
        assert len(chatbot.prompt_ids(longer)) > chatbot.max_length - 64


def test_settings_are_checked_and_a_wrong_one_changes_nothing(conversation):
    conversation.set("threshold", "0.8")
    assert conversation.settings.knobs["threshold"] == 0.8
    before = conversation.settings
    for name, value in (("threshold", "2"), ("reuse_k", "2"), ("top_p", "0"), ("temperature", "-1"), ("nope", "1")):
        with pytest.raises(UsageError, match=name):
            conversation.set(name, value)
    with pytest.raises(UsageError, match="00_baseline"):
        conversation.set("experiment_name", "nope")
    assert conversation.settings == before
    conversation.set("layer_subset", "last")
    conversation.set("reuse_k", "3")
    knobs = conversation.settings.knobs
    assert (knobs["reuse_k"], knobs["layer_subset"]) == (3, "last")
    assert any(frame.forwards["reused"] for frame in conversation.ask("Hello")[0])
