"""What the page shows beside the answer, and where: legend, colours, layers, replay, comparison, phone."""

from __future__ import annotations

import itertools
import re

import pytest
from browser_page import ALL_UNMASKED, ask, set_number

from fast_dllm.decoding import GUESSED_KINDS
from fast_dllm.ui.cells import LEGEND, cells_html
from fast_dllm.ui.chat import AnswerFrame, Cell, Chatbot, with_defaults
from fast_dllm.ui.comparison import PAIRS, PROMPT, comparison_html, first_difference
from fast_dllm.ui.layer_view import layer_states, layers_html
from fast_dllm.ui.style import STYLE


def frame_of(*texts: str | None, kind: str = "full", done: bool = False, **more) -> AnswerFrame:
    cells = tuple(
        Cell(index, text, 0.5, 1, None if text is None else hash(text)) if text is not None else Cell(index)
        for index, text in enumerate(texts)
    )
    given = {"forwards": {"full": 2, "reused": 0}, "steps": 2, "num_layers": 36} | more
    return AnswerFrame(cells, 32, 8, (0, 8), kind, "", done=done, **given)


def test_the_guesses_of_a_frame_are_those_that_ran_and_the_used_ones_gave_the_next_tokens():
    chatbot = Chatbot(with_defaults({"model_path": "tiny", "device": "cpu", "experiment_name": "06_lookahead"}))
    settings = chatbot.default_settings().changed(states=4, threshold=1.0)
    frames = list(chatbot.stream([{"role": "user", "content": PROMPT}], settings))
    plain = list(chatbot.stream([{"role": "user", "content": PROMPT}], settings.changed(states=1)))
    assert frames[-1].text == plain[-1].text
    assert not any(frame.guesses for frame in plain)
    used = [frame for frame in frames if frame.kind in GUESSED_KINDS.values()]
    assert len(used) == len([frame for frame in frames if frame.used_guess is not None]) > 0
    for before, frame in itertools.pairwise(frames):
        if frame.used_guess is None:
            continue
        guess = frame.guesses[frame.used_guess]
        assert (guess.kind == "commit") == (frame.kind == "guessed_commit")
        if guess.kind == "step":  # it has the tokens that its own forward, and earlier guesses of it, unmasked
            new = [cell.text for cell in before.cells if before.is_new(cell)]
            assert all(text in guess.text for text in new), (new, guess)
    assert any("not used" in layers_html(frames, frame.number) for frame in frames)


def test_the_digits_of_a_number_stay_together_and_a_line_break_breaks_the_line():
    shown = cells_html(frame_of("1", "2", " +", " 3", "4", ".\n", "<b>", None))
    numbers = [part.split("</span></span>")[0] for part in shown.split("class='num'")[1:]]
    assert [part.count("data-sure") for part in numbers] == [2, 2]
    assert "⏎</span><br>" in shown
    assert "&lt;b&gt;" in shown
    assert "class='c m on'" in shown


def test_two_answers_part_at_the_first_token_that_differs():
    one, other = frame_of("a", "b", "c", done=True), frame_of("a", "x", "c", done=True)
    assert first_difference(one, other) == 1
    assert "Token 2 is the first that differs: “b” against “x”" in comparison_html(one, other)
    assert first_difference(one, one) is None
    assert "All 3 tokens are the same" in comparison_html(one, one)
    assert first_difference(one, frame_of("a", "b", done=True)) == 2
    assert first_difference(one, frame_of("a", None, None)) is None  # it is not there yet


@pytest.mark.parametrize(
    ("frame", "states"),
    [
        (frame_of("a"), [(range(36), "run")]),
        (
            frame_of("a", kind="partial", layers_at_rest=range(12, 24)),
            [(range(12), "run"), (range(12, 24), "reused"), (range(24, 36), "run")],
        ),
        (
            frame_of("a", kind="reused", layers_at_rest=range(36), subset=range(24, 36)),
            [(range(24), "skipped"), (range(24, 36), "reused")],
        ),
        (frame_of("a", kind="reused", layers_at_rest=range(36)), [(range(36), "skipped")]),
    ],
)
def test_a_layer_is_run_reused_or_skipped(frame, states):
    assert layer_states(frame) == states
    drawn = layers_html([frame])
    assert [drawn.count(f"<rect class='{state}'") for state in ("run", "reused", "skipped")] == [
        sum(name == state for _, name in states) for state in ("run", "reused", "skipped")
    ]


