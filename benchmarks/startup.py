"""From a command to the first question, beside another commit; a JSON line last.

    python -m benchmarks.startup --commit HEAD~10            # that commit's files, in turn with these
    python -m benchmarks.startup --commit v1 --runs 5 --only first_question

Each command runs --runs times for each side, in turn, after one run that does not count: what another program does to
the machine meanwhile meets both sides. `first question` ends when the progress bar of the questions appears. Seconds
are medians, on the clock and of processor time (all processes of the command), which a busy machine does not lengthen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commits import ROOT, extract
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.guard import one_line

QUESTION = ["--model", "fast_dllm_v2", "--tasks", "toy_math", "--apply_chat_template", "--limit", "5"]
QUESTION += ["--model_args", "model_path=tiny"]
FIRST = b"generating:"  # the progress bar's name, which it shows before the first batch
COMMANDS: dict[str, tuple[list[str], bytes | None]] = {  # name -> (words, what on stderr ends it; None: its end)
    "help": ([sys.executable, "eval.py", "--help"], None),
    "wrong_option": ([sys.executable, "eval.py", "run", "--num_fewshots", "3"], None),
    "first_question": ([sys.executable, "eval.py", *QUESTION], FIRST),
}


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="the commit beside which this checkout is measured")
    parser.add_argument("--runs", type=int, default=3, help="runs that count, of each command on each side")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="this command; may be given again")
    given = parser.parse_args()
    if given.runs < 1:
        raise UsageError(f"--runs must be at least 1, not {given.runs}")
    return given


def measure(words: list[str], until: bytes | None, folder: Path) -> tuple[float, float]:
    """(seconds on the clock, seconds of processor time) of a command in a checkout. Raises UsageError where it ends
    before it got as far as `until`."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "FAST_DLLM_VENV": str(Path(sys.prefix)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    before, began = os.times(), time.perf_counter()
    child = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    assert child.stderr is not None, "it was asked for"
    said = b""
    while until is None or until not in said:
        piece = os.read(child.stderr.fileno(), 65536)
        if not piece:
            break
        said += piece
    seconds = time.perf_counter() - began
    if until is not None and until not in said:
        raise UsageError(f"{' '.join(words[:3])} did not get to a question: {said.decode()[-300:]}")
    if until is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
    child.wait()
    child.stderr.close()
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, spent


def main() -> None:
    given = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="startup_") as name:
        sides = {}
        for side, commit in ("before", given.commit), ("now", None):
            sides[side] = Path(name) / side
            sides[side].mkdir()
            extract(commit or _worktree(), sides[side])
        found = {}
        print(f"{'command':22} {'before s':>9} {'now s':>9} {'now/before':>11} {'of processor time':>18}")
        for command in given.only or COMMANDS:
            words, until = COMMANDS[command]
            runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            for number in range(given.runs + 1):
                for side, folder in sides.items():
                    seconds = measure(words, until, folder)
                    runs[side] += [seconds] if number else []
            clock, spent = (
                {side: statistics.median(run[which] for run in each) for side, each in runs.items()} for which in (0, 1)
            )
            found[command] = {"seconds": clock, "processor_seconds": spent}
            ratio, of_time = clock["now"] / clock["before"], spent["now"] / spent["before"]
            print(f"{command:22} {clock['before']:9.2f} {clock['now']:9.2f} {ratio:11.0%} {of_time:18.0%}", flush=True)
    print(json.dumps({"commit": given.commit, "runs": given.runs, "commands": found}))


def _worktree() -> str:
    """A commit of this checkout's files as they are now: HEAD, where nothing was changed."""
    made = subprocess.run(["git", "-C", str(ROOT), "stash", "create"], capture_output=True, text=True, check=True)
    return made.stdout.strip() or "HEAD"


if __name__ == "__main__":
    with one_line():
        main()
