"""Another commit of this project, to be measured beside this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fast_dllm.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent

# Runs in the other commit's files: reads what to answer, then answers it once for each line that comes.
ANSWERING = """
import json, sys, time
import torch
from fast_dllm.decode import experiments
try:
    from fast_dllm.network.loading import load_model
except ImportError:  # an older commit
    from fast_dllm.network.model import load_model
given = json.loads(sys.stdin.readline())
torch.set_num_threads(given["threads"])
model, experiment = load_model(given["model"], given["device"], given["dtype"]), experiments.load(None)
print("ready", flush=True)
for line in sys.stdin:
    began = time.process_time()
    batches = (given["prompts"][i : i + given["size"]] for i in range(0, len(given["prompts"]), given["size"]))
    answers = [each.tokens for batch in batches for each in experiment.generate(model, batch, **given["settings"])]
    print(json.dumps([time.process_time() - began, answers]), flush=True)
"""


def extract(commit: str, folder: Path) -> None:
    """The files of a commit. Raises UsageError where there is no such commit."""
    made = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if made.returncode:
        raise UsageError(f"--commit: {made.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=made.stdout, check=True)


class OtherCommit:
    """A commit at work in a process of its own: `answer` has it answer all prompts once."""

    def __init__(self, asks: IO[str], says: IO[str], errors: Path):
        self._asks, self._says, self._errors = asks, says, errors

    def answer(self) -> tuple[float, list[list[int]]]:
        """(processor seconds, new tokens of each prompt). Raises UsageError where the commit cannot."""
        seconds, answers = json.loads(self.told("go"))
        return seconds, answers

    def told(self, line: str) -> str:
        """What it says to a line. Raises UsageError where it says no more."""
        with suppress(BrokenPipeError):  # it has ended, and why is asked below
            self._asks.write(line + "\n")
            self._asks.flush()
        line = self._says.readline()
        if not line:
            last = (self._errors.read_text().strip() or "it ended").splitlines()[-1]
            raise UsageError(f"--commit: its files do not run this: {last}")
        return line


@contextmanager
def answering(
    commit: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    size: int,
    settings: Mapping[str, Any],
    threads: int,
    device: str = "cpu",
    dtype: str = "float32",
) -> Iterator[OtherCommit]:
    """A commit that answers `prompts` (token ids) in batches of `size`, one batch after another, by its own engine and
    the model in the folder `model`. Raises UsageError for no such commit, or one whose files do not run this."""
    given = {
        "model": model, "prompts": [list(each) for each in prompts], "size": size, "settings": dict(settings),
        "threads": threads, "device": device, "dtype": dtype,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="commit_") as name:
        folder, errors = Path(name) / "files", Path(name) / "errors.txt"
        folder.mkdir()
        extract(commit, folder)
        with errors.open("w") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-c", ANSWERING], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        assert child.stdin is not None, "it was asked for"
        assert child.stdout is not None, "it was asked for"
        try:
            other = OtherCommit(child.stdin, child.stdout, errors)
            other.told(json.dumps(given))
            yield other
        finally:
            child.kill()
            child.communicate()