def test_side_by_side_starts_with_a_pair_whose_tokens_differ_on_the_embedded_model():
    from fast_dllm.ui.chat import parse_model_args

    chatbot = Chatbot(with_defaults({"model_path": "tiny", "device": "cpu"}))
    last = []
    for changes in next(iter(PAIRS.values())):
        settings = chatbot.default_settings().changed(**parse_model_args(changes))
        *_, frame = chatbot.stream([{"role": "user", "content": PROMPT}], settings)
        last.append(frame)
    assert first_difference(*last) is not None


def test_the_page_says_what_it_is_and_what_its_signs_mean(page):
    intro = page.inner_text("#intro")
    assert "blocks of masks" in intro
    assert "million parameters" in intro
    legend = page.inner_text("#legend")
    for word in ("block", "sub-block", "masked", "how sure", "unmasked", "line break"):
        assert word in legend
        assert word in LEGEND


# Of each sign in the legend: its name, and whether the name begins on the line of its last swatch.
SIGNS_BESIDE_THEIR_NAMES = """
() => [...document.querySelectorAll('.legend span')].map(sign => {
  const swatch = [...sign.querySelectorAll('i')].pop().getBoundingClientRect();
  const name = [...sign.childNodes].find(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const letter = document.createRange();
  const start = name.data.search(/\\S/);
  letter.setStart(name, start);
  letter.setEnd(name, start + 1);
  const place = letter.getBoundingClientRect();
  return [name.data.trim(), place.bottom > swatch.top && place.top < swatch.bottom];
})
"""


@pytest.mark.parametrize("width", [280, 1280])
def test_no_line_of_the_legend_breaks_between_a_swatch_and_its_name(browser, width):
    page = browser.new_page(viewport={"width": width, "height": 600})
    page.set_content(f"<style>{STYLE}</style>{LEGEND}")
    signs = page.evaluate(SIGNS_BESIDE_THEIR_NAMES)
    page.close()
    assert len(signs) == 8
    assert [name for name, is_beside in signs if not is_beside] == []


