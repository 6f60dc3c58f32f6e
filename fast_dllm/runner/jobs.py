"""What a process that evaluates asks: what is left, what to run under the lock, how it ended, whether to go on."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Iterable

from fast_dllm.record.judgement import Judge, Judgement, fault_of_new, set_aside_foreign
from fast_dllm.record.summary import QUESTIONS_FILE
from fast_dllm.runner import failures
from fast_dllm.runner.slurm import ask
from fast_dllm.runner.states import FORCE_FILE, Records, is_forced
from fast_dllm.spec.files import (
    as_object,
    copy_whole,
    is_newer,
    is_same,
    read_json,
    remove,
    set_aside,
    write_json,
    write_whole,
)
from fast_dllm.spec.hashes import file_sha256, policy_file
from fast_dllm.spec.locks import lock_owner
from fast_dllm.spec.matrix import GENERATION_FILE
from fast_dllm.spec.request import Request, Run, evaluation_words
from fast_dllm.spec.shares import DONE_FILE, share_folder

# How results that are there are met. named: complete ones are made again, as the user asked for them by name. demo:
# what is of other code is made again, so that the table is of one, and the old one is kept beside. Otherwise a whole
# result of another model, of other code or arguments, or of the lab's first runner, is never replaced without --force.
MODES = ("job", "matrix", "demo", "named")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def folder_of(request: Request, run: Run) -> Path:
    """Where the records of the run lie, or of the share of it that is meant."""
    return share_folder(request.root / "results" / run.path, request.share)


# -- what is left ------------------------------------------------------------------------------------------------------
def is_done(request: Request, run: Run, judge: Judge) -> bool:
    """There is a whole result, and nobody asked for another one; or the share that is meant is answered."""
    if not is_forced(request.root, run) and judge.judge(run).is_whole:
        return True
    return request.share is not None and share_is_done(request, run, judge)


def share_is_done(request: Request, run: Run, judge: Judge) -> bool:
    """By the code and the model that are evaluated now; a repeated one would only find its answers."""
    content = read_json(folder_of(request, run) / DONE_FILE)[0] or {}
    hashes = (judge.policy, judge.decoding(False))
    told = (content.get("generation_code_sha256"), content.get("decoding_sha256"))
    return told == hashes and content.get("model_path") == request.model_or_default


def has_failed(request: Request, run: Run, after: Iterable[str]) -> str:
    """The class of an end of its own that this run came to in one of the jobs `after`, and would only come to again."""
    failure = read_json(folder_of(request, run) / "failure.json")[0] or {}
    job, name = str(failure.get("job_id") or ""), str(failure.get("class") or "")
    return name if job and job in after and name not in ("terminated", *failures.CONTINUED) else ""


def left(request: Request, after: Iterable[str]) -> list[Run]:
    judge = Judge(request)
    return [run for run in request.runs() if not is_done(request, run, judge) and not has_failed(request, run, after)]


def work_done(request: Request) -> str:
    """The runs that are complete + the batches of the others that are on disk: two equal ones, and nothing was done."""
    judge, complete, batches = Judge(request), 0, 0
    for run in request.runs():
        if is_done(request, run, judge):
            complete += 1
        elif not is_forced(request.root, run):
            share = "" if request.share is None else f"*.shard{request.share}.rank"
            for file in (request.root / "results" / run.path / "answers").glob(f"**/{share}*.jsonl"):
                batches += file.read_bytes().count(b"\n")
    return f"{complete}+{batches}"


# -- one evaluation ----------------------------------------------------------------------------------------------------
def begin(request: Request, options: argparse.Namespace) -> dict[str, object]:
    """Under the locks of the runs: what is complete is decided here and nowhere else, so that nothing is made twice.

    Clears what an earlier try left of those that are to be run, and says how.
    """
    judge, wanted, refused = Judge(request), [], []
    for run in request.runs():
        forced = options.force or is_forced(request.root, run)
        judged = judge.judge(run)
        failed = has_failed(request, run, options.after)
        if not forced and judged.is_whole and not _runs_again(judged, options.mode):
            _tell_kept(run, judged, request)
            if _was_asked_for(judged, options.mode):
                refused.append(run)
            elif options.keep:
                keep(request, run)
        elif not forced and failed:
            why = failures.TEXTS.get(failed, failed)
            say(f"== {run.path} failed in a job before this one ({why}) and is not repeated")
            refused.append(run)
        else:
            wanted.append(run)
            if judged.state == "stale" and not forced:
                set_aside(folder_of(request, run) / "summary.json", "stale")
                set_aside(folder_of(request, run) / QUESTIONS_FILE, "stale")
            _clear(request, run, forced, options.log)
    if wanted:
        where, examples = wanted[0].path.rsplit("/", 1)[0], wanted[0].arguments["num_fewshot"]
        names = wanted[0].folder if len(wanted) == 1 else f"{len(wanted)} configurations"
        say(f"== {where}, {names}: model {request.model_or_default}, {examples} examples in the prompt")
        say(f"   log: {options.log}")
    words = evaluation_words(request, wanted, options.batch_size, options.confirm_run_unsafe_code) if wanted else []
    return {"RUNS": [run.name for run in wanted], "REFUSED": [run.name for run in refused], "EVAL_WORDS": words}


def _runs_again(judged: Judgement, mode: str) -> bool:
    if judged.other_model:
        return False
    return (mode == "named" and judged.state == "complete") or (mode == "demo" and judged.state == "stale")


def _was_asked_for(judged: Judgement, mode: str) -> bool:
    """What is kept is not what the user asked for; of the whole matrix, that one is left out is no failure."""
    if mode == "named":
        return judged.other_model or judged.state != "complete"
    return judged.other_model and mode == "job"


def _tell_kept(run: Run, judged: Judgement, request: Request) -> None:
    if judged.other_model:
        model = judged.summary and judged.summary.model
        say(f"== {run.path} is complete, but of model {model}, not {request.model}; --force runs it again")
    elif judged.state == "stale":
        say(f"== {run.path} is {judged.detail}; skipped, --force runs it again")
    else:
        say(f"== {run.path} is complete, skipped" + (f" ({judged.detail})" if judged.detail else ""))


def _clear(request: Request, run: Run, forced: bool, log: str) -> None:
    folder = folder_of(request, run)
    remove(folder / "failure.json", *folder.glob("progress.rank*.json"))
    if request.share is not None:
        remove(folder / DONE_FILE)
        record_job(folder, failures.own_job(), log)
        return
    set_aside_foreign(folder / "summary.json", run)
    if forced:
        shutil.rmtree(folder / "answers", ignore_errors=True)
        if (folder / "summary.json").exists():
            (folder / "summary.json").replace(folder / "summary.previous.json")
        remove(folder / FORCE_FILE)  # last: ended before this, the next evaluation begins again
    before = read_json(folder / "job.json")[0] or {}
    record_job(folder, failures.own_job(), log, **{key: before[key] for key in ("shards", "gpus") if key in before})


def record_job(folder: Path, job: str, log: str, **further: object) -> None:
    """What status asks the accounting about when the job had no chance to write failure.json."""
    write_json(folder / "job.json", {"schema_version": 1, "job_id": job, "log": failures.printable(log), **further})


def end(request: Request, options: argparse.Namespace) -> dict[str, object]:
    """Which of the runs are done, and why the first that is not has failed. `lost`: those whose lock is another's now.

    A process answers its runs one after the other and stops at the first that fails; its exit status tells of one run
    only when it had one.
    """
    runs, status, failed_class = request.runs(), options.status, ""
    found: dict[str, list] = {"RUNS_DONE": [], "NOT_DONE": [], "RUNS_LEFT": []}
    for run in runs:
        folder, reason = folder_of(request, run), _fault_of_new(request, run)
        if (status == 0 or len(runs) > 1) and run.name not in options.lost and not reason:
            found["RUNS_DONE"].append(run.name)
            remove(folder / "failure.json", *(folder.glob("progress.rank*.json") if request.share is None else ()))
            if options.keep:
                keep(request, run)
        elif found["NOT_DONE"]:
            found["RUNS_LEFT"].append(run.name)
        else:
            found["NOT_DONE"].append(run.name)
            if run.name in options.lost:
                owner = lock_owner(folder / ".lock")
                say(
                    f"{run.path} was taken over by {owner} while this process could not be seen to live; "
                    "it is left to that one"
                )
                status = 75
            else:
                status, failed_class = _record_failure(run, folder, status, reason, options)
    goes_on = "yes" if failed_class in ("terminated", *failures.CONTINUED) else "no"
    return {**found, "END_STATUS": status, "FAILURE_CLASS": failed_class, "GOES_ON": goes_on}


def _fault_of_new(request: Request, run: Run) -> str:
    """Why summary.json is no complete one of this process: job.json was written when it began."""
    folder = folder_of(request, run)
    if request.share is not None:
        return "" if is_newer(folder / DONE_FILE, folder / "job.json") else "the share is not answered"
    return fault_of_new(folder, run)


def _record_failure(run: Run, folder: Path, status: int, reason: str, options: argparse.Namespace) -> tuple[int, str]:
    if status == 0:
        say(f"eval.py ended without an error, but left no complete summary: {reason}")
        status = 70
    text = failures.end_of(Path(options.log), options.start)
    # accelerate's launcher turns every exit status into 1; eval.py's own line tells that the input was wrong
    if re.search(r"^eval\.py: error: ", text, re.MULTILINE):
        status = 2
    name = failures.classify(status, text, options.told_to_stop)
    failures.write_failure(folder, name, status, options.log, text)
    if name != "interrupted":  # the user knows
        say(f"{run.path}: {failures.TEXTS[name]} (exit status {status})")
    return status, name


def keep(request: Request, run: Run) -> None:
    """The summary and what each question got are small and tracked in artifacts/; results/ may lie on a disk that is
    purged. The questions go first: a summary that stands there has them. A share has none."""
    if request.share is not None:
        return
    source = folder_of(request, run) / "summary.json"
    target = request.root / "artifacts" / run.path / "summary.json"
    if source.is_file():
        questions = source.with_name(QUESTIONS_FILE)
        if questions.is_file():
            copy_whole(questions, target.with_name(QUESTIONS_FILE))
        keep_policy(request, run, source)
        if not is_same(source, target):
            set_aside_foreign(target, run)
            write_whole(target, source.read_bytes())


def keep_policy(request: Request, run: Run, summary: Path) -> None:
    """The policy that a summary is of, once for all that are of it: artifacts/code/<its SHA-256>.py. The run left the
    text beside its summary; where it did not, it is the experiment's while that is unchanged."""
    sha256 = (read_json(summary)[0] or {}).get("generation_code_sha256")
    if not isinstance(sha256, str):
        return  # of the lab's first runner: it does not say
    kept = request.root / "artifacts" / "code" / f"{sha256}.py"
    if kept.exists():
        return
    for text in (summary.with_name(GENERATION_FILE), policy_file(request.code_root, request.experiment)):
        if file_sha256(text) == sha256:
            copy_whole(text, kept)
            return
    say(f"== {run.path}: the text of its policy ({sha256[:12]}) is no longer here, and artifacts/code/ goes without it")


