"""Claims: one process at a time works on something, on any node, without flock (which some NFS and Lustre ignore).

    <base>.0001/            a claim: a folder that mkdir made, which is atomic on every file system
        owner               "host pid" of the process that made it
        heartbeat           a counter, which changes every two seconds while the owner lives
        released            the owner has ended its work

The claim with the highest number counts. An owner is dead when its process is gone from this host, or when its
heartbeat did not change for DEAD_SECONDS; no clock of another host is read. A number is never given out twice: who
comes after a dead or finished owner makes the next number and removes the older claims.

An owner that was only cut off or stopped for so long goes on beside the new one. So no file has two writers, files are
published whole, and an owner asks `is_ours` before it writes what others read.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Callable

from fast_dllm.errors import UsageError

DEAD_SECONDS = 45.0  # NFS may show a heartbeat up to half a minute late
BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.5
# The first content of a heartbeat that is read may be an old one that this host remembers, and the second the one that
# its owner wrote last. The third was written while this process looked.
CHANGES_OF_THE_LIVING = 3
GLANCE_SECONDS = 120
OWNER, HEARTBEAT, RELEASED = "owner", "heartbeat", "released"


def acquire(base: Path, wait: bool) -> Claim | None:
    """The claim on `base`, held until `release` or the end of this process.

    wait: until the present owner has ended or is dead. Otherwise only as long as it takes to see that a living owner is
    at work, about five seconds, and then the result is None. Raises OSError where no folder can be made.
    """
    base = Path(base)
    base.parent.mkdir(parents=True, exist_ok=True)
    last = latest_claim(base)
    while True:
        if last and not wait_for_end(last, wait):
            return None
        claim = Claim.after(base, last)
        if claim is None:  # another process was faster
            last = max(filter(None, (latest_claim(base), next_path(base, last))), key=number_of)
            continue
        # The number may have been free only because a later owner has removed its first owner's claim.
        last = latest_claim(base)
        if last is None or number_of(last) <= number_of(claim.path):
            break
        claim.release()
        remove_claim(claim.path)
    for older in claims_of(base):
        if older != claim.path:
            remove_claim(older)
    return claim


def is_held(base: Path) -> bool:
    """Whether a process seems to hold the claim. Does not wait, so it is for display only.

    For an owner on another host it compares the heartbeat's time with the clock of this one.
    """
    claim = latest_claim(base)
    if claim is None or (claim / RELEASED).exists():
        return False
    host, pid = parse_owner(read_owner(claim))
    if host == this_host():
        return not process_is_gone(pid)
    try:
        return abs(time.time() - (claim / HEARTBEAT).stat().st_mtime) < GLANCE_SECONDS
    except OSError:
        return False


def owner_of(base: Path) -> str:
    """The "host pid" of the latest claim on `base`, or "another process" where that cannot be read."""
    claim = latest_claim(base)
    return (claim and read_owner(claim)) or "another process"


class Claim:
    """This process's claim, a folder. A thread keeps it alive until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """path: a folder that this process has just made. Raises FileNotFoundError if another one has removed it."""
        self.path = path
        self._owner = f"{this_host()} {os.getpid()}"
        (path / OWNER).write_text(f"{self._owner}\n")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"claim on {path}", daemon=True)
        self._thread.start()

    @classmethod
    def after(cls, base: Path, last: Path | None) -> Claim | None:
        """The claim with the number after `last`; None when another process has made that one."""
        path = next_path(base, last)
        try:
            path.mkdir()
        except FileExistsError:
            return None
        try:
            return cls(path)
        except FileNotFoundError:  # the owner of a later claim has removed this one
            return None

    def is_ours(self) -> bool:
        """Whether no process has taken this one for dead. Opening the file makes the file server answer."""
        return read_owner(self.path) == self._owner

    def release(self) -> None:
        """Say that the work has ended. The folder stays, so that its number is not given out again."""
        self._ended.set()
        self._thread.join()
        if self.is_ours():
            with contextlib.suppress(OSError):
                (self.path / RELEASED).touch()

    def _keep_alive(self) -> None:
        new, count = self.path / f"{HEARTBEAT}.new", 0
        while True:
            count += 1
            try:
                new.write_text(f"{count}\n")
                new.replace(self.path / HEARTBEAT)
            except FileNotFoundError:
                return  # the folder is gone: another process has taken over
            except OSError:
                pass  # a full disk or a server that does not answer may be better at the next beat
            if self._ended.wait(BEAT_SECONDS):
                return


