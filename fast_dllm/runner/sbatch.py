"""sbatch: the command that submits a job of this project, and what sbatch answers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Mapping, Sequence

from fast_dllm.runner.messages import say
from fast_dllm.runner.resources import script_option
from fast_dllm.runner.slurm import ask
from fast_dllm.spec.tasks import ROOT

# sbatch's words for a user who has as many jobs as the QOS or the account allows
NO_PLACE = ("QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerAccountLimit")
NO_PLACE_STATUS = 75


@dataclass(frozen=True)
class JobScript:
    """A script of sbatch/ as a job. words: the script's options. snapshot: the code that runs; None: the project's.

    log: for --output, with Slurm's %j; "": what the script says itself. array: its numbers, like 0-3,7; "": one job.
    gpus: of one node, with as many times the script's CPUs. keep_resources: ask for what this job was given by hand.
    """

    name: str
    script: str
    words: tuple[str, ...] = ()
    snapshot: str | None = None
    log: str = ""
    array: str = ""
    gpus: int = 1
    keep_resources: bool = False

    def with_words(self, words: Sequence[str]) -> JobScript:
        return replace(self, words=(*self.words, *words))

    def command(self, dependency: str = "") -> list[str]:
        """The words of the sbatch command."""
        log = self.log.replace("%j", "%A_%a") if self.array else self.log
        command = ["sbatch", "--parsable", f"--job-name={self.name}"]
        command += [f"--output={log}"] if log else []
        command += [f"--array={self.array}"] if self.array else []
        if self.gpus > 1:  # sbatch has no variable for this one
            command.append(f"--cpus-per-task={int(script_option(ROOT, 'cpus-per-task')) * self.gpus}")
        if dependency:
            command += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
            command += _resources_of_this_job() if self.keep_resources else []
        if self.snapshot:
            command += [f".snapshots/{self.snapshot}/sbatch/{self.script}", "--snapshot", self.snapshot]
        else:
            command.append(f"sbatch/{self.script}")
        return [*command, *self.words]


def _resources_of_this_job() -> list[str]:
    """sbatch's options for a job like this one: what was given by hand for it has to be given again."""
    environment, words = os.environ, []
    worked, text = ask("squeue", "--noheader", f"--jobs={environment['SLURM_JOB_ID']}", "--format=%a|%q|%P|%l|%b")
    fields = text.strip().split("|")
    if worked and len(fields) == 5:
        names = ("--account", "--qos", "--partition", "--time")
        words = [f"{name}={value}" for name, value in zip(names, fields)]
        if fields[4].startswith("gres"):
            words.append(f"--gres={re.sub('gres[:/]', '', fields[4])}")
    if environment.get("SLURM_CPUS_PER_TASK"):
        words.append(f"--cpus-per-task={environment['SLURM_CPUS_PER_TASK']}")
    if environment.get("SLURM_MEM_PER_NODE"):
        words.append(f"--mem={environment['SLURM_MEM_PER_NODE']}M")
    return words


def submit(command: list[str], settings: Mapping[str, str]) -> tuple[str, str]:
    """(the job's id or "", what sbatch said)."""
    worked, text = ask(*command, settings=settings)
    # warnings come first; the id may have the cluster's name behind it
    return (text.split()[-1].split(";")[0], text) if worked and text else ("", text)


def has_no_place(reply: str) -> bool:
    """Whether sbatch refused only because the user has as many jobs as allowed."""
    return any(words in reply for words in NO_PLACE)


def say_refused(what: str, reply: str) -> int:
    """Report a submission that failed; returns its exit status."""
    if has_no_place(reply):
        print(f"  {what}: not submitted, no place for it in the queue")
        return NO_PLACE_STATUS
    say(f"  {what}: sbatch failed: {reply}")
    return 1
