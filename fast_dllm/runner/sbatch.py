"""sbatch: its command for the jobs of a run, and what it answers."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from typing import Iterator, Mapping

from fast_dllm.runner import jobs
from fast_dllm.runner.resources import script_option
from fast_dllm.runner.slurm import ask
from fast_dllm.spec.tasks import ROOT

# sbatch's words for a user who has as many jobs as the QOS or the account allows
NO_PLACE = ("QOSMaxSubmitJobPerUserLimit", "AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerAccountLimit")
NO_PLACE_STATUS = 75


def quoted(words: list[str]) -> str:
    return " ".join(map(shlex.quote, words))


def sbatch_command(options: argparse.Namespace, words: list[str], **changes: str) -> list[str]:
    """options, unless changed: array, text (the job's name), log ("": the script's own), dependency, resources, gpus,
    snapshot, script."""
    told = {**vars(options), **changes}
    log = told["log"].replace("%j", "%A_%a") if told["array"] else told["log"]
    command = ["sbatch", "--parsable", f"--job-name={told['text']}"]
    command += [f"--output={log}"] if log else []
    command += [f"--array={told['array']}"] if told["array"] else []
    if told["gpus"] > 1:  # sbatch has no variable for this one
        command.append(f"--cpus-per-task={int(script_option(ROOT, 'cpus-per-task')) * told['gpus']}")
    if told["dependency"]:
        command += [f"--dependency={told['dependency']}", "--kill-on-invalid-dep=yes"]
        command += resources_of_job() if told["resources"] else []
    folder = f".snapshots/{told['snapshot']}/" if told["snapshot"] else ""
    command += [f"{folder}sbatch/{told['script']}"] + (["--snapshot", told["snapshot"]] if folder else [])
    return command + words


def resources_of_job() -> list[str]:
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


def has_no_place(said: str) -> bool:
    """sbatch refused for this alone, that the user has as many jobs as allowed."""
    return any(words in said for words in NO_PLACE)


def tell_refused(what: str, said: str) -> int:
    """The exit status of a submission that failed."""
    if has_no_place(said):
        print(f"  {what}: not submitted, no place for it in the queue")
        return NO_PLACE_STATUS
    jobs.say(f"  {what}: sbatch failed: {said}")
    return 1


def submit_successor(options: argparse.Namespace, words: list[str]) -> Iterator[tuple[str, str]]:
    """SUCCESSOR and REFUSED, for continue.sh."""
    job, said = submit(sbatch_command(options, words), {})
    yield "SUCCESSOR", job
    hint = " (you have as many jobs as your QOS allows; run.sh submits it once there is a place)"
    hint = hint if has_no_place(said) else ""
    yield "REFUSED", "" if job else f"{said}{hint}"
