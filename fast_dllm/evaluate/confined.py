"""Executes one program that a model wrote, inside a sandbox, and says how it ended.

`sandbox.py` starts this file's text with `python -c`, because the sandbox may not see the project's folder. It imports
the standard library only. It must not import `annotations` from `__future__`: a program that lacks an import for its
annotations fails with NameError, as it does with lm_eval's scorer.

Input (stdin, JSON): program; token, which marks a verdict as this file's; seconds; home, the folder for files; user,
the number of the user to become, or null; mounts, the arguments of `make_mounts`, or null (bubblewrap makes its own);
limits, of the module resource. Output (stdout): "passed", "timed out", "failed: <error>" or "not executed: <error>".
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
# prctl(2), capset(2), mount(2), mount_setattr(2)
SET_SUBREAPER, SET_NO_NEW_PRIVILEGES, DROP_FROM_BOUNDING_SET = 36, 38, 24
CAPABILITY_VERSION, MOST_CAPABILITIES = 0x20080522, 64
NO_SUID, NO_DEVICES, BIND, RECURSIVE = 2, 4, 4096, 16384
MOUNT_SETATTR, CURRENT_FOLDER, SUBTREE, READ_ONLY = 442, -100, 0x8000, 1

GRACE_SECONDS = 1.0  # for a program that catches the end of its time
# What lm_eval's scorer removes before it executes a program. It is removed here too, so that the same programs pass.
MISSING_NAMES = {
    "builtins": "exit quit help",
    "os": "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate "
    "replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
}
# If a program mentions one of these, it is imported before the names above are removed, because it needs some of them.
IMPORTED_BEFORE = ("numpy", "pandas", "scipy", "sympy")
MISSING_MODULES = ("ipdb", "joblib", "resource", "psutil", "tkinter")


class OutOfTimeError(Exception):
    pass


class Discard(io.StringIO):
    """A text stream that discards what is written to it and cannot be read. It replaces stdin, stdout and stderr."""

    def write(self, text):
        return len(text)

    def read(self, *_):
        raise OSError("there is no input")

    readline = readlines = read

    def readable(self):
        return False


# -- the sandbox of `unshare` ------------------------------------------------------------------------------------------
def call(function, *arguments):
    """Call a function of the C library. Raises OSError."""
    if function(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def make_mounts(outside, hidden, visible, size):
    """Make the whole system read-only, and each hidden folder empty and writable.

    outside: the mount namespace of the evaluation, which must not be changed. visible: {a path below a hidden folder:
    the folder that is shown at this path}, for the interpreter. size: of each hidden folder, in bytes. Raises OSError.
    """
    if os.readlink("/proc/self/ns/mnt") == outside:  # noqa: PTH115 (as the evaluation read it)
        raise OSError("it shares the namespace mnt")
    sources = {path: os.open(folder, os.O_PATH) for path, folder in visible.items()}
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    call(LIBC.syscall, MOUNT_SETATTR, CURRENT_FOLDER, b"/", SUBTREE, ctypes.byref(attributes), 32)
    for path in hidden:
        Path(path).mkdir(parents=True, exist_ok=True)
        options = b"size=%d,mode=0755" % size
        call(LIBC.mount, b"tmpfs", os.fsencode(path), b"tmpfs", NO_SUID | NO_DEVICES, options)
    for path, source in sources.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        call(LIBC.mount, b"/proc/self/fd/%d" % source, os.fsencode(path), None, BIND | RECURSIVE, None)
        os.close(source)


def give_up_privileges(user):
    """Become `user` where one is given, and give up every capability, for good."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    LIBC.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for capability in range(MOST_CAPABILITIES):
        LIBC.prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)
    LIBC.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


# -- the program -------------------------------------------------------------------------------------------------------
def set_limits(limits):
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def remove_names():
    import builtins
    import shutil
    import subprocess

    modules = {"builtins": builtins, "os": os, "shutil": shutil, "subprocess": subprocess}
    for module, names in MISSING_NAMES.items():
        for name in names.split():
            setattr(modules[module], name, None)
    for name in MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]


def execute(program, seconds):
    """Execute the program; returns the verdict."""

    def end(*_):
        raise OutOfTimeError

    sys.stdin = sys.stdout = sys.stderr = Discard()
    signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        exec(compile(program, "<string>", "exec", dont_inherit=True), {})
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "passed"
    except OutOfTimeError:
        return "timed out"
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"


def run_program(request, verdicts):
    """In a child process: execute the program, write the verdict to the file descriptor `verdicts`, and end."""
    try:
        os.setsid()
        device = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(device, stream)
        os.chdir(request["home"])
        set_limits(request["limits"])
        give_up_privileges(request["user"])
        remove_names()
        verdict = execute(request["program"], request["seconds"])
    except BaseException as error:
        verdict = f"not executed: {type(error).__name__}: {error}"
    os.write(verdicts, (request["token"] + verdict).encode("utf-8", "backslashreplace")[:1000])
    os._exit(0)


# -- the process that watches it ---------------------------------------------------------------------------------------
def children():
    """The processes whose parent is this one."""
    this_process = str(os.getpid())
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            except OSError:  # it has ended
                continue
            if parent == this_process:
                yield int(folder.name)


def kill_children():
    """Kill the program and all processes that it started. Those that left its session are children of this process."""
    while True:
        for process in list(children()):
            os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def watch(request):
    """Execute the request's program in another process, for a limited time; returns the verdict."""
    LIBC.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        run_program(request, writer)
    os.close(writer)
    end = time.monotonic() + request["seconds"] + GRACE_SECONDS
    text = ""
    if select.select([reader], [], [], end - time.monotonic())[0]:
        text = os.read(reader, 4096).decode("utf-8", "replace")
    kill_children()
    return text[len(request["token"]) :] if text.startswith(request["token"]) else "timed out"


def main():
    request = json.load(sys.stdin)
    if request["mounts"] is not None:
        make_mounts(**request["mounts"])
    Path(request["home"]).mkdir(parents=True, exist_ok=True)
    if request["user"] is not None:
        os.chown(request["home"], request["user"], request["user"])
    sys.path = [folder for folder in sys.path if folder]  # without the working folder
    for name in IMPORTED_BEFORE:
        if name in request["program"]:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    os.write(1, watch(request).encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    main()
