"""The questions that the scripts ask, as commands: some print for people, some print shell assignments."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Iterator

from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.runner import arrays, jobs, output, prefetch, submission, watch
from fast_dllm.runner.arrays import AUTO
from fast_dllm.runner.gpus import check_gpu
from fast_dllm.runner.help import help_text
from fast_dllm.runner.resources import check_hours
from fast_dllm.runner.sbatch import submit_successor
from fast_dllm.runner.states import examine
from fast_dllm.runner.table import table
from fast_dllm.spec import tasks
from fast_dllm.spec.request import Request, add_options, check_count, join_arguments, read_request
from fast_dllm.spec.shares import MOST, MOST_GPUS, SHARES_FOLDER, division
from fast_dllm.spec.tasks import ROOT, task_folder


def assign(values: dict) -> None:
    """Print shell assignments: of lists arrays, of dicts associative arrays."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            print(f"{name}=({' '.join(shlex.quote(str(item)) for item in value)})")
        elif isinstance(value, dict):
            pairs = (f"[{shlex.quote(key)}]={shlex.quote(item)}" for key, item in value.items())
            print(f"{name}=({' '.join(pairs)})")
        else:
            print(f"{name}={shlex.quote(str(value))}")


def tell_request(request: Request) -> None:
    """What the scripts need to know of it, and the words that ask for the same again, from whatever folder."""
    words = [f"--experiment={request.experiment}", f"--task={','.join(request.tasks)}"]
    words += [f"--limit={request.limit}"] if request.limit is not None else []
    words += [f"--model={request.model}"] if request.model is not None else []
    words += [f"--share={request.share}"] if request.share is not None else []
    words += ["--several"] if len(request.tasks) > 1 else []
    words += ["--code_tasks"] if any(run.task.code for run in request.runs()) else []
    others = {key: value for key, value in request.given.items() if key != "num_fewshot"}
    if others:
        words.append(f"--model_args={join_arguments(others)}")
    words += [f"--num_fewshot={request.given['num_fewshot']}"] if "num_fewshot" in request.given else []
    assign(
        {
            "EXPERIMENT": request.experiment,
            "RUN_TASKS": request.tasks,
            "TASK": request.task,
            "LIMIT": "" if request.limit is None else request.limit,
            "TASK_FOLDER": task_folder(request.task, request.limit),
            "MODEL": request.model_or_default,
            "CONFIGS": request.names,
            "PART": f"{SHARES_FOLDER}/{request.share}/" if request.share else "",
            "FOLDER": {f"{run.task.name}/{run.name}": run.path for run in request.runs()},
            "REQUEST": words,
        }
    )


def cluster_settings(root: Path) -> Iterator[str]:
    """Shell code for the NAME=value lines of sbatch/cluster.env, taken as they stand. Raises UsageError."""
    path = root / "sbatch" / "cluster.env"
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if re.fullmatch(r"\s*(#.*)?", line):
            continue
        found = re.fullmatch(r"([A-Z_][A-Z0-9_]*)=(.*)", line)
        if not found:
            raise UsageError(f"sbatch/cluster.env, line {number} is not NAME=value: {line!r}")
        yield f"[[ -v {found[1]} ]] || export {found[1]}={shlex.quote(found[2])}"


def status(request: Request, options: argparse.Namespace) -> int:
    states, fault = examine(request)
    if fault and not options.table:
        print(f"run.sh: squeue failed, so jobs are not known: {fault}", file=sys.stderr)
    if options.json:
        print(output.as_json(request, states))
    else:
        print(*output.frame(request, states), sep="\n")
    if options.table:
        print(*table(request, states), sep="\n")
    return 3 if options.check and not all(state.is_complete for state in states) else 0