def force(request: Request) -> None:
    """--force, in a file: whoever evaluates the run next begins with its first question and removes the file, be it the
    job that is submitted now, the one that continues it, or one of a later run.sh. Until then the old summary does not
    count. A job that continues one that has begun finds no such file, and goes on where that was."""
    for run in request.runs():
        folder = folder_of(request, run)
        write_whole(folder / FORCE_FILE, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()).encode())
        remove(folder / "job.json", folder / "failure.json")  # they tell of the run before


def tell_kept(request: Request, again: str) -> None:
    """After Ctrl-C: what is on disk, and the command that goes on with it."""
    judge, runs = Judge(request), request.runs()
    done = [run for run in runs if is_done(request, run, judge)]
    kept = f"{len(done)} of {len(runs)} configurations" if len(runs) > 1 else ""
    for run in runs:
        answers = 0 if run in done else answers_kept(folder_of(request, run))
        if answers:
            kept += f"{' and ' if kept else ''}{answers} answers of {run.folder}"
    say(f"interrupted; kept: {kept or 'nothing yet'}. To go on: {again}")


def answers_kept(folder: Path) -> int:
    count = 0
    for file in (folder / "answers").glob("*/*.jsonl"):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):  # the last one may have been cut off
                count += len(as_object(as_object(json.loads(line)).get("answers")))
    return count


