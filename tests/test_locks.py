"""Claims: one owner at a time, a dead one is replaced, a living one never, and damage never stops anybody."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_models import ROOT

from fast_dllm.errors import UsageError
from fast_dllm.spec import locks
from fast_dllm.spec.locks import acquire, is_held, latest_claim, owner_of

HOLD = """
import sys, time
from pathlib import Path
from fast_dllm.spec.locks import acquire
claim = acquire(Path(sys.argv[1]), wait=True)
print(claim.path.name, flush=True)
sys.stdin.readline()
print(claim.is_ours(), flush=True)
claim.release()
"""


@pytest.fixture
def base(tmp_path):
    return tmp_path / "run" / ".lock"


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    """Of this process; those that it starts beat and look as usual."""
    monkeypatch.setenv("DEAD_SECONDS", "3")
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "LOOK_SECONDS", 0.05)


class Clock:
    """Stands in for the time module of fast_dllm.spec.locks: `sleep` takes no time, and others act meanwhile."""

    def __init__(self) -> None:
        self.now, self.time = 0.0, time.time
        self.others: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for act in self.others:
            act()

    def owner(self, claim: Path, clock_is_behind: float, first_beat_after: float = 0.0) -> None:
        """An owner on another node beats from now on every 0.4 s, with the time stamps of its own clock."""
        beats: list[float] = []

        def beat() -> None:
            if self.now >= first_beat_after + 0.4 * len(beats):
                beats.append(self.now)
                (claim / "heartbeat").write_text(f"{len(beats)}\n")
                os.utime(claim / "heartbeat", times=(time.time() - clock_is_behind,) * 2)

        self.others.append(beat)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(locks, "time", made)
    return made


def hold(base, **extra) -> subprocess.Popen:
    """A process that holds the claim until it is sent a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | extra
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(base)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def pretend(base: Path, number: int, owner: str | None = "another-node 7", heartbeat: str | None = None) -> Path:
    """A claim as another process would have left it."""
    claim = base.with_name(f"{base.name}.{number:04d}")
    claim.mkdir(parents=True)
    if owner is not None:
        (claim / "owner").write_text(f"{owner}\n")
    if heartbeat is not None:
        (claim / "heartbeat").write_text(heartbeat)
    return claim


def test_one_holds_it_and_the_next_comes_after_its_release(base):
    first = acquire(base, wait=False)
    assert (first.path.name, first.is_ours(), is_held(base)) == (".lock.0001", True, True)
    assert owner_of(base) == f"{os.uname().nodename} {os.getpid()}"
    assert acquire(base, wait=False) is None
    first.release()
    assert not is_held(base)
    second = acquire(base, wait=False)
    assert second.path.name == ".lock.0002"
    assert not first.path.exists()
    assert not first.is_ours()
    second.release()


def test_a_heartbeat_changes_while_the_owner_lives_and_ends_with_it(base):
    claim = acquire(base, wait=False)
    beats = set()
    end = time.monotonic() + 10
    while len(beats) < 3 and time.monotonic() < end:
        beats.add(locks._read(claim.path / "heartbeat"))
        time.sleep(0.2)
    assert len(beats) >= 3
    claim.release()
    last = (claim.path / "heartbeat").read_text()
    time.sleep(0.5)
    assert (claim.path / "heartbeat").read_text() == last


def test_a_killed_owner_on_this_host_is_replaced_at_once(base, monkeypatch):
    monkeypatch.setenv("DEAD_SECONDS", "60")
    process = hold(base)
    assert process.stdout.readline() == ".lock.0001\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    claim = acquire(base, wait=False)
    assert claim.path.name == ".lock.0002"
    assert time.monotonic() - began < 2
    claim.release()


def test_a_stopped_owner_is_replaced_and_notices_it(base, monkeypatch):
    monkeypatch.setenv("DEAD_SECONDS", "1")
    process = hold(base)
    assert process.stdout.readline() == ".lock.0001\n"
    process.send_signal(signal.SIGSTOP)
    claim = acquire(base, wait=True)
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n", timeout=20)[0] == "False\n"
    assert claim.is_ours()
    assert [path.name for path in base.parent.iterdir()] == [".lock.0002"]
    claim.release()


