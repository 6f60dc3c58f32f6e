"""Every program: what is wrong with its input is one line on stderr and exit status 2, and nothing is left."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys

import pytest
from golden_models import ROOT

from fast_dllm.errors import NonFiniteError, UsageError
from fast_dllm.guard import one_line
from fast_dllm.runner.failures import classify

PROGRAMS = (
    "app.py",
    "run_chatbot.py",
    "eval.py",
    "benchmarks/decode.py",
    "benchmarks/roofline.py",
    "-m fast_dllm.report",
)


def run(*words: str, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run([*python, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_the_environment_a_program_says_how_to_get_it(program):
    done = run(*program.split(), python=(sys.executable, "-S"))  # -S: nothing that was installed
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{program.split('/')[-1].removeprefix('-m ')}: error: ")
    assert 'source "$(bash sbatch/venv.sh)/bin/activate"' in line


@pytest.mark.sampled(20)
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run_chatbot.py --nosuch", "unrecognized arguments: --nosuch"),
        ("app.py --port 99999", "--port must be from 1 to 65535, not 99999"),
        ("app.py --port {taken}", "port {taken} of 127.0.0.1 is in use; --port takes another one"),
        ("app.py --host 192.0.2.1", "cannot listen on --host 192.0.2.1: "),  # an address of no machine (RFC 5737)
        (
            "run_chatbot.py --model {here}/nothing",
            "model_path: '{here}/nothing' is neither 'tiny', nor a folder, nor a hub id",
        ),
        ("benchmarks/decode.py --batch_size 0", "--batch_size must be at least 1, not 0"),
        ("benchmarks/decode.py --runs 0", "--runs must be at least 1, not 0"),
        ("benchmarks/decode.py --model {here}/nothing", "--model: '{here}/nothing' is neither 'tiny', nor a folder"),
        ("run_chatbot.py --model tiny --model_args bd_size=4096", "bd_size must be at most half of the model's 2048"),
        ("benchmarks/decode.py --threads -1", "--threads must be at least 1, not -1"),
        (
            "benchmarks/decode.py --dtype float99",
            "--dtype must be one of auto, float32, float16, bfloat16, not 'float99'",
        ),
        ("benchmarks/decode.py --random_weights 0x0", "--random_weights takes 7b or LAYERSxHIDDEN"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, command, told):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        names = {"here": tmp_path, "taken": listener.getsockname()[1]}
        done = run(*command.format(**names).split())
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith(command.split()[0].split("/")[-1] + ": error: ")
    assert told.format(**names) in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_network(tmp_path, monkeypatch) -> None:
    """An empty cache and a hub at whose address nobody listens."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def run_online(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_without_a_network_the_chat_ends_with_one_line(no_network):
    done = run_online("run_chatbot.py", "--model", "somebody/some_model", "--once", "hi")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()  # and none for each try of the hub's client
    assert line.startswith("run_chatbot.py: cannot load model 'somebody/some_model': the hub does not answer")


def test_without_a_network_the_doctor_has_one_line_for_model_and_data(no_network):
    done = run_online("-m", "fast_dllm.doctor", "--task", "gsm8k", "--model", "somebody/some_model")
    assert (done.returncode, done.stderr) == (1, "")
    unreachable = [line for line in done.stdout.splitlines() if "the hub cannot be reached from here" in line]
    assert [line.partition(":")[0] for line in unreachable] == [
        "fail model somebody/some_model",
        "fail data set openai/gsm8k",
    ]


# app.py, which gets a Ctrl-C half a second after gradio begins to wait for one
INTERRUPTED_PAGE = """
import os, runpy, signal, sys, threading, gradio
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests beside itself ignores it
wait = gradio.Blocks.block_thread
def interrupted(blocks):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    wait(blocks)
gradio.Blocks.block_thread = interrupted
sys.argv = ["app.py", "--model", "tiny", "--port", sys.argv[1]]
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_page_as_any_program():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    done = run("-c", INTERRUPTED_PAGE, str(port))
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (130, ["app.py: interrupted"])


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UsageError("two\nlines"), 2, "error: two lines\n"),
        (NonFiniteError("layer 3"), "a_program.py: layer 3", ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_a_program_is_told_in_one_line(capsys, monkeypatch, error, status, told):
    monkeypatch.setattr(sys, "argv", ["/some/where/a_program.py"])
    with pytest.raises(SystemExit) as ended, one_line():
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err.endswith(told)


def test_what_nobody_foresaw_keeps_its_traceback_and_ends_with_its_place(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/a_program.py"])
    with pytest.raises(SystemExit) as ended, one_line():
        raise ZeroDivisionError("by nothing")
    assert re.fullmatch(
        r"a_program\.py: tests/test_guard\.py, line \d+: ZeroDivisionError: by nothing", ended.value.code
    )
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_the_runner_knows(monkeypatch, number):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as ended, one_line():
        raise OSError(number, os.strerror(number), "/scratch/answers.jsonl")
    assert ended.value.code.endswith("free some space and run it again: what was finished is kept")
    assert classify(1, f"{ended.value.code}\n", False) == "disk_quota"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_character_that_the_terminal_lacks_is_shown_as_an_escape(encoding):
    code = "from fast_dllm.guard import one_line\nwith one_line():\n    print('3 ✓ é')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == ("3 \\u2713 é\n" if encoding == "latin-1" else "3 \\u2713 \\xe9\n")


def test_a_closed_pipe_is_silent():
    code = "from fast_dllm.guard import one_line\nwith one_line():\n    while True: print('line')"
    done = run("-c", f'{sys.executable} -c "{code}" | head -n 1; exit ${{PIPESTATUS[0]}}', python=("bash",))
    assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "")
