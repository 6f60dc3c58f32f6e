"""Estimates how long an evaluation takes: from a complete run of the same task, model and GPU, else by the roofline."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Sequence

from fast_dllm.record.summary import SUMMARY_FILE, Summary, SummaryError, read_summary
from fast_dllm.runner.roofline import GPUS, TASKS, TOKENS_PER_FORWARD, sizes_of, type_of_card
from fast_dllm.spec.request import Request, Run

START_SECONDS = 20 * 60  # a venv that has to be built, a model that has to be read, two waits for other jobs
STEP_SECONDS = 30 * 60  # wall times are asked for in whole steps
MEASURED_MARGIN = 1.5  # another configuration may need more forwards, another node may be slower
# The lab's GSM8K on an rtx_6000 at k = 1 and threshold 0.9 took 2.4 h, 3.1 times what the card's data sheet allows.
ROOFLINE_MARGIN = 4.0


@dataclass(frozen=True)
class TimeEstimate:
    """How long an evaluation takes. seconds: on one GPU, for the questions alone. margin: the factor to be safe.

    about, source: words for people, as "about" and "as k1_first measured".
    """

    seconds: float
    margin: float
    about: str
    source: str

    def wall(self, processes: int = 1) -> float:
        """Seconds of wall time to ask Slurm for, if `processes` share the questions, in one job or several."""
        return math.ceil((START_SECONDS + self.margin * self.seconds / processes) / STEP_SECONDS) * STEP_SECONDS

    def shards(self, wall: float, processes: int = 1) -> int:
        """The number of shards so that a job of `wall` seconds (above START_SECONDS) and `processes` answers one."""
        return max(1, math.ceil(self.margin * self.seconds / processes / (wall - START_SECONDS)))


def questions(run: Run) -> int | None:
    """How many questions a run answers; None if that is not known."""
    size = run.task.size(run.limit)
    return run.limit * run.task.subtasks if size is None and run.limit and run.task.subtasks else size


def estimate_of(request: Request, run: Run, gpu: str) -> TimeEstimate | None:
    """How long a run takes on a type of GPU (roofline.GPUS); None if neither a result nor the roofline says it."""
    count = questions(run)
    if count is None:
        return None
    measured = list(_measured(request, run, gpu))
    if measured:
        # Prefer runs with the same threshold, then those with the most questions, then the slowest of them.
        same = [one for one in measured if one[0]] or measured
        full = max(one[1] for one in same)
        _, _, seconds, name = max(one for one in same if one[1] == full)
        return TimeEstimate(seconds * count, MEASURED_MARGIN, "about", f"as {name} measured")
    task = next((task for task in TASKS if task.name == run.task.name), None)
    sizes = sizes_of(request.model_or_default, request.root)
    cards = [card for card in GPUS if card.slurm == gpu]
    if task is None or not task.prompt or sizes is None or not cards:
        return None
    threshold = next(value for value in sorted(TOKENS_PER_FORWARD) if float(str(run.arguments["threshold"])) <= value)
    fitting = [card for card in cards if sizes.fits(card)] or cards
    seconds = sizes.task_seconds(fitting[0], replace(task, questions=count), threshold)
    return TimeEstimate(seconds, ROOFLINE_MARGIN, "at best", "by the roofline")


def _measured(request: Request, run: Run, gpu: str) -> Iterator[tuple[bool, int, float, str]]:
    """(same threshold?, questions, seconds per question, name) of each complete run, of all experiments."""
    for name, summary in _complete(request.root, run.task.name):
        cost, count = summary.throughput, summary.num_samples
        seconds = (cost.seconds_generating or 0) + (cost.seconds_scoring or 0)
        same = summary.model == request.model_or_default
        if same and type_of_card(str(summary.gpu)) == gpu and count and seconds:
            yield summary.model_args.get("threshold") == run.arguments["threshold"], count, seconds / count, name


@functools.lru_cache(maxsize=None)
def _complete(root: Path, task: str) -> Sequence[tuple[str, Summary]]:
    """(name, summary) of all results of the task. They are read once per command."""
    summaries = []
    for top in ("results", "artifacts"):
        for folder in (task, f"{task}_limit_*"):
            for path in (root / top).glob(f"*/{folder}/*/{SUMMARY_FILE}"):
                with contextlib.suppress(SummaryError):
                    summary = read_summary(path)
                    if summary is not None:
                        summaries.append((f"{path.parent.parent.name}/{path.parent.name}", summary))
    return summaries
