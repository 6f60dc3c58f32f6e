"""The page in a real browser and the chat in a real terminal, on a model that needs no download."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from golden_models import ROOT

pexpect = pytest.importorskip("pexpect")
sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "CUDA_VISIBLE_DEVICES": "",
}
ALL_UNMASKED = "document.querySelector('{0} .cells.done') && !document.querySelector('{0} .m')"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def page_address(random_model, tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    port, log = free_port(), tmp_path_factory.mktemp("app") / "log"
    arguments = ["--port", str(port), "--model", str(random_model), "--model_args", "max_new_tokens=64"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "app.py", *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(page_address):
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture
def page(browser, page_address):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(60_000)
    opened.goto(page_address)
    opened.wait_for_selector("#message textarea")
    yield opened
    opened.close()


def ask(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def set_number(page, control: str, value: float) -> None:
    number = page.locator(f"#{control} input[type=number]")
    if not number.is_visible():
        page.get_by_text("Settings").first.click()
    slider = page.locator(f"#{control} input[type=range]")
    end = time.monotonic() + 60
    while float(slider.input_value()) != value:  # what is filled in before the opened part is alive is forgotten
        assert time.monotonic() < end, f"{control} stays {slider.input_value()}"
        number.fill(str(value))
        number.press("Tab")
        page.wait_for_timeout(200)


def shown_at_rest(page, seconds: float = 2.0) -> str:
    """The answer's cells once nothing in them has changed for a while."""
    before, since = page.inner_text("#cells"), time.monotonic()
    end = since + 60
    while time.monotonic() - since < seconds:
        assert time.monotonic() < end, "the answer goes on"
        time.sleep(0.1)
        if (now := page.inner_text("#cells")) != before:
            before, since = now, time.monotonic()
    return before


def test_an_answer_streams_in_and_can_be_replayed(page):
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")  # seen while masks are still there
    page.wait_for_selector("#cells .new")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert "denoising steps" in page.inner_text("#cells .stats")
    assert page.locator("#cells .blk").count() >= 2
    slider = page.locator("#replay input[type=range]")
    slider.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    page.wait_for_selector("#cells .m")


def test_what_a_visitor_or_the_model_writes_is_shown_as_text(page):
    hostile = '<img src=x onerror="window.hacked=1"><b>bold</b> שלום עולם'
    ask(page, hostile)
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert page.get_by_text(hostile).count() >= 1
    assert page.evaluate("window.hacked") is None


def test_stop_ends_an_answer_and_the_next_one_works(page):
    set_number(page, "budget", 256)  # long enough that it cannot end by itself first
    ask(page, "Hello")
    for milliseconds in (0, 60, 150, 400):  # between two blocks no mask is shown, in a commit no row is new
        ask(page, "Hello")
        page.wait_for_selector("#cells .m")
        page.wait_for_timeout(milliseconds)
        page.click("#stop")
        page.wait_for_selector("#cells .cells.stopped")
        shown = shown_at_rest(page)
        assert re.search(r"^stopped · \d+ tokens", shown, re.MULTILINE)
        assert "Error" not in shown
        assert page.locator("#cells .done").count() == 0
    set_number(page, "budget", 32)
    ask(page, "Again")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))


def test_clear_ends_the_answer_and_nothing_of_it_comes_back(page):
    set_number(page, "budget", 256)
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")
    page.click("#clear")
    page.wait_for_selector("#cells :text('next answer')")
    assert "next answer" in shown_at_rest(page)
    ask(page, "Again")
    page.wait_for_selector("#cells .m")


def test_a_second_message_waits_until_the_first_is_answered(page):
    set_number(page, "budget", 256)
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")
    ask(page, "me too")
    page.wait_for_selector("text=still being written")
    assert page.input_value("#message textarea") == "me too"
    page.click("#stop")
    page.wait_for_selector("#cells .cells.stopped")


def test_an_empty_and_a_too_long_message_are_told_and_harm_nothing(page):
    ask(page, " ")
    page.wait_for_selector("#cells .err:has-text('empty')")
    ask(page, "x" * 4000)
    page.wait_for_selector("#cells .err:has-text('tokens long')")
    ask(page, "Hello")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))


def test_what_is_typed_while_an_answer_is_written_stays(page):
    set_number(page, "budget", 256)
    ask(page, "Hello")
    page.wait_for_selector("#cells .m")
    page.fill("#message textarea", "my next question")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert page.input_value("#message textarea") == "my next question"


def test_two_configurations_run_side_by_side(page):
    page.get_by_role("tab", name="Side by side").click()
    page.fill("#prompt textarea", "Hello")
    page.click("#compare")
    for side in ("#side-a", "#side-b"):
        page.wait_for_function(ALL_UNMASKED.format(side))
    assert "reused" not in page.inner_text("#side-a .stats")
    assert re.search(r"reused \d+", page.inner_text("#side-b .stats"))
    assert "reuse_k 3, layer_subset last" in page.inner_text("#side-b")


def test_two_visitors_are_answered_in_turn(page, browser, page_address):
    other = browser.new_page()
    other.set_default_timeout(60_000)
    other.goto(page_address)
    other.wait_for_selector("#message textarea")
    ask(page, "one")
    ask(other, "two, another question")
    page.click("#stop")  # the first visitor's stop leaves the second one alone
    other.wait_for_function(ALL_UNMASKED.format("#cells"))
    assert "two, another question" in other.inner_text("body")
    assert "two, another question" not in page.inner_text("body")
    other.close()


def test_an_answer_that_waits_in_the_queue_can_be_stopped(page, browser, page_address):
    other = browser.new_page()
    other.set_default_timeout(60_000)
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


