"""The commands of the scripts in sbatch/: each parses its words once, into one frozen dataclass, and runs with it.

`bash sbatch/run.sh WORDS` calls `run(WORDS)`. parsers.py has the options; no other module sees argparse's namespace.
A command imports what it runs only when it is called, so that `--status` and `--help` do not wait for the rest.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from fast_dllm.errors import UsageError
from fast_dllm.runner.environment import has_gpu, load_cluster_settings
from fast_dllm.runner.messages import say
from fast_dllm.runner.parsers import baseline_parser, job_parser, local_parser, prefetch_parser, run_parser
from fast_dllm.spec.defaults import AUTO
from fast_dllm.spec.files import check_writable
from fast_dllm.spec.request import Request, check_count, read_request
from fast_dllm.spec.shard_names import MAX_GPUS, MAX_SHARDS, sharding
from fast_dllm.spec.tasks import ROOT, baseline_tasks

if TYPE_CHECKING:
    from fast_dllm.runner.chain import Chain
    from fast_dllm.runner.resources import SubmitOptions

# The options that make a Request, as read_request takes them.
REQUEST_OPTIONS = (
    "task", "experiment", "limit", "model", "threshold", "model_args", "num_fewshot", "config",
    "confirm_run_unsafe_code",
)  # fmt: skip


def project_root() -> Path:
    """The project's folder, which has the results. A snapshot of the code is in .snapshots/<id>/ of it."""
    return ROOT.parent.parent if ROOT.parent.name == ".snapshots" else ROOT


# -- values ------------------------------------------------------------------------------------------------------------
def _request(
    options: argparse.Namespace, whole_matrix: bool = False, several_tasks: bool = False, executes: bool = True
) -> Request:
    """executes: whether answers will be scored, so that a task that runs them needs its confirmation."""
    values = {name: getattr(options, name) for name in REQUEST_OPTIONS if hasattr(options, name)}
    request = read_request(project_root(), ROOT, **values, whole_matrix=whole_matrix, several_tasks=several_tasks)
    if executes:
        request.check_confirmed()
    return request


def _check_folders(request: Request) -> None:
    """Raises UsageError if results or logs of the request's runs cannot be written, before anything is begun."""
    for run in request.runs():
        for top in ("results", "logs"):
            check_writable(request.root / top / run.path)


def _chain(options: argparse.Namespace) -> Chain:
    from fast_dllm.runner.chain import Chain

    return Chain(
        further_jobs=check_count("--continue", options.further_jobs, least=0),
        after=tuple(job for job in options.after.split(",") if job),
        progress=options.progress,
        stalled=check_count("--stalled", options.stalled, least=0),
    )


def _submit_options(options: argparse.Namespace, request: Request, dry_run: bool = False) -> SubmitOptions:
    from fast_dllm.runner.gpus import check_gpu
    from fast_dllm.runner.resources import SubmitOptions, check_hours

    if options.shards == AUTO and options.hours == AUTO:
        raise UsageError("--shards auto divides by the time that a job has: --hours H with it, not auto")
    if options.hours is not None:
        check_hours(options.hours)
    if options.gpu is not None:
        check_gpu(request, options.gpu)
    return SubmitOptions(
        force=options.force,
        dry_run=dry_run,
        further_jobs=check_count("--continue", options.further_jobs, least=0),
        hours=options.hours,
        gpu=options.gpu,
        gpus=_count_of_gpus(options.gpus),
        shards=_count_of_shards(options.shards),
    )


def _count_of_gpus(text: str | None) -> int:
    return check_count("--gpus", "1" if text is None else text, most=MAX_GPUS)


def _count_of_shards(text: str | None) -> int | str | None:
    return text if text in (None, AUTO) else check_count("--shards", text, most=MAX_SHARDS, other=AUTO)


# -- commands ----------------------------------------------------------------------------------------------------------
def run(words: list[str]) -> int:
    if "--report" in words:
        return _report([word for word in words if word != "--report"])
    options = run_parser().parse(words)
    options.config += options.configurations
    if (options.check or options.json) and not options.status:
        raise UsageError("--check and --json go with --status")
    request = _request(options, whole_matrix=True, executes=not options.status)
    if options.status and not options.rehearse:
        from fast_dllm.runner.output import print_status

        return print_status(request, as_json_text=options.json, check=options.check)
    from fast_dllm.runner import rehearsal, submission

    submit = _submit_options(options, request, dry_run=options.dry_run)
    if options.rehearse:
        if not options.config:
            request = request.only(request.task, [request.matrix.compare_with])
        rehearsal.check_options(request, words)
    if not options.dry_run:
        _check_folders(request)
    load_cluster_settings(request.root)
    os.chdir(str(request.root))
    return rehearsal.rehearse(request, submit) if options.rehearse else submission.run_submission(request, submit)


