"""Executes programs that a model wrote in a sandbox, with as few rights as this machine allows.

`find_sandbox` tries, in this order, and takes the first that works:
    bubblewrap   no network; the system read-only; home, /tmp, /run and the hub's cache empty; no other process visible
    unshare      the same, with the mounts made by confined.py
    limits only  none of these
In all three the environment is cleared, and memory, processes, time and the size of files are limited. `confined.py`
executes the program. docs/experiments.md (Code tasks) says what this guards and what not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fast_dllm.errors import line_of

SECONDS = 3.0  # for one program, as lm_eval's scorer gives it
START_SECONDS = 30.0  # for a sandbox to start, on a busy machine
MEMORY_BYTES, FILE_BYTES, FOLDER_BYTES = 4 * 2**30, 64 * 2**20, 256 * 2**20
MORE_PROCESSES, OPEN_FILES = 64, 256
NOBODY = 65534
MOST_VERDICT_BYTES = 2000
BUBBLEWRAP, UNSHARE, LIMITS_ONLY = "bubblewrap", "unshare", "limits only"
CODE = Path(__file__).with_name("confined.py")


@dataclass(frozen=True)
class Sandbox:
    """One way to start a program.

    words: the command before the interpreter's. user: the number of the user that runs the program; None: this
    process's. missing: what the sandbox does not guard and why; "" if nothing is missing.
    """

    name: str
    words: tuple[str, ...] = ()
    user: int | None = None
    missing: str = ""

    def verdict(self, program: str, seconds: float = SECONDS) -> str:
        """Execute a program; returns "passed", "timed out" or "failed: <error>"."""
        return self._run(program, seconds)[0]

    def fault(self) -> str:
        """Why this sandbox does not work here; "" if it works. A program in it checks what it can see."""
        if self.words and not Path(self.words[0]).is_absolute():
            return "not installed"
        verdict, stderr_text = self._run(_check_program(), SECONDS)
        if verdict == "passed":
            return ""
        return stderr_text or verdict

    def _run(self, program: str, seconds: float) -> tuple[str, str]:
        """(verdict, what the sandbox's own program wrote to stderr)."""
        is_confined = self.name != LIMITS_ONLY
        folder = tempfile.mkdtemp(prefix="code_")
        try:
            request = {
                "program": program,
                "token": secrets.token_hex(16),
                "seconds": seconds,
                "home": "/tmp/home" if is_confined else folder,
                "user": self.user,
                "mounts": _mounts() if self.name == UNSHARE else None,
                "limits": _limits(seconds, self.user),
            }
            home = str(request["home"])
            command = [*self.words, sys.executable, "-s", "-B", "-X", "utf8", "-c", CODE.read_text(encoding="utf-8")]
            return _start(command, json.dumps(request), _environment(home), seconds, "/" if is_confined else folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def find_sandbox() -> Sandbox:
    """The first sandbox that works here. Each is tried once in a process."""
    faults = []
    for candidate in candidates():
        fault = candidate.fault()
        if not fault:
            return candidate
        faults.append(f"{candidate.name}: {fault}")
    return limits_only("; ".join(dict.fromkeys(faults)))


def sandbox_in_use() -> str | None:
    """The name of the sandbox that `find_sandbox` has found for this process; None where nothing needed one."""
    return find_sandbox().name if find_sandbox.cache_info().currsize else None


def candidates() -> Iterable[Sandbox]:
    """The sandboxes to try, the best first."""
    is_root = os.geteuid() == 0
    users = (NOBODY, None) if is_root else (None,)  # the user `nobody` may be unable to read the interpreter
    bubblewrap, unshare = (shutil.which(program) or program for program in ("bwrap", "unshare"))
    for user in users:
        # an older bubblewrap cannot limit the size of a folder
        for size in (("--size", str(FOLDER_BYTES)), ()):
            yield Sandbox(BUBBLEWRAP, (bubblewrap, *_bubblewrap_words(size)), user)
    words = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    words += [] if is_root else ["--user", "--map-root-user"]
    for user in users:
        yield Sandbox(UNSHARE, (unshare, *words), user)


def limits_only(faults: str) -> Sandbox:
    """The sandbox without namespaces. faults: why the others do not work."""
    missing = f"it can read and change what you can, and it has the network ({faults})"
    return Sandbox(LIMITS_ONLY, missing=missing)


# -- what a program may use --------------------------------------------------------------------------------------------
def _environment(home: str) -> dict[str, str]:
    """The program's environment. Of this process's it has only the seed of the hashes, which orders sets."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _limits(seconds: float, user: int | None) -> dict[str, int]:
    """Limits of one process by the names of the module resource; RLIMIT_NPROC counts all processes of the user."""
    return {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CPU": int(seconds) + 2,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": _num_threads(os.geteuid() if user is None else user) + MORE_PROCESSES,
        "RLIMIT_CORE": 0,
    }


def _num_threads(user: int) -> int:
    """The threads of a user's processes on this machine."""
    count = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and folder.stat().st_uid == user:
                count += sum(1 for _ in (folder / "task").iterdir())
    return count


def _hidden_folders() -> list[str]:
    """Folders that a program sees empty: what is private, what is temporary, and the sockets of the system's services.

    Outer folders come first.
    """
    home = Path(os.environ.get("HOME") or Path.home())
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    wanted = [home, hub, Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/run"), Path("/dev/shm")]
    folders = {str(folder.resolve()) for folder in wanted if folder.is_dir()} - {"/"}
    return sorted(folder for folder in folders if not any(_is_below(folder, outer) for outer in folders))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def _visible_folders(hidden: Iterable[str]) -> dict[str, str]:
    """{path: the folder that it leads to} for the interpreter's folders below a hidden one: its venv, its library, and
    each folder that the links from its name pass through."""
    folders = {sys.prefix, sys.base_prefix}
    program = Path(sys.executable)
    while program.is_symlink():
        program = program.parent / program.readlink()
        folders.add(os.path.normpath(program.parent.parent))
    folders |= {os.path.realpath(folder) for folder in folders}
    visible = sorted(folder for folder in folders if any(_is_below(folder, hidden_folder) for hidden_folder in hidden))
    return {folder: os.path.realpath(folder) for folder in visible}


def _mounts() -> dict[str, object]:
    hidden = _hidden_folders()
    outside = os.readlink("/proc/self/ns/mnt")  # noqa: PTH115 (it is no path)
    return {"outside": outside, "hidden": hidden, "visible": _visible_folders(hidden), "size": FOLDER_BYTES}


def _bubblewrap_words(size: tuple[str, ...]) -> list[str]:
    words = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--die-with-parent", "--new-session", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    hidden = [folder for folder in _hidden_folders() if not _is_below(folder, "/dev")]
    for folder in hidden:
        words += [*size, "--tmpfs", folder]
    for path, folder in _visible_folders(hidden).items():
        for parent in reversed(Path(path).parents):
            if any(_is_below(str(parent), hidden_folder) for hidden_folder in hidden):
                words += ["--dir", str(parent)]  # or bubblewrap makes it for its own user alone
        words += ["--ro-bind", folder, path]
    return words


# -- starting ----------------------------------------------------------------------------------------------------------
def _start(
    command: list[str], request: str, environment: dict[str, str], seconds: float, folder: str
) -> tuple[str, str]:
    """(verdict, the first line of stderr) of a command that reads the request; bounded in time and output."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    except OSError as error:
        return "failed to start", f"{line_of(error)}"

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(START_SECONDS + seconds, end)
    timer.start()
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    assert process.stderr is not None, "it is a pipe"
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request.encode("utf-8", "backslashreplace"))
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        verdict = process.stdout.read(MOST_VERDICT_BYTES).decode("utf-8", "replace")
        stderr_text = process.stderr.read(MOST_VERDICT_BYTES).decode("utf-8", "replace").strip()
    finally:
        timer.cancel()
        end()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    last = stderr_text.splitlines()[-1] if stderr_text else ""
    return verdict or "timed out", last


def _check_program() -> str:
    """A program that passes only in a closed sandbox.

    It requires other namespaces than this process's, a read-only system, an empty home, and working imports.
    """
    names = ("net", "pid", "mnt")
    namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in names}  # noqa: PTH115 (they are no paths)
    return f"""
import json, os, socket
for name, outside in {namespaces!r}.items():
    assert os.readlink("/proc/self/ns/" + name) != outside, "it shares the namespace " + name
for folder in ("/", "/etc", "/usr"):
    assert os.statvfs(folder).f_flag & os.ST_RDONLY, folder + " is not read-only"
with open(os.path.join(os.environ["HOME"], "file"), "w") as file:
    file.write("written")
assert os.listdir("/run") == [], "/run is not empty"
"""