def test_a_control_changes_the_next_answer(page):
    set_number(page, "threshold", 0)
    ask(page, "Hello")
    page.wait_for_function(ALL_UNMASKED.format("#cells"))
    per_step = float(re.search(r"\(([\d.]+) tokens/step\)", page.inner_text("#cells .stats"))[1])
    assert per_step > 3


def test_a_model_error_is_shown_as_text_and_the_next_answer_works(random_model, monkeypatch):
    import app
    from fast_dllm.arguments import ModelArguments
    from fast_dllm.chat import Chatbot

    chatbot = Chatbot(ModelArguments.parse(model_path=str(random_model), max_new_tokens=64, device="cpu"))
    page = app.Page(chatbot)
    own = [value for each in app.policies() for value in app.own_knobs(each).values()]
    controls = (app.ACTIVE, 0.5, 8, 0.0, 0.95, 64, *own)
    with monkeypatch.context() as broken:
        broken.setattr(
            chatbot.model, "run_block", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
        )
        *_, last = page.answer("Hello", [], None, *controls)
        assert "out of &lt;memory&gt;" in last[2]
        *_, sides = page.compare("Hello", "reuse_k=3,layer_subset=last", None, *controls)
        assert all("out of &lt;memory&gt;" in side for side in sides)
    *_, last = page.answer("Hello", [], None, *controls)
    assert "denoising steps" in last[2]
    assert [message["role"] for message in last[5]] == ["user", "assistant"]


UP = "\x1b[1A\x1b[2K"  # to the line above, and erase it


@pytest.fixture
def terminal(random_model, tmp_path):
    arguments = ["run_chatbot.py", "--model", str(random_model), "--model_args", "max_new_tokens=64"]
    child = pexpect.spawn(
        sys.executable,
        arguments,
        cwd=str(ROOT),
        env=ENVIRONMENT | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"},
        encoding="utf-8",
        timeout=90,
        dimensions=(24, 80),
    )
    child.expect("/help tells")
    yield child
    child.close(force=True)


def test_the_terminal_streams_obeys_commands_and_survives_ctrl_c(terminal, tmp_path):
    terminal.expect("> ")
    terminal.sendline("Hello")
    terminal.expect("[▒░]")  # masks are seen filling
    terminal.expect(r"tokens/s; forwards:[^\n]*\n")
    terminal.expect("> ")
    terminal.sendline("/set threshold 0.8")
    terminal.expect("threshold = 0.8")
    terminal.sendline("/set threshold 9")
    terminal.expect("error: threshold must be a number from 0 to 1")
    terminal.sendline("/nope")
    terminal.expect("error: unknown command /nope")
    terminal.sendline("Hello again")
    terminal.expect("[▒░]")
    terminal.sendintr()
    terminal.expect(r"\(stopped\)")
    terminal.expect("> ")
    terminal.sendline("/settings")
    terminal.expect(r"threshold +0\.8  \(changed\)")
    terminal.expect("README")
    terminal.sendline("/clear")
    terminal.expect("forgotten")
    terminal.sendline("/set threshold 0.75\x1b[D\x7f6")  # the cursor a letter to the left, that letter made another
    terminal.expect(r"threshold = 0\.65")
    terminal.send("\x1b[A\r")  # up: the line before once more
    terminal.expect(r"threshold = 0\.65")
    terminal.expect("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    assert terminal.before.endswith("\n")  # the shell's prompt gets a line of its own
    terminal.wait()
    assert terminal.exitstatus == 0
    assert "/set threshold 0.65" in (tmp_path / "fast_dllm" / "chat_history").read_text()


def test_an_answer_taller_than_the_window_is_written_once(terminal):
    terminal.expect("> ")
    terminal.setwinsize(8, 30)
    for line in ("/set max_new_tokens 512", "/set threshold 1"):
        terminal.sendline(line)
        terminal.expect(" = ")
    terminal.expect("> ")
    terminal.sendline("Hello")
    terminal.expect(r"\r\n(\x1b\[\?2004h)?> ", timeout=120)
    # rich goes up over what it has drawn and draws anew; a line that has scrolled out stays in the scrollback for good
    heights = [1 + len(ups) // len(UP) for ups in re.findall(rf"(?:{re.escape(UP)})+", terminal.before)]
    assert 4 < max(heights) <= 8


@pytest.mark.parametrize("word", ["/exit", "/quit", "exit", "quit"])
def test_a_word_leaves(terminal, word):
    terminal.expect("> ")
    terminal.sendline(word)
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0


def test_a_closed_pipe_ends_the_talk_in_silence(random_model):
    words = f"{sys.executable} run_chatbot.py --model {random_model} --model_args max_new_tokens=64"
    typed = "Hello\n/settings\n" * 20
    code = f"printf '{typed}' | {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.replace("Loading weights", "")) == (0, "")


def run_chatbot(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "run_chatbot.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=120)


def test_once_prints_only_the_answer(random_model):
    given = ["--model", str(random_model), "--model_args", "max_new_tokens=32"]
    once = run_chatbot(*given, "--once", "Hello")
    piped = run_chatbot(*given, typed="Hello\nexit\n")
    assert once.returncode == piped.returncode == 0
    assert once.stdout == piped.stdout
    assert once.stdout.strip()
    assert "\x1b" not in once.stdout


def test_bad_arguments_are_one_line_and_exit_code_2(random_model):
    for program in ("run_chatbot.py", "app.py"):
        command = [sys.executable, program, "--model", str(random_model), "--model_args", "threshold=3"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].endswith("threshold must be a number from 0 to 1, not 3")
        assert "Traceback" not in done.stderr