def _report(words: list[str]) -> int:
    """Replace this process by the report's program; the words are its own."""
    from fast_dllm.runner import venv

    root = project_root()
    os.chdir(str(root))
    load_cluster_settings(root)
    folder = venv.ensure(ROOT, root)
    if folder is None:
        return 1
    environment = {**venv.environment_of(folder, os.environ), "PYTHONPATH": str(ROOT)}
    os.execvpe("python", ["python", "-m", "fast_dllm.report", *words], environment)


def local(words: list[str]) -> int:
    from fast_dllm.runner.local import LocalOptions, run_local

    options = local_parser().parse(words)
    mode = "named"
    if options.demo:
        if options.task is not None:
            raise UsageError(
                "--demo has a task of its own, toy_math; leave out --task, or take --matrix in the place of --demo"
            )
        if options.config:
            raise UsageError(
                "--demo runs all configurations; leave out --config, or take --task toy_math in the place of --demo"
            )
        mode, options.task = "demo", "toy_math"
        options.limit = options.limit if options.limit is not None else "200"
        options.model = options.model if options.model is not None else "tiny"
        # an answer does not depend on the batch that it was given in; together the questions take a third of the time
        options.batch_size = options.batch_size if options.batch_size is not None else "32"
    elif options.matrix:
        if options.config:
            raise UsageError("--matrix runs all configurations; leave out --config")
        mode = "matrix"
    if options.model is None and not has_gpu():
        options.model = "tiny"
    batch_size = "1" if options.batch_size is None else options.batch_size
    if batch_size != AUTO:
        check_count("--batch_size", batch_size, other=AUTO)
    request = _request(options, whole_matrix=mode != "named").with_model()
    _check_folders(request)
    load_cluster_settings(request.root)
    # data sets given as folders (openai/gsm8k) and results are looked for in the project's folder
    os.chdir(str(request.root))
    return run_local(
        LocalOptions(
            request=request,
            mode=mode,
            force=options.force,
            batch_size=batch_size,
            words=words,
            traces=options.traces,
        )
    )


def baseline(words: list[str]) -> int:
    from fast_dllm.runner.baseline import BaselineOptions, run_baseline

    options = baseline_parser().parse(words)
    if options.task is None:
        options.task = ",".join(baseline_tasks())
    options.config = ["plain"]
    request = _request(options, several_tasks=True).with_model()
    _check_folders(request)
    chain = _chain(options)
    submission = None
    if any(value is not None for value in (options.shards, options.gpus, options.gpu, options.hours)):
        submission = _submit_options(options, request)
    load_cluster_settings(request.root)
    os.chdir(str(request.root))
    return run_baseline(BaselineOptions(request, chain, options.force, options.snapshot, submission, tuple(words)))


def job(words: list[str]) -> int:
    from fast_dllm.runner.job import JobOptions, run_job

    options = job_parser().parse(words)
    if not options.config:
        raise UsageError("--config is missing: the one configuration of this job")
    request = _request(options)
    if len(request.names) != 1:
        raise UsageError(f"a job has one --config, not {','.join(options.config)!r}")
    shards, gpus = _count_of_shards(options.shards), _count_of_gpus(options.gpus)
    if shards == AUTO:
        raise UsageError("--shards of a job is a number")
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    shard = f"{number}-of-{sharding(shards, gpus)}" if isinstance(shards, int) and number else None
    request = request.only(request.task, request.names).with_model(shard)
    _check_folders(request)
    return run_job(
        JobOptions(request, _chain(options), options.snapshot, shards if isinstance(shards, int) else None, gpus)
    )


def array(words: list[str]) -> int:
    """The deprecated job array: the configuration whose number in the matrix is this job's number in the array."""
    say(
        "_array.sh is deprecated: use bash sbatch/run.sh, which skips what is complete and continues what was "
        "interrupted"
    )
    names = _request(job_parser("_array.sh").parse(words), whole_matrix=True).names
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not number.isdigit():
        raise UsageError("this is a job array: sbatch sbatch/_array.sh")
    if int(number) >= len(names):
        raise UsageError(f"no configuration number {number}; valid: 0 to {len(names) - 1} ({' '.join(names)})")
    return job([*words, "--config", names[int(number)]])


def fetch(words: list[str]) -> int:
    from fast_dllm.runner import prefetch

    options = prefetch_parser().parse(words)
    request = _request(options, several_tasks=True, executes=False)
    os.chdir(str(request.root))
    if options.keep:
        return prefetch.keep(request)
    load_cluster_settings(request.root)  # the cache may be named there
    return prefetch.fetch(request)


def make_venv(words: list[str]) -> int:
    from fast_dllm.runner import venv

    if words:
        raise UsageError(f"unknown option {words[0]!r}; it takes none")
    folder = venv.ensure(ROOT, project_root())
    if folder is None:
        return 1
    print(folder)
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "run": ("run.sh", run),
    "local": ("local.sh", local),
    "baseline": ("baseline.sh", baseline),
    "prefetch": ("prefetch.sh", fetch),
    "venv": ("venv.sh", make_venv),
    "job": ("_job.sh", job),
    "array": ("_array.sh", array),
}
