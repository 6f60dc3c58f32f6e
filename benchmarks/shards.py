"""What `run.sh --shards` does on a large cluster: a simulation, and how many GPUs take how many hours.

    python benchmarks/shards.py                    # 9 configurations x 64 shards on 200 GPUs, and what changes it
    python benchmarks/shards.py --table            # the table of docs/operations.md
    python benchmarks/shards.py --shards 16 --gpus 50 --preemptions 0.5 --limit 4

The simulation plays the rules of sbatch/_job.sh: a job submits at its start the one that continues it (sbatch) and
withdraws it when it ends well (scancel); one that continues another asks the accounting how that ended (sacct); the
shard that ends last finishes the run; the job that waits for an array is released when the jobs that it knows have
ended, asks who is alive (squeue) and is renewed (sbatch) where somebody is. Jobs start in the order of their
submission, SCHEDULING seconds apart from what lets them. A job dies at its time limit, with its node, or by
preemption, which takes its GPU away for PREEMPTION_SECONDS on average; a killed job loses the answer in flight.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.runner.costs import ROOFLINE_MARGIN, TimeEstimate
from fast_dllm.runner.resources import script_option
from fast_dllm.runner.roofline import GPUS, TASKS, Sizes
from fast_dllm.runner.shard_jobs import FINISHING_SECONDS
from fast_dllm.spec.shard_names import MAX_SHARDS_AT_ONCE
from fast_dllm.spec.tasks import ROOT, baseline_tasks

CONFIGURATIONS, QUESTIONS = 9, 5000  # minerva_math
HOUR = 3600.0
# The lab's GSM8K on an RTX 6000 took this many times the roofline's time. The same is assumed of minerva_math.
OVER_ROOFLINE = 3.1
START = 120.0  # until a job's first question: the model is read and the venv is looked at (assumed)
FINISH = 60.0  # from the last answer to the summary (assumed)
LENGTH_VARIATION = 0.5  # standard deviation over mean of the answers' lengths (assumed)
SCHEDULING = 30.0  # Slurm's bf_interval
NODE_LIFE = 150 * 24 * HOUR  # of one GPU's node between two failures (assumed)
PREEMPTION_SECONDS = 4 * HOUR  # of a job that preempts one (assumed)
MAX_CONTINUATIONS = 3  # run.sh's default
CALLS = ("sbatch", "scancel", "squeue", "sacct")
HEADS = ("makespan", "deaths", "given up", "wasted", *CALLS, "a minute at most")


@dataclass
class Settings:
    """A cluster and a submission.

    shards: of each configuration. gpus: of the cluster. preemptions: per hour of a job; a job is exempt for its first
    `exempt` hours. limit: hours of a job. at_once: jobs of an array that run at the same time, Slurm's %M.
    """

    shards: int = 64
    gpus: int = 200
    preemptions: float = 0.3
    exempt: float = 1.0
    limit: float = 8.0
    at_once: int = MAX_SHARDS_AT_ONCE
    configurations: int = CONFIGURATIONS
    seed: int = 0


@dataclass
class Job:
    """One job. shard: None for the job that waits for all shards. continuations_left: how many jobs may still continue
    it. is_continuation: whether it continues a job that has begun."""

    configuration: int
    shard: int | None
    continuations_left: int = MAX_CONTINUATIONS
    is_continuation: bool = False


@dataclass
class Outcome:
    """What a simulation counts. makespan, busy, useful: in seconds; the last two of all GPUs together. calls, minutes:
    calls of Slurm's commands, by command and by minute."""

    makespan: float = 0.0
    busy: float = 0.0
    useful: float = 0.0
    deaths: int = 0
    renewals: int = 0
    abandoned: int = 0  # shards whose chain ended before they were answered
    calls: Counter = field(default_factory=Counter)
    minutes: Counter = field(default_factory=Counter)

    @property
    def waste(self) -> float:
        """The share of GPU-seconds whose answers were lost."""
        return 1 - self.useful / self.busy