def read_options(words: list) -> argparse.Namespace:
    parser = OneLineParser(prog="runner", allow_abbrev=False, add_help=False)
    parser.add_argument("command")
    add_options(parser)
    for option in ("--json", "--check", "--table", "--force", "--dry_run", "--keep", "--told_to_stop"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true")
    parser.add_argument("--baseline", action="store_true", help="its tasks where none is named")
    parser.add_argument("--only", help="of the configurations this one")
    for option in ("--log", "--text", "--progress", "--failure"):
        parser.add_argument(option, default="")
    parser.add_argument("--share", help="i-of-DIVISION: of the run this share alone")
    parser.add_argument("--shard", help="i/N, the same, of a job; /N of the one that finishes the run")
    for option in ("--array", "--missing", "--alive", "--finishing_time"):
        parser.add_argument(option, default="", help="of the jobs of a run in shares")
    parser.add_argument("--finishes", action="store_true", help="with the job that finishes it")
    for option in ("--hours", "--gpu", "--shards"):
        parser.add_argument(option)
    parser.add_argument("--gpus", default="1")
    parser.add_argument("--after", default="")
    for option in ("--snapshot", "--dependency", "--script"):
        parser.add_argument(option, default="", help="of the job that is submitted")
    parser.add_argument("--resources", action="store_true", help="those of the job that it continues")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE for sbatch")
    parser.add_argument("--lost", action="append", default=[])
    parser.add_argument("--mode", choices=jobs.MODES, default="job")
    for option, default in (("--status", "0"), ("--start", "0"), ("--stalled", "0"), ("--continue", "0")):
        parser.add_argument(option, default=default)
    parser.add_argument("--batch_size", default="1")
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.words = words[end + 1 :]  # of the script that a job runs
    if options.baseline and options.task is None:
        options.task = ",".join(tasks.baseline_tasks())
    if options.only is not None:
        options.config = [options.only]
    options.after = [job for job in options.after.split(",") if job]
    options.gpus = check_count("--gpus", options.gpus, most=MOST_GPUS)
    if options.shards == AUTO and options.hours == AUTO:
        raise UsageError("--shards auto divides by the time that a job has: --hours H with it, not auto")
    if options.shards not in (None, AUTO):
        options.shards = check_count("--shards", options.shards, most=MOST, other=AUTO)
    if options.shard is not None:
        index, _, count = options.shard.partition("/")
        options.share = f"{index}-of-{division(int(count), options.gpus)}" if index else None
    if options.batch_size != AUTO:
        options.batch_size = check_count("--batch_size", options.batch_size, other=AUTO)
    check_count("--continue", vars(options)["continue"], least=0)
    for name in ("status", "start", "stalled"):
        setattr(options, name, int(getattr(options, name)))
    return options


def main(script: str, root: str, *words: str) -> int:
    if words[:1] == ("help",):
        print(help_text(script, ROOT), end="")
        return 0
    options = read_options(list(words))
    if options.command == "settings":
        print(*cluster_settings(Path(root)), sep="\n")
        return 0
    if options.command == "successor":
        assign(dict(submit_successor(options, options.words)))
        return 0
    request = dataclasses.replace(read_request(options, Path(root), ROOT), share=options.share)
    if options.hours is not None:
        check_hours(options.hours)
    if options.gpu is not None:
        check_gpu(request, options.gpu)
    answers = {"status": status, "plan": submission.plan, "submit": submission.submit_run}
    if options.command in answers:
        return answers[options.command](request, options)
    if options.command == "watch":
        return watch.watch(request, options)
    if options.command == "fetch":
        return prefetch.fetch_all(request, options.text)
    if options.command == "space":
        prefetch.check_space(request)
        return 0
    if options.command in ("begin", "end", "after"):
        assign({"begin": jobs.begin, "end": jobs.end, "after": jobs.continue_after}[options.command](request, options))
    elif options.command == "request":
        tell_request(request)
    elif options.command == "left":
        assign({"LEFT": list(dict.fromkeys(run.task.name for run in jobs.left(request, options.after)))})
    elif options.command == "wait_for_shares":
        assign(arrays.wait_for_shares(request, options))
    elif options.command == "last" and arrays.is_last(request):
        tell_request(dataclasses.replace(request, share=None))
        assign({"WAITING": arrays.waiting(request)})
    elif options.command == "last":
        pass
    elif options.command == "work":
        print(jobs.work_done(request))
    elif options.command == "keep":
        for run in request.runs():
            jobs.keep(request, run)
    elif options.command == "kept":
        jobs.tell_kept(request, options.text)
    elif options.command == "force":
        jobs.force(request)
    elif options.command == "fail":
        jobs.fail(request, options)
    elif options.command == "summary":
        for run in request.runs():
            print(*output.summary(Path(root), run), sep="\n")
    else:
        raise UsageError(f"no command {options.command!r}")
    return 0
