"""What is shown while this machine evaluates: one line a configuration. All that the evaluation says is in its log."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping, Sequence

from fast_dllm.record.summary import Summary, SummaryError, read_summary
from fast_dllm.runner.failures import INTERRUPTED, end_of
from fast_dllm.runner.states import Progress, read_progress, seconds_left
from fast_dllm.spec.files import is_newer
from fast_dllm.spec.request import Run

BAR = 20  # columns
LOOK_SECONDS = 0.2
PLAIN_SECONDS = 60  # between two lines about one configuration where there is no terminal
PATIENCE = 20  # seconds that an interrupted evaluation has for its end


def run_and_watch(
    command: Sequence[str], environment: Mapping[str, str], root: Path, runs: Sequence[Run], log: Path
) -> int:
    """Run an evaluation with all that it says appended to `log`, and show how far its runs are.

    Returns its exit status; 130 after Ctrl-C, which reaches the whole process group, so that the evaluation has it
    already and is only waited for.
    """
    start = log.stat().st_size if log.exists() else 0
    display = Display(root, runs)
    interrupted = []  # a handler, not KeyboardInterrupt: that may be raised where it is lost
    former = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            while process.poll() is None and not interrupted:
                display.look()
                time.sleep(LOOK_SECONDS)
            if interrupted:
                _wait_or_kill(process)
        display.end()
    finally:
        signal.signal(signal.SIGINT, former)
    if interrupted:
        return INTERRUPTED
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    for line in faults(end_of(log, start)) if status else ():
        print(line, file=sys.stderr)
    return status


def _wait_or_kill(process: subprocess.Popen) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def faults(text: str) -> list[str]:
    """Of a failed evaluation's output the lines that say why: eval.py's own, else the last one."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return [line for line in lines if re.match(r"eval\.py: ", line)] or lines[-1:]


class Display:
    """A bar that moves on a terminal; elsewhere one line when a configuration is done, and one a minute meanwhile."""

    def __init__(self, root: Path, runs: Sequence[Run]) -> None:
        self.root, self.left = root, list(runs)
        self.width = min(max((len(run.folder) for run in self.left), default=0), 30)
        self.is_terminal = sys.stderr.isatty()
        self.began = self.told = time.monotonic()

    def look(self) -> None:
        while self.left and (summary := self._summary(self.left[0])):
            self._line(self.left.pop(0), done(summary, time.monotonic() - self.began), True)
            self.began = self.told = time.monotonic()
        if not self.left:
            return
        now = read_progress(self.root / "results" / self.left[0].path)
        if self.is_terminal:
            self._line(self.left[0], doing(now), False)
        elif now and time.monotonic() - self.told >= PLAIN_SECONDS:
            self.told = time.monotonic()
            self._line(self.left[0], doing(now), True)

    def end(self) -> None:
        """What is done is told; an unfinished line is left as it stands."""
        self.look()
        if self.is_terminal and self.left:
            print(file=sys.stderr)

    def _summary(self, run: Run) -> Summary | None:
        """The summary that this evaluation wrote; job.json was written when it began."""
        folder = self.root / "results" / run.path
        is_new = is_newer(folder / "summary.json", folder / "job.json")
        try:
            return read_summary(folder / "summary.json") if is_new else None
        except SummaryError:
            return None

    def _line(self, run: Run, text: str, is_last: bool) -> None:
        line = f"{run.folder[: self.width]:<{self.width}}  {text}"
        if self.is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:columns]:<{min(columns, 79)}}"
        print(line, end="\n" if is_last else "", file=sys.stderr, flush=True)


def bar(share: float) -> str:
    full = int(BAR * min(max(share, 0.0), 1.0))
    return "█" * full + "░" * (BAR - full)


def doing(now: Progress) -> str:
    """Like `████░░░░  412/1319    48.9 tok/s  25 min left`."""
    if now is None or not now[1]:
        return f"{bar(0)}  loading the model"
    answered, total, tokens, seconds, _, _ = now
    text = f"{bar(answered / total)}  {answered:.0f}/{total:.0f}"
    if tokens > 0 and seconds > 0:
        text += f"  {tokens / seconds:.1f} tok/s"
    left = seconds_left(now)
    return text if left is None else f"{text}  {duration(left)} left"


def done(summary: Summary, seconds: float) -> str:
    """Like `████████  200/200  95.5% ± 1.5  1240.1 tok/s  in 14 s`."""
    error, speed = summary.accuracy_stderr, summary.throughput.tokens_per_second
    text = f"{bar(1)}  {summary.num_samples}/{summary.num_samples}"
    if summary.accuracy is not None:
        text += f"  {100 * summary.accuracy:.1f}%" + (f" ± {100 * error:.1f}" if error is not None else "")
    if speed is not None:
        text += f"  {speed:.1f} tok/s"
    return f"{text}  in {duration(seconds)}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