class Simulation:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.rng = settings, random.Random(settings.seed)
        self.now, self.free, self.number = 0.0, settings.gpus, itertools.count()
        self.events: list = []
        self.outcome = Outcome()
        self.queue: deque[Job] = deque()
        self.work = [self.shards() for _ in range(settings.configurations)]
        self.alive = [set(range(settings.shards)) for _ in range(settings.configurations)]  # shards in the queue
        self.running = [0] * settings.configurations  # of the array
        self.complete = [False] * settings.configurations
        self.outcome.useful = sum(map(sum, self.work))

    def shards(self) -> list[float]:
        """Seconds of each shard. The expected times are equal; the real ones vary with the lengths of the answers."""
        count = self.settings.shards
        mean = configuration_seconds() / count
        deviation = LENGTH_VARIATION / max(1.0, QUESTIONS / count) ** 0.5
        return [mean * max(0.1, self.rng.gauss(1, deviation)) for _ in range(count)]

    def call(self, name: str, count: int = 1) -> None:
        self.outcome.calls[name] += count
        self.outcome.minutes[int(self.now // 60)] += count

    def at(self, delay: float, what, *arguments) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.number), what, arguments))

    def run(self) -> Outcome:
        self.call("squeue", 2)  # run.sh's look at its jobs, and at all of the user's
        self.call("sbatch", 2 * self.settings.configurations)
        shards = itertools.product(range(self.settings.configurations), range(self.settings.shards))
        self.queue.extend(Job(*one) for one in shards)
        self.start()
        while self.events:
            self.now, _, what, arguments = heapq.heappop(self.events)
            what(*arguments)
        assert all(self.complete), "a run was lost"
        return self.outcome

    # -- the scheduler ---------------------------------------------------------------------------------------------
    def enqueue(self, job: Job) -> None:
        self.queue.append(job)
        self.start()

    def start(self) -> None:
        waiting: deque[Job] = deque()
        while self.queue and self.free:
            job = self.queue.popleft()
            first = job.shard is not None and not job.is_continuation
            if first and self.running[job.configuration] >= self.settings.at_once:
                waiting.append(job)
                continue
            self.running[job.configuration] += first
            self.free -= 1
            self.begin(job)
        self.queue.extendleft(reversed(waiting))

    def give_back(self) -> None:
        self.free += 1
        self.start()

    # -- a job -----------------------------------------------------------------------------------------------------
    def begin(self, job: Job) -> None:
        if job.is_continuation:
            self.call("sacct")
        if job.continuations_left:
            self.call("sbatch")
        if job.shard is None and not self.complete[job.configuration]:
            self.call("squeue")
        if job.shard is None and (self.complete[job.configuration] or self.alive[job.configuration]):
            self.at(10.0, self.renew, job, 10.0)
            return
        seconds_left = self.work[job.configuration]
        needed = START + (sum(seconds_left) + FINISH if job.shard is None else seconds_left[job.shard])
        settings = self.settings
        short = job.shard is None and settings.shards > 1
        limit = min(settings.limit, FINISHING_SECONDS / HOUR if short else settings.limit) * HOUR
        death, preempted = min(limit, self.rng.expovariate(1 / NODE_LIFE)), False
        if settings.preemptions:
            moment = settings.exempt * HOUR + self.rng.expovariate(settings.preemptions / HOUR)
            death, preempted = (moment, True) if moment < death else (death, False)
        if needed <= death:
            self.at(needed, self.end, job, needed)
        else:
            self.at(death, self.die, job, death, preempted)

    def leave(self, job: Job) -> None:
        """The job has ended and no job continues it. If it is the run's last shard, release the job that waits."""
        alive = self.alive[job.configuration]
        alive.discard(job.shard)
        if job.shard is not None and not alive and not self.complete[job.configuration]:
            self.at(SCHEDULING, self.enqueue, Job(job.configuration, None))

    def end(self, job: Job, lasted: float) -> None:
        self.outcome.busy += lasted
        if job.continuations_left:
            self.call("scancel")
        seconds_left = self.work[job.configuration]
        if job.shard is None:
            seconds_left[:] = [0.0] * len(seconds_left)
            self.done(job)
        else:
            self.running[job.configuration] -= not job.is_continuation
            seconds_left[job.shard] = 0.0
            if not any(seconds_left):
                self.alive[job.configuration].discard(job.shard)
                self.call("squeue")
                self.outcome.busy += START + FINISH
                self.at(START + FINISH, self.done, job)
                return
            self.leave(job)
            self.give_back()

    def done(self, job: Job) -> None:
        self.complete[job.configuration] = True
        self.outcome.makespan = max(self.outcome.makespan, self.now)
        if job.shard is not None:
            self.call("scancel")  # the job that waits
        self.give_back()

    def die(self, job: Job, lasted: float, preempted: bool) -> None:
        self.outcome.busy += lasted
        self.outcome.deaths += 1
        seconds_left = self.work[job.configuration]
        in_flight = self.rng.random() * configuration_seconds() / QUESTIONS
        answered = max(0.0, lasted - START - in_flight)
        for shard in range(len(seconds_left)) if job.shard is None else [job.shard]:
            spent = min(answered, seconds_left[shard])
            seconds_left[shard], answered = seconds_left[shard] - spent, answered - spent
        if job.shard is not None:
            self.running[job.configuration] -= not job.is_continuation
        if job.continuations_left:
            self.at(
                SCHEDULING,
                self.enqueue,
                Job(job.configuration, job.shard, job.continuations_left - 1, is_continuation=True),
            )
        elif job.shard is not None:
            self.outcome.abandoned += 1
            self.leave(job)
        else:  # what a second run.sh submits
            self.call("sbatch")
            self.at(SCHEDULING, self.enqueue, Job(job.configuration, None))
        if preempted:
            self.at(self.rng.expovariate(1 / PREEMPTION_SECONDS), self.give_back)
        else:
            self.give_back()

    def renew(self, job: Job, lasted: float) -> None:
        self.outcome.busy += lasted
        self.outcome.renewals += 1
        self.call("sbatch")
        self.give_back()