def test_of_many_at_once_one_after_the_other_has_it(base):
    processes = [hold(base) for _ in range(5)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(name for name, _ in outputs) == [f".lock.{number:04d}" for number in range(1, 6)]
    assert {ours for _, ours in outputs} == {"True"}


@pytest.mark.parametrize("behind", [130.0, -130.0])
def test_a_living_owner_keeps_its_claim_whatever_its_clock_says(base, clock, behind):
    claim = pretend(base, 4)
    clock.owner(claim, behind)
    assert acquire(base, wait=False) is None
    clock.sleep(3.5)
    assert acquire(base, wait=False) is None
    assert latest_claim(base) == claim


def test_an_owner_that_has_not_beaten_yet_gets_its_chance(base, clock):
    claim = pretend(base, 4, owner=None)
    clock.owner(claim, 0.0, first_beat_after=2.0)
    assert acquire(base, wait=False) is None
    assert latest_claim(base) == claim


def test_a_dead_owner_of_another_node_is_replaced_and_its_number_is_not_used_again(base, clock):
    dead = pretend(base, 7, heartbeat="12\n")
    claim = acquire(base, wait=False)
    assert 2.9 < clock.now < 3.2
    assert claim.path.name == ".lock.0008"
    assert not dead.exists()
    claim.release()


def test_numbers_go_on_after_9999(base):
    pretend(base, 9999, owner=f"{os.uname().nodename} 999999999")
    claim = acquire(base, wait=False)
    assert (claim.path.name, claim.is_ours(), latest_claim(base)) == (".lock.10000", True, claim.path)
    claim.release()
    assert acquire(base, wait=False).path.name == ".lock.10001"


@pytest.mark.parametrize(
    "damage", ["no owner", "empty owner", "owner is a folder", "words", "pid of 400 digits", "a file", "nowhere"]
)
def test_a_damaged_claim_stops_nobody(base, damage, clock):
    base.parent.mkdir(parents=True)
    claim = base.with_name(".lock.0003")
    if damage == "a file":
        claim.write_text("")
    elif damage == "nowhere":
        claim.symlink_to("nowhere")
    else:
        claim.mkdir()
    if damage == "owner is a folder":
        (claim / "owner").mkdir()
    owner = {"empty owner": "", "words": "\x1b[1m no owner at all\n", "pid of 400 digits": f"n {'9' * 400}"}.get(damage)
    if owner is not None:
        (claim / "owner").write_text(owner)
    assert isinstance(is_held(base), bool)
    assert isinstance(owner_of(base), str)
    made = acquire(base, wait=True)
    assert (made.path.name, made.is_ours()) == (".lock.0004", True)
    assert [path.name for path in base.parent.iterdir()] == [".lock.0004"]
    made.release()


def test_a_number_that_was_free_because_a_later_owner_cleared_it_is_not_taken(base, monkeypatch):
    """The process sees a dead claim; before it makes the next one, two others come and go."""
    dead = pretend(base, 5, owner=f"{os.uname().nodename} 999999999")
    original = locks.wait_for_end

    def wait_for_end(claim, *words):
        ended = original(claim, *words)
        if claim == dead:
            monkeypatch.setattr(locks, "wait_for_end", original)
            shutil.rmtree(dead)
            pretend(base, 7, owner=f"{os.uname().nodename} 999999999")
        return ended

    monkeypatch.setattr(locks, "wait_for_end", wait_for_end)
    claim = acquire(base, wait=True)
    assert claim.path.name == ".lock.0008"
    assert [path.name for path in base.parent.iterdir()] == [".lock.0008"]


def test_hundreds_of_claims_that_were_left_over_take_a_moment(base):
    for number in range(1, 501):
        pretend(base, number, owner=f"{os.uname().nodename} 999999999")
    began = time.monotonic()
    claim = acquire(base, wait=False)
    assert time.monotonic() - began < 15
    assert [path.name for path in base.parent.iterdir()] == [claim.path.name] == [".lock.0501"]


def test_time_in_which_nobody_could_look_does_not_count(base, clock):
    """The file server does not answer for an hour; then the owner's first sign of life comes two seconds later."""
    claim = pretend(base, 1, heartbeat="1")
    looks = []

    def look() -> None:
        looks.append(clock.now)
        if len(looks) == 3:
            clock.now += 3600
        if len(looks) > 40:
            (claim / "heartbeat").write_text(str(len(looks)))

    clock.others.append(look)
    assert acquire(base, wait=False) is None


def test_a_beat_that_fails_for_a_moment_is_not_the_last(base, monkeypatch):
    failures = []
    original = Path.replace

    def replace(path, target):
        if path.name == "heartbeat.new" and len(failures) < 3:
            failures.append(path)
            raise OSError(28, "No space left on device")
        return original(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    claim = acquire(base, wait=False)
    time.sleep(1)
    assert len(failures) == 3
    assert int((claim.path / "heartbeat").read_text()) > 3
    claim.release()


@pytest.mark.parametrize("text", ["soon", "-1", "1e3", "٣"])
def test_dead_seconds_that_are_none_are_refused_in_a_line(base, monkeypatch, text):
    monkeypatch.setenv("DEAD_SECONDS", text)
    pretend(base, 1)
    with pytest.raises(UsageError, match="DEAD_SECONDS must be a number of seconds, not "):
        acquire(base, wait=True)
