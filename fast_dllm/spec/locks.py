"""Who is at work on a run: claims as sbatch/lock.sh makes them, read from Python."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path


def latest_claim(base: Path) -> Path | None:
    return max(base.parent.glob(f"{base.name}.[0-9][0-9][0-9][0-9]"), default=None)


def lock_owner(base: Path) -> str:
    """The "host pid" of the latest claim."""
    claim = latest_claim(base)
    try:
        return (claim / "owner").read_text().strip() if claim else "another process"
    except OSError:
        return "another process"


def process_gone(pid: str) -> bool:
    """Of this host. A zombie is gone."""
    if not pid.isdigit():
        return True
    try:
        if Path("/proc/self").is_dir():
            state = re.search(r"^State:\s*(.)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            return state is None or state[1] in "ZX"
        os.kill(int(pid), 0)
    except PermissionError:
        return False
    except (OSError, OverflowError):
        return True
    return False


def lock_is_held(base: Path) -> bool:
    """At a glance: of another host its clock has to be trusted."""
    claim = latest_claim(base)
    if claim is None or (claim / "released").exists():
        return False
    host, _, pid = lock_owner(base).partition(" ")
    if host == socket.gethostname():
        return not process_gone(pid)
    try:
        return time.time() - (claim / "heartbeat").stat().st_mtime < 120
    except OSError:
        return False