def configuration_seconds() -> float:
    task = next(task for task in TASKS if task.name == "minerva_math")
    return OVER_ROOFLINE * Sizes.of(FastDLLMConfig()).task_seconds(GPUS[0], task, 1.0)


# -- what is printed ---------------------------------------------------------------------------------------------------
def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def simulated(settings: Settings, runs: int = 5) -> list[object]:
    """Means over `runs` seeds, and the largest number of calls in one minute."""
    outcomes = [Simulation(Settings(**{**vars(settings), "seed": seed})).run() for seed in range(runs)]

    def mean(values) -> float:
        return sum(values) / runs

    calls = [f"{mean(outcome.calls[name] for outcome in outcomes):.0f}" for name in CALLS]
    return [
        f"{mean(outcome.makespan for outcome in outcomes) / HOUR:.1f} h",
        f"{mean(outcome.deaths for outcome in outcomes):.0f}",
        f"{mean(outcome.abandoned for outcome in outcomes):.0f}",
        f"{100 * mean(outcome.waste for outcome in outcomes):.1f} %",
        *calls,
        max(max(outcome.minutes.values()) for outcome in outcomes),
    ]


def simulation_table() -> list[str]:
    heads = ("shards", "GPUs", "preemptions", *HEADS)
    lines = [row(*heads), row(*["---"] * len(heads))]
    scenarios = [Settings(shards=count, preemptions=rate) for rate in (0.0, 0.3, 1.0) for count in (1, 8, 64)]
    scenarios += [Settings(preemptions=rate, exempt=0.0) for rate in (0.3, 1.0)]
    scenarios += [Settings(shards=1000, gpus=9000, at_once=most) for most in (MAX_SHARDS_AT_ONCE, 1000)]
    for one in scenarios:
        rate = f"{one.preemptions:g} an hour" + (", at once" if not one.exempt else "") if one.preemptions else "none"
        shards = f"{one.shards}%{one.at_once}" if one.shards > MAX_SHARDS_AT_ONCE else one.shards
        lines.append(row(shards, one.gpus, rate, *simulated(one, 5 if one.shards < 1000 else 2)))
    return lines


def gpus_table() -> list[str]:
    """How many shards, that is GPUs, answer one configuration if each is one job of so many hours, by GPU type."""
    hours, sizes = (1, 2, 4, 8, 12), Sizes.of(FastDLLMConfig())
    lines = [
        row("task", "GPU", "GPU hours at best", *(f"{hour} h" for hour in hours)),
        row(*["---"] * (3 + len(hours))),
    ]
    named = [task for name in baseline_tasks() for task in TASKS if task.name == name]
    default = script_option(ROOT, "gres").split(":")[1]
    for task, gpu in itertools.product(named, GPUS):
        if gpu.slurm not in (default, "h100"):
            continue
        cost = TimeEstimate(sizes.task_seconds(gpu, task, 1.0), ROOFLINE_MARGIN, "at best", "")
        counts = [cost.shards(hour * HOUR) for hour in hours]
        lines.append(row(f"`{task.name}`", gpu.name, f"{cost.seconds / HOUR:.2g}", *counts))
    return lines


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="how many GPUs for how many hours")
    parser.add_argument("--shards", type=int, help="simulate this alone; with the options below")
    parser.add_argument("--gpus", type=int, default=Settings.gpus)
    parser.add_argument("--preemptions", type=float, default=Settings.preemptions, help="an hour of a job")
    parser.add_argument("--exempt", type=float, default=Settings.exempt, help="hours without one")
    parser.add_argument("--limit", type=float, default=Settings.limit, help="hours of a job")
    options = parser.parse_args()
    if options.shards is None:
        print("\n".join(gpus_table() if options.table else simulation_table()))
        return
    if min(options.shards, options.gpus) < 1 or options.limit * HOUR <= 2 * START or options.preemptions < 0:
        raise UsageError(f"--shards and --gpus are counts from 1, --limit more than {2 * START / HOUR:.2g} hours")
    one = Settings(options.shards, options.gpus, options.preemptions, options.exempt, options.limit)
    for name, value in zip(HEADS, simulated(one), strict=True):
        print(f"{name:<17} {value}")


if __name__ == "__main__":
    with one_line():
        main()