# -- the claims of a base ----------------------------------------------------------------------------------------------
def claims_of(base: Path) -> list[Path]:
    """All claims on `base`, whatever they are, the one with the highest number first."""
    name = re.compile(re.escape(Path(base).name) + r"\.[0-9]{4,}")
    try:
        paths = [Path(entry.path) for entry in os.scandir(Path(base).parent) if name.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    return sorted(paths, key=number_of, reverse=True)


def latest_claim(base: Path) -> Path | None:
    return next(iter(claims_of(base)), None)


def number_of(claim: Path) -> int:
    return int(claim.name.rpartition(".")[2])


def next_path(base: Path, last: Path | None) -> Path:
    return base.with_name(f"{base.name}.{number_of(last) + 1 if last else 1:04d}")


def remove_claim(claim: Path) -> None:
    """Delete a claim. Its owner file goes first, because a process that was wrongly taken for dead looks for that."""
    with contextlib.suppress(OSError):
        (claim / OWNER).unlink()
    if claim.is_dir() and not claim.is_symlink():
        shutil.rmtree(claim, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            claim.unlink()


# -- owners ------------------------------------------------------------------------------------------------------------
def wait_for_end(claim: Path, wait: bool, report: Callable[[float], None] = lambda seconds: None) -> bool:
    """True once the owner of a claim has ended or is dead; False when it lives and `wait` is False.

    report: called with the seconds waited, after each look.
    """
    dead_after = dead_seconds()
    heartbeat, silent, changes = "", 0.0, 0
    began = last_look = time.monotonic()
    while claim.is_dir() and not (claim / RELEASED).exists():
        host, pid = parse_owner(read_owner(claim))
        if host == this_host() and process_is_gone(pid):
            return True
        now = time.monotonic()
        # Time in which this process could not look, because it was stopped or the file server did not answer, says
        # nothing about the owner.
        silent += min(now - last_look, 2 * LOOK_SECONDS)
        last_look = now
        content = _read(claim / HEARTBEAT) or ""
        if content != heartbeat:
            heartbeat, silent, changes = content, 0.0, changes + 1
        if silent >= dead_after:
            return True
        if not wait and changes >= CHANGES_OF_THE_LIVING:
            return False
        time.sleep(LOOK_SECONDS)
        report(now - began)
    return True


def dead_seconds() -> float:
    """After how many seconds without a heartbeat an owner is dead. Raises UsageError."""
    text = os.environ.get("DEAD_SECONDS") or str(DEAD_SECONDS)
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text, re.ASCII):
        raise UsageError(f"DEAD_SECONDS must be a number of seconds, not {text!r}")
    return float(text)


def this_host() -> str:
    return os.uname().nodename


def read_owner(claim: Path) -> str:
    """The "host pid" of a claim's owner; "" where it cannot be read."""
    return " ".join((_read(claim / OWNER) or "").split())


def parse_owner(text: str) -> tuple[str, int]:
    """(host, pid) of "host pid"; ("", 0) of anything else."""
    match = re.fullmatch(r"(\S+) ([0-9]{1,18})", text, re.ASCII)
    return (match[1], int(match[2])) if match else ("", 0)


def process_is_gone(pid: int) -> bool:
    """Whether no process of this host has this number. A zombie is gone."""
    try:
        if Path("/proc/self").is_dir():
            state = re.search(r"^State:\s*(.)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            return state is None or state[1] in "ZX"
        os.kill(pid, 0)
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True
    return False


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
