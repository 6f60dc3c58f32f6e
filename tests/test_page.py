"""Answers on the page, in a real browser."""

from __future__ import annotations

import re

import pytest
from browser_page import ALL_UNMASKED, ask, set_number, shown_at_rest


@pytest.mark.slow
def test_an_answer_streams_in_and_can_be_replayed(page):
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")  # seen while masks are still there
    page.wait_for_selector("#cells .new")
    page.fill("#message textarea", "typed meanwhile")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert "denoising steps" in page.inner_text("#cells .stats")
    assert page.locator("#cells .blk").count() >= 2
    assert page.input_value("#message textarea") == "typed meanwhile"
    slider = page.locator("#replay input[type=range]")
    slider.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    page.wait_for_selector("#cells .m")


@pytest.mark.slow
def test_what_a_visitor_or_the_model_writes_is_shown_as_text(page):
    hostile = '<img src=x onerror="window.hacked=1"><b>bold</b> שלום עולם'
    ask(page, hostile)
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert page.get_by_text(hostile).count() >= 1
    assert page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_stop_ends_an_answer_and_the_next_one_works(page):
    """The button can be pressed only while an answer is written."""
    assert page.is_disabled("#stop")
    set_number(page, "budget", 256)  # long enough that it cannot end by itself first
    for milliseconds in (0, 150):  # between two blocks no mask is shown, in a commit no row is new
        ask(page, "Hello")
        page.wait_for_selector("#stop:enabled")
        page.wait_for_selector("#cells .m")
        page.wait_for_timeout(milliseconds)
        page.click("#stop")
        page.wait_for_selector("#cells .cells.stopped")
        shown = shown_at_rest(page)
        assert re.search(r"^stopped · \d+ tokens", shown, re.MULTILINE)
        assert "Error" not in shown
        assert page.locator("#cells .done").count() == 0
        page.wait_for_selector("#stop:disabled")
    set_number(page, "budget", 32)
    ask(page, "Again")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))


@pytest.mark.slow
def test_clear_ends_the_answer_and_nothing_of_it_comes_back(page):
    set_number(page, "budget", 256)
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")
    page.click("#clear")
    page.wait_for_selector("#cells :text('next answer')")
    assert "next answer" in shown_at_rest(page)
    ask(page, "Again")
    page.wait_for_selector("#cells .m")


@pytest.mark.slow
def test_a_second_message_waits_until_the_first_is_answered(page):
    set_number(page, "budget", 256)
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")
    ask(page, "me too")
    page.wait_for_selector("text=still being written")
    assert page.input_value("#message textarea") == "me too"
    page.wait_for_timeout(500)
    page.click("#stop")  # it can still be pressed
    page.wait_for_selector("#cells .cells.stopped")
    assert page.input_value("#message textarea") == "me too"


@pytest.mark.slow
def test_an_empty_and_a_too_long_message_are_told_and_harm_nothing(page):
    ask(page, " ")
    page.wait_for_selector("#note .err:has-text('empty')")
    ask(page, "x" * 4000)
    page.wait_for_selector("#note .err:has-text('the prompt has 4,0')")
    told = page.inner_text("#note .err")
    assert re.search(r"4,\d{3} tokens, [\d,]+ fit with 64 kept for the answer$", told)
    assert page.locator("#note").bounding_box()["y"] > page.locator("#message").bounding_box()["y"]
    assert page.is_disabled("#stop")
    ask(page, "Hello")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert page.locator("#note .err").count() == 0


@pytest.mark.slow
def test_two_configurations_run_side_by_side(page):
    page.get_by_role("tab", name="Side by side").click()
    page.fill("#prompt textarea", "Hello")
    page.fill("#changed-a textarea", "threshold=0.5")
    page.fill("#changed-b textarea", "reuse_k=3,layer_subset=last")
    page.click("#compare")
    for side in ("#side-a", "#side-b"):
        page.wait_for_function(ALL_UNMASKED.format(side))
    assert "reused" not in page.inner_text("#side-a .stats")
    assert re.search(r"reused \d+", page.inner_text("#side-b .stats"))
    assert "reuse_k 3, layer_subset last" in page.inner_text("#side-b")


@pytest.mark.slow
def test_an_answer_that_waits_in_the_queue_can_be_stopped(page, browser, page_address):
    other = browser.new_page()
    other.set_default_timeout(120_000)
    other.goto(page_address)
    other.wait_for_selector("#message textarea")
    set_number(page, "budget", 256)
    ask(page, "one")
    page.wait_for_selector("#cells .m")
    ask(other, "two")
    other.click("#stop")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert "next answer" in shown_at_rest(other)
    ask(other, "three")
    other.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert "two" not in other.inner_text("body .message-wrap")
    other.close()


@pytest.mark.slow
def test_a_closed_page_ends_its_answer(page, browser, page_address):
    other = browser.new_page()
    other.set_default_timeout(120_000)
    other.goto(page_address)
    set_number(other, "budget", 512)
    ask(other, "one")
    other.wait_for_selector("#cells .m")
    ask(page, "two")
    page.wait_for_selector("#cells :text('queue: 1/1')")
    other.close()
    page.wait_for_selector("#cells .m", timeout=10_000)  # the answer of 512 tokens would take 30 s and more


def test_a_model_error_is_shown_as_text_and_the_next_answer_works(random_model, monkeypatch):
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.network.eager import EagerExecutor
    from fast_dllm.ui import controls as widgets
    from fast_dllm.ui.chat import Chatbot
    from fast_dllm.ui.page_events import Page
    from fast_dllm.ui.turns import Turn

    chatbot = Chatbot(ModelArguments.parse(model_path=str(random_model), max_new_tokens=64, device="cpu"))
    page = Page(chatbot)
    own = [value for each in widgets.policies() for value in widgets.knobs_of(each).values()]
    controls = (widgets.ACTIVE, 0.5, 8, 0.0, 0.95, 64, *own)
    with monkeypatch.context() as broken:
        broken.setattr(
            EagerExecutor, "run_block", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
        )
        *_, last = page.answer("Hello", [], Turn(), *controls)
        assert "out of &lt;memory&gt;" in last.note
        *_, last = page.compare("Hello", "threshold=1", "reuse_k=3,layer_subset=last", Turn(), *controls)
        assert "out of &lt;memory&gt;" in last[0]
    *_, last = page.answer("Hello", [], Turn(), *controls)
    assert "denoising steps" in last.cells
    assert [message["role"] for message in last.messages] == ["user", "assistant"]


def test_a_tick_that_names_a_forward_which_is_gone_is_no_error(random_model):
    """It was on its way from the old answer's forward 9 while Clear took the answer, and the slider's end, away."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import gradio as gr
    from gradio.state_holder import SessionState

    import app
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.ui.chat import Chatbot

    chatbot = Chatbot(ModelArguments.parse(model_path=str(random_model), max_new_tokens=64, device="cpu"))
    blocks = app.build(chatbot)
    (tick,) = (event for event in blocks.fns.values() if event.fn is app.tick)
    assert not [each for each in tick.inputs if isinstance(each, gr.Slider)]
    place = tick.inputs[1]
    moving = [event for event in blocks.fns.values() if place in event.outputs]
    assert len(moving) == 4, "slider, layer view, play, tick"
    assert {event.concurrency_id for event in moving} == {"replay"}, "one after another"
    came = blocks.process_api(tick, [9] * len(tick.inputs), state=SessionState(blocks))
    with ThreadPoolExecutor() as pool:  # this thread may have a browser's loop
        result = pool.submit(asyncio.run, came).result()
    assert result["data"][1]["value"] == "▶ Play"