@pytest.mark.slow
def test_a_finished_answer_tells_how_sure_each_token_is_and_can_be_copied(page, page_address):
    """Each token keeps its confidence as a colour and tells it on a tap; the arrow keys lead from token to token."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=page_address)
    ask(page, "a < b & c")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    tokens = page.locator("#cells [data-sure]")
    colours = tokens.evaluate_all("all => all.map(each => each.style.backgroundColor)")
    assert all(colours)
    assert len(set(colours)) > 1
    tokens.first.click()
    label = tokens.first.evaluate("each => getComputedStyle(each, '::after').content")
    assert label.strip('"') == tokens.first.get_attribute("data-sure")
    page.locator("#cells [data-sure][tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("each => document.activeElement === each")
    last = page.locator("#layers g[data-step]").count()
    page.locator("#layers g[tabindex='0']").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f"#layers .stats:has-text('{last - 1} of {last}')")
    page.evaluate("navigator.clipboard.writeText('')")
    page.click("#copy")
    page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.split() == page.locator("#talk .bot").last.inner_text().split()


@pytest.mark.slow
def test_enter_sends_and_shift_enter_breaks_the_line(page):
    box = page.locator("#message textarea")
    box.fill("Hello")
    box.press("Shift+Enter")
    box.press_sequentially("you")
    assert box.input_value() == "Hello\nyou"
    box.press("Enter")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    asked = page.locator("#talk .user").first
    assert "Hello\nyou" in asked.inner_text()


def test_the_replay_plays_to_the_end_moves_the_layer_view_and_goes_with_clear(page):
    set_number(page, "threshold", 0)  # few forwards
    ask(page, "Hello")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    tokens_per_step = float(re.search(r"\(([\d.]+) tokens/step\)", page.inner_text("#cells .stats"))[1])
    assert tokens_per_step > 3, "the answer follows the setting"
    slider = page.locator("#replay input[type=range]")
    last = int(slider.get_attribute("max"))
    assert page.locator("#layers g[data-step]").count() == last
    page.locator("#layers g[data-step='2']").click()
    page.wait_for_selector("#layers .stats:has-text('2 of')")
    assert slider.input_value() == "2"
    page.locator("#speed input").click()
    page.get_by_role("option", name="16").click()
    page.click("#play")
    page.wait_for_selector(f"#layers .stats:has-text('{last} of {last}')")
    page.wait_for_selector("#play:has-text('Play')")
    assert slider.input_value() == str(last)
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    page.click("#play")  # at the end: anew from the start
    page.wait_for_selector("#play:has-text('Pause')")
    page.click("#clear")
    page.wait_for_selector("#cells :text('next answer')")
    page.wait_for_selector("#play:has-text('Play')")
    page.wait_for_timeout(1000)  # a tick that was on its way brings nothing back
    assert page.locator("#cells .c").count() == page.locator("#layers g").count() == 0
    assert slider.is_disabled()


@pytest.mark.slow
def test_the_conversation_survives_a_reload_and_not_clear(page):
    ask(page, "remember <me>")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    page.reload()
    page.wait_for_selector("#talk :text('remember <me>')")
    page.click("#clear")
    page.wait_for_selector("#talk :text('remember <me>')", state="detached")
    page.wait_for_timeout(500)
    page.reload()
    page.wait_for_selector("#message textarea")
    page.wait_for_timeout(1500)
    assert page.locator("#talk :text('remember')").count() == 0


@pytest.mark.slow
def test_who_waits_sees_the_place_in_the_queue_count_down_and_the_own_message(page, browser, page_address):
    set_number(page, "budget", 256)
    others = [browser.new_page() for _ in range(2)]
    for other in others:
        other.set_default_timeout(120_000)
        other.goto(page_address)
        set_number(other, "budget", 256)
    ask(page, "one")
    page.wait_for_selector("#cells .m")
    second, third = others
    ask(second, "two, the second")
    second.wait_for_selector("#cells :text('queue: 1/1')")
    ask(third, "three")
    third.wait_for_selector("#cells :text('queue: 2/2')")
    box = second.locator("#message textarea")
    assert box.input_value() == "two, the second"
    reached = box.evaluate(
        "e => { const r = e.getBoundingClientRect();"
        "return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2) === e; }"
    )
    assert reached  # nothing lies over it
    page.click("#stop")  # the first visitor's stop leaves the others alone
    third.wait_for_selector("#cells :text('queue: 1/1')")
    second.wait_for_selector("#cells .m")
    assert "two, the second" not in page.inner_text("body")
    second.click("#stop")
    for other in others:
        other.wait_for_function(ALL_UNMASKED.format("#cells") if other is third else "true")
        other.close()


@pytest.mark.slow
def test_side_by_side_starts_with_a_pair_that_differs_and_says_what_both_cost(page):
    page.get_by_role("tab", name="Side by side").click()
    page.fill("#prompt textarea", "Hello")
    page.click("#compare")
    page.wait_for_function(ALL_UNMASKED.format("#side-b"))
    page.wait_for_selector("#stop-compare:disabled")
    table = page.inner_text("#table")
    for word in ("tokens", "steps", "forwards", "layer-forwards", "time", "tokens/s"):
        assert word in table
    assert page.locator("#table tr").count() == 3
    assert page.locator("#table .part").count() == 1
    assert page.locator("#side-a .layers svg").count() == page.locator("#side-b .layers svg").count() == 1
    differing = page.locator("#side-a .diff").count(), page.locator("#side-b .diff").count()
    assert differing == ((0, 0) if "are the same" in table else (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 640])  # 640: a window of 1280 at 200% zoom
def test_on_a_small_screen_examples_stand_by_the_input_and_send_leads_to_the_tokens(browser, page_address, width):
    phone = browser.new_page(viewport={"width": width, "height": 450 if width == 640 else 850})
    phone.set_default_timeout(120_000)
    phone.goto(page_address)
    phone.wait_for_selector("#message textarea")
    assert not phone.is_visible("#talk")  # while it is empty
    names = ("#message", "#buttons", "#examples", "#replaying", "#cells", "#layers", "#legend")
    tops = [phone.locator(each).bounding_box()["y"] for each in names]
    assert tops == sorted(tops)
    assert phone.evaluate("document.documentElement.scrollWidth") <= width
    ask(phone, "Hello")
    phone.wait_for_selector("#cells .m")
    phone.wait_for_timeout(500)
    top = phone.locator("#cells").bounding_box()["y"]
    assert 0 <= top < phone.viewport_size["height"] - 50
    phone.wait_for_function(ALL_UNMASKED.format("#cells"))
    phone.evaluate("window.scrollTo(0, 0)")
    phone.get_by_role("tab", name="Side by side").click()
    phone.fill("#prompt textarea", "Hello")
    phone.click("#compare")
    phone.wait_for_function(ALL_UNMASKED.format("#side-b"))
    first, second = (phone.locator(each).bounding_box() for each in ("#side-a", "#side-b"))
    assert second["y"] >= first["y"] + first["height"]
    assert phone.evaluate("document.documentElement.scrollWidth") <= width
    phone.close()


@pytest.mark.slow
def test_words_on_buttons_can_be_read_and_every_button_has_a_name_of_its_own(page):
    def contrast(selector: str) -> float:
        colours = page.locator(selector).evaluate(
            "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor].map(c => c.match(/[0-9.]+/g))"
        )
        lights = []
        for colour in colours:
            parts = [float(part) / 255 for part in colour[:3]]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
        return max(lights) / min(lights)

    for selector in ("#send", "#stop", "#clear", "#copy"):
        assert contrast(selector) >= 4.5, selector
        assert page.locator(selector).evaluate("e => getComputedStyle(e).opacity") == "1"
    ask(page, "Hello")  # the conversation, and with it gradio's own buttons
    page.wait_for_selector("#cells .m")
    assert contrast("#stop") >= 4.5
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    for name in ("Send", "Stop", "Clear", "Copy", "Settings"):
        assert page.get_by_role("button", name=name).count() == 1, name


@pytest.mark.slow
def test_the_marked_last_column_of_a_long_answer_is_in_sight(page):
    set_number(page, "threshold", 1)  # one token a step: more columns than fit
    ask(page, "Hello")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    page.wait_for_timeout(500)
    mark, sight = (page.locator(each).bounding_box() for each in ("#layers .at", "#layers .scroll"))
    assert page.locator("#layers svg").bounding_box()["width"] > sight["width"]
    assert sight["x"] <= mark["x"]
    assert mark["x"] + mark["width"] <= sight["x"] + sight["width"]


@pytest.mark.slow
@pytest.mark.parametrize(("value", "told"), [("7", "from 0 to 1, not 7"), ("", "threshold needs a value")])
def test_a_setting_out_of_range_is_refused_in_words(page, value, told):
    set_number(page, "threshold", value)
    ask(page, "Hello")
    page.wait_for_selector(f"#note .err:has-text('{told}')")


@pytest.mark.slow
def test_two_tabs_keep_a_conversation_each_after_a_reload(browser, page_address):
    both = browser.new_context()
    tabs = [both.new_page() for _ in range(2)]
    for tab, text in zip(tabs, ("the first tab", "another tab"), strict=True):
        tab.set_default_timeout(120_000)
        tab.goto(page_address)
        tab.wait_for_selector("#message textarea")
        ask(tab, text)
        tab.wait_for_selector("#stop:disabled")
        tab.wait_for_function(ALL_UNMASKED.format("#cells"))
    for tab, text in zip(tabs, ("the first tab", "another tab"), strict=True):
        tab.reload()
        tab.wait_for_selector(f"#talk :text('{text}')")
        assert tab.locator("#talk .user").count() == 1
    both.close()


def test_the_settings_of_the_examples_show_rest_and_reuse_and_say_what_the_model_does_not_see():
    from fast_dllm.ui.chat import Chatbot, with_defaults
    from fast_dllm.ui.examples import PRESETS, examples_of
    from fast_dllm.ui.page_events import Page
    from fast_dllm.ui.turns import Turn

    chatbot = Chatbot(with_defaults({"model_path": "tiny", "device": "cpu"}))
    page = Page(chatbot)
    kinds: dict[str, set[str]] = {}
    messages: list = []
    for (question, *values), label in zip(*examples_of(chatbot), strict=True):
        frames = list(page.answer(question, messages, Turn(), *values))
        note = frames[0].note
        assert ("single questions" in note) == bool(messages)
        messages = frames[-1].messages
        kinds[label.partition(":")[0]] = {frame.kind for frame in frames[-1].frames}
    assert kinds.keys() == PRESETS.keys()
    assert not kinds["plain"] & {"partial", "reused"}
    assert "partial" in kinds["k = 3, middle"]
    assert "reused" in kinds["re-read while sure"]