# -- a chain of jobs ---------------------------------------------------------------------------------------------------
def fail(request: Request, options: argparse.Namespace) -> None:
    """The job ends before it evaluates anything, for the reason `--class`."""
    text = options.text or failures.end_of(Path(options.log))
    for run in left(request, options.after):
        failures.write_failure(folder_of(request, run), options.failure, 1, options.log, text)


def end_of_job(request: Request, job: str) -> str:
    """How it ended: the record of the last run that it came to is first; a job that was killed could not write one,
    Slurm knows."""
    name = ""
    for run in request.runs():
        records = Records.of(folder_of(request, run))
        if str(records.failure.get("job_id")) == job:
            name = str(records.failure.get("class") or "")
        elif records.job == job:
            name = ""
    for tries in range(6):
        if name not in ("", "terminated", "killed") or not shutil.which("sacct"):
            break
        if tries:
            time.sleep(5)  # the accounting may lag behind
        _, text = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")
        name = failures.class_of_state(text.split("\n")[0]) if text else ""
    return name or "killed"


def continue_after(request: Request, options: argparse.Namespace) -> dict[str, object]:
    """Whether the job that this one would continue is one to continue. GO_ON: yes, no, or fail."""
    before, stalled = options.after[-1], options.stalled
    name = end_of_job(request, before)
    if name not in failures.CONTINUED:
        say(f"job {before} is not continued: {failures.TEXTS.get(name, name)}")
        return {"GO_ON": "no", "STALLED": stalled}
    now = work_done(request)
    stalled = stalled + 1 if now == options.progress else 0
    say(
        f"continues job {before} ({failures.TEXTS[name]}); "
        f"complete tasks + batches: {options.progress} when that started, now {now}"
    )
    if stalled >= 2:
        options.failure, options.text = "no_progress", "jobs before this one answered nothing, twice"
        fail(request, options)
        say(f"not continued any more: {failures.TEXTS['no_progress']}")
        return {"GO_ON": "fail", "STALLED": stalled}
    return {"GO_ON": "yes", "STALLED": stalled}
