"""The chat in a real terminal, on a model that needs no download. The page: tests/test_page.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from browser_page import ENVIRONMENT
from golden_models import ROOT

pexpect = pytest.importorskip("pexpect")


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
    terminal.expect("docs/arguments.md")
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("word", ["/quit", "exit"])
def test_a_word_leaves(terminal, word):
    terminal.expect("> ")
    terminal.sendline(word)
    terminal.expect(pexpect.EOF)
    assert terminal.wait() == 0


@pytest.mark.slow
def test_a_closed_pipe_ends_the_talk_in_silence(short_random):
    words = f"{sys.executable} run_chatbot.py --model {short_random} --model_args max_new_tokens=64"
    typed = "Hello\n/settings\n" * 20
    code = f"printf '{typed}' | {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.replace("Loading weights", "")) == (0, "")


def run_chatbot(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "run_chatbot.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_once_prints_only_the_answer(short_random):
    given = ["--model", str(short_random), "--model_args", "max_new_tokens=32"]
    once = run_chatbot(*given, "--once", "Hello")
    piped = run_chatbot(*given, typed="Hello\nexit\n")
    assert once.returncode == piped.returncode == 0
    assert once.stdout == piped.stdout
    assert once.stdout.strip()
    assert "\x1b" not in once.stdout


@pytest.mark.slow
def test_bad_arguments_are_one_line_and_exit_code_2(short_random):
    for program in ("run_chatbot.py", "app.py"):
        command = [sys.executable, program, "--model", str(short_random), "--model_args", "threshold=3"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].endswith("threshold must be a number from 0 to 1, not 3")
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_byte_that_is_no_utf8_is_one_line_and_the_talk_goes_on(short_random):
    given = [sys.executable, "run_chatbot.py", "--model", str(short_random), "--model_args", "max_new_tokens=32"]
    once = subprocess.run([*given, "--once", b"caf\xe9"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert once.returncode == 2
    assert len(once.stderr.splitlines()) == 1
    assert b"character 4 of the message is not valid UTF-8" in once.stderr
    typed = b"caf\xe9\nHello\n"
    talk = subprocess.run(given, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120, input=typed)
    assert talk.returncode == 0
    assert b"character 4 of the message is not valid UTF-8" in talk.stderr
    assert b"Traceback" not in talk.stderr
    assert talk.stdout.strip()
