"""Runs an evaluation on this machine and shows its progress, one line per configuration. Its output goes to a log."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping, Sequence

from fast_dllm.record.summary import SUMMARY_FILE, Summary, SummaryError, read_summary
from fast_dllm.runner.failures import INTERRUPTED, end_of
from fast_dllm.runner.progress import Progress
from fast_dllm.spec.files import is_newer
from fast_dllm.spec.request import Run

BAR = 20  # columns
LOOK_SECONDS = 0.2
PLAIN_SECONDS = 60  # between two lines about one configuration, if the output is no terminal
PATIENCE = 20  # seconds that an interrupted evaluation has to end by itself


def run_and_watch(
    command: Sequence[str], environment: Mapping[str, str], root: Path, runs: Sequence[Run], log: Path
) -> int:
    """Run an evaluation, append its output to `log`, and show the progress of its runs.

    Returns its exit status, or 130 after Ctrl-C. Ctrl-C reaches the evaluation too, because it is in the same process
    group; then this only waits for its end.
    """
    start = log.stat().st_size if log.exists() else 0
    display = Display(root, runs)
    interrupted = []  # filled by a handler: a KeyboardInterrupt could be raised at a place where it gets lost
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
    """The lines of a failed evaluation's output that say why it failed: those of eval.py itself, else the last one."""
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return [line for line in lines if re.match(r"eval\.py: ", line)] or lines[-1:]


class Display:
    """Shows progress: a moving bar on a terminal, else a line when a configuration is done and one every minute."""

    def __init__(self, root: Path, runs: Sequence[Run]) -> None:
        self.root, self.pending = root, list(runs)
        self.width = min(max((len(run.folder) for run in self.pending), default=0), 30)
        self.is_terminal = sys.stderr.isatty()
        self.began = self.last_line = time.monotonic()

    def look(self) -> None:
        """Show the runs that have ended since the last call, and the progress of the next one."""
        while self.pending and (summary := self._new_summary(self.pending[0])):
            self._line(self.pending.pop(0), done(summary, time.monotonic() - self.began), True)
            self.began = self.last_line = time.monotonic()
        if not self.pending:
            return
        progress = Progress.read(self.root / "results" / self.pending[0].path)
        if self.is_terminal:
            self._line(self.pending[0], doing(progress), False)
        elif progress and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self._line(self.pending[0], doing(progress), True)

    def end(self) -> None:
        """Show the runs that have ended. The line of an unfinished run stays on the terminal."""
        self.look()
        if self.is_terminal and self.pending:
            print(file=sys.stderr)

    def _new_summary(self, run: Run) -> Summary | None:
        """The run's summary, if this evaluation wrote it, that is, if it is newer than job.json."""
        folder = self.root / "results" / run.path
        if not is_newer(folder / SUMMARY_FILE, folder / "job.json"):
            return None
        try:
            return read_summary(folder / SUMMARY_FILE)
        except SummaryError:
            return None  # a damaged summary is reported when the evaluation has ended

    def _line(self, run: Run, text: str, is_last: bool) -> None:
        line = f"{run.folder[: self.width]:<{self.width}}  {text}"
        if self.is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:columns]:<{min(columns, 79)}}"
        print(line, end="\n" if is_last else "", file=sys.stderr, flush=True)


def bar(fraction: float) -> str:
    full = int(BAR * min(max(fraction, 0.0), 1.0))
    return "█" * full + "░" * (BAR - full)


def doing(progress: Progress | None) -> str:
    """Like `████░░░░  412/1319    48.9 tok/s  25 min left`."""
    if progress is None or not progress.total:
        return f"{bar(0)}  loading the model"
    text = f"{bar(progress.answered / progress.total)}  {progress.answered}/{progress.total}"
    if progress.tokens_per_second:
        text += f"  {progress.tokens_per_second:.1f} tok/s"
    left = progress.seconds_left
    return text if left is None else f"{text}  {duration(left)} left"


def done(summary: Summary, seconds: float) -> str:
    """Like `████████  200/200  95.5% ± 1.5  1240.1 tok/s  in 14 s`."""
    text = f"{bar(1)}  {summary.num_samples}/{summary.num_samples}"
    if summary.accuracy is not None:
        text += f"  {100 * summary.accuracy:.1f}%"
        text += f" ± {100 * summary.accuracy_stderr:.1f}" if summary.accuracy_stderr is not None else ""
    if summary.throughput.tokens_per_second is not None:
        text += f"  {summary.throughput.tokens_per_second:.1f} tok/s"
    return f"{text}  in {duration(seconds)}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
