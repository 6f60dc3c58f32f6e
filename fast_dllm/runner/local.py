"""sbatch/local.sh: evaluate on this machine, without Slurm."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from fast_dllm.record.answers import num_answers
from fast_dllm.record.judgement import Judge
from fast_dllm.runner import venv
from fast_dllm.runner.environment import evaluation_environment
from fast_dllm.runner.evaluation import Settings, StopSignal, evaluate
from fast_dllm.runner.failures import INTERRUPTED
from fast_dllm.runner.messages import quoted, say
from fast_dllm.runner.output import frame, print_summary
from fast_dllm.runner.records import folder_of, is_done
from fast_dllm.runner.states import examine
from fast_dllm.spec.request import Request, Run

WRONG_INPUT = 2  # eval.py's exit status for it


@dataclass(frozen=True)
class LocalOptions:
    """mode: named, matrix or demo (see Modes in evaluation.py). words: the command line, to name it again after Ctrl-C.

    traces: keep the steps of each answer.
    """

    request: Request
    mode: str
    force: bool
    batch_size: str
    words: list[str]
    traces: bool = False


def run_local(options: LocalOptions) -> int:
    """Evaluate the request's configurations, as many as possible in one process; returns the exit status.

    One that fails does not stop the others: they go on in another process. What was wrong with the input of one is
    wrong for all, and all need the same model and data.
    """
    request = options.request
    folder = venv.ensure(request.code_root, request.root)
    if folder is None:
        return 1
    environment = evaluation_environment(venv.environment_of(folder, os.environ), request.code_root)
    settings = Settings(
        environment=environment,
        mode=options.mode,
        # a matrix on all questions is a result, as a job's is, and belongs into artifacts/; the rest are trials
        keep=options.mode == "matrix" and request.limit is None,
        force=options.force,
        batch_size=options.batch_size,
        traces=options.traces,
    )
    pending, failed, status = list(request.names), [], 0
    while pending:
        outcome = evaluate(request, request.task, pending, settings, StopSignal())
        if options.mode == "named":
            for name in outcome.done:
                print_summary(request.root, request.run(request.task, name))
        failed += outcome.failed
        status = outcome.status or status
        if outcome.status == INTERRUPTED:
            say_interrupted(request, options.words)
            return INTERRUPTED
        pending = outcome.not_started
        if outcome.status == WRONG_INPUT or outcome.failure_class == "hub_network":
            failed += pending
            break
    if failed:
        say(f"local.sh: failed: {' '.join(failed)}")
    if options.mode != "named":
        print(*frame(request, examine(request)[0]), sep="\n", flush=True)
    if status == WRONG_INPUT:
        return status
    if options.mode == "named":
        if done_runs(request):
            say(f"what these results show: {report_command(request)}")
        return status
    # it prints the verdict, the table of all configurations, and its path
    done = subprocess.run(["python", "-m", "fast_dllm.report", *report_words(request)], env=environment)
    return 1 if done.returncode else status


def report_words(request: Request) -> list[str]:
    limit = ["--limit", str(request.limit)] if request.limit is not None else []
    return ["--experiment", request.experiment, "--task", request.task, *limit]


def report_command(request: Request) -> str:
    return quoted(["bash", "sbatch/run.sh", "--report", *report_words(request)])


def done_runs(request: Request) -> list[Run]:
    """The request's runs that have a whole result."""
    judge = Judge(request)
    return [run for run in request.runs() if is_done(request, run, judge)]


def say_interrupted(request: Request, words: list[str]) -> None:
    """After Ctrl-C: what is on disk, and the command that goes on with it, or that shows the result if all is done."""
    runs, done = request.runs(), done_runs(request)
    if len(done) == len(runs):
        complete = f"all {len(runs)} configurations are" if len(runs) > 1 else f"{runs[0].folder} is"
        say(f"interrupted; {complete} complete. What these results show: {report_command(request)}")
        return
    progress = f"{len(done)} of {len(runs)} configurations" if len(runs) > 1 else ""
    for run in runs:
        answers = 0 if run in done else num_answers(folder_of(request, run))
        if answers:
            progress += f"{' and ' if progress else ''}{answers} answers of {run.folder}"
    again = quoted(["bash", "sbatch/local.sh", *(word for word in words if word != "--force")])
    say(f"interrupted; kept: {progress or 'nothing yet'}. To go on: {again}")
