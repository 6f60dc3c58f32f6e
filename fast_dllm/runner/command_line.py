"""The scripts' command lines: a parser for each script, which becomes one frozen dataclass, and what runs with it.

`bash sbatch/run.sh WORDS` arrives here as `run WORDS`. No other module sees argparse's namespace.
"""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from pathlib import Path
from typing import Callable, NoReturn, Sequence

from fast_dllm.errors import UsageError
from fast_dllm.runner import prefetch, venv
from fast_dllm.runner.baseline import BaselineOptions, run_baseline
from fast_dllm.runner.chain import Chain
from fast_dllm.runner.environment import has_gpu, load_cluster_settings
from fast_dllm.runner.gpus import check_gpu
from fast_dllm.runner.job import JobOptions, run_job
from fast_dllm.runner.local import LocalOptions, run_local
from fast_dllm.runner.messages import say
from fast_dllm.runner.output import print_status
from fast_dllm.runner.resources import check_hours
from fast_dllm.runner.roofline import TYPES
from fast_dllm.runner.shard_jobs import AUTO
from fast_dllm.runner.submission import SubmitOptions, run_submission
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT, PUBLISHED_MODELS
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import Request, check_count, experiments, read_request
from fast_dllm.spec.shard_names import MAX_GPUS, MAX_SHARDS, sharding
from fast_dllm.spec.tasks import ROOT, baseline_tasks, benchmarks

# The words of a Request, as read_request takes them.
REQUEST_OPTIONS = (
    "task", "experiment", "limit", "model", "threshold", "model_args", "num_fewshot", "config",
    "confirm_run_unsafe_code",
)  # fmt: skip


def project_root() -> Path:
    """The project's folder, which has the results. A snapshot of the code is in .snapshots/<id>/ of it."""
    return ROOT.parent.parent if ROOT.parent.name == ".snapshots" else ROOT


# -- parsers -----------------------------------------------------------------------------------------------------------
class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps hub ids whole: they have hyphens, and are copied from the help."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class ScriptParser(argparse.ArgumentParser):
    """A parser whose complaints are one line with the valid choices."""

    def __init__(self, script: str, usage: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=script,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            add_help=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (\S+): expected one argument", message)
        raise UsageError(f"{match[1].split('/')[0]} needs a value" if match else message)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Raises UsageError."""
        options, unknown = self.parse_known_intermixed_args(list(words))
        if unknown:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(f"unknown option {unknown[0]!r}; valid: {' '.join(names)}")
        return options


def _add_model(group: argparse._ArgumentGroup, default: str) -> None:
    published = ", ".join(PUBLISHED_MODELS)
    group.add_argument("--model", metavar="M", help=f"a hub id (published: {published}), a folder or tiny ({default})")


def _add_limit(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--limit", metavar="N", help="only the first N questions (of each subtask); stored apart, as <task>_limit_<N>"
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    """What a configuration runs with, beside what the experiment's matrix says."""
    group.add_argument("--threshold", metavar="X", help="confidence above which a token is accepted, 0 to 1")
    group.add_argument(
        "--model_args",
        metavar="A=V[,A=V]",
        help="any other model argument or knob of the experiment; what is not the configuration's own is part of the "
        "name of the results' folder, as in k2_middle+threshold=0.8",
    )
    group.add_argument("--num_fewshot", metavar="N", help="examples in the prompt (default: the task's own)")


def _add_chain(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--continue",
        metavar="N",
        default=default,
        dest="further_jobs",
        help="how many further jobs may continue one that Slurm ended: time limit, preemption, node failure "
        "(default %(default)s)",
    )


def _add_jobs(group: argparse._ArgumentGroup) -> None:
    """What each job asks Slurm for, and how many jobs there are."""
    group.add_argument(
        "--hours",
        metavar="H",
        help="wall time of a job, within what its QOS allows; auto: what the evaluation may take, from the speed of a "
        "run that is complete or from the GPU's data sheet, with a margin (default 12, or the QOS's limit)",
    )
    group.add_argument(
        "--gpu",
        metavar="TYPE[,TYPE]",
        help=f"{' '.join(TYPES)}; of several the one that starts soonest; soonest: of all that the model can run on "
        "(default rtx_6000)",
    )
    group.add_argument(
        "--gpus", metavar="P", help="P GPUs of one node for each job, which divide its questions among them"
    )
    group.add_argument(
        "--shards",
        metavar="N",
        help="each configuration's questions in N shards, a job array, and a short job that finishes it; auto: as many "
        "that each shard ends within a job's wall time",
    )


def _add_help(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="help", help="show this and exit")


def _tasks(code: bool = False) -> str:
    return " ".join(benchmarks(code=code))


def _add_task(group: argparse._ArgumentGroup, default: str, several: bool = False) -> None:
    """default: how the help says what is evaluated without the option."""
    group.add_argument(
        "--task",
        metavar="T[,T]" if several else "T",
        help=f"{_tasks()}{default}; with --confirm_run_unsafe_code also {_tasks(code=True)}",
    )


def _add_confirmation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="run the code that the model writes, in a sandbox where the machine has one (docs/experiments.md, Code "
        f"tasks); {' '.join(benchmarks(code=True))} need it",
    )


def run_parser() -> ScriptParser:
    names = " ".join(matrix_of(DEFAULT_EXPERIMENT, ROOT).names)
    parser = ScriptParser(
        "run.sh",
        "bash sbatch/run.sh [OPTION...] [CONFIG...]",
        "Submits one Slurm job for each configuration that is neither complete, nor queued, nor running.",
        f"""examples:
  bash sbatch/run.sh --status
  bash sbatch/run.sh --dry-run
  bash sbatch/run.sh                                  the whole matrix on gsm8k
  bash sbatch/run.sh --limit 100 k1_first k2_middle   a quick look
  bash sbatch/run.sh --task minerva_math --experiment {DEFAULT_EXPERIMENT}""",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--status",
        action="store_true",
        help="show what is complete, running, queued, failed or missing; submits nothing",
    )
    what.add_argument("--check", action="store_true", help="with --status: exit status 3 while anything is incomplete")
    what.add_argument("--json", action="store_true", help="with --status: the same as JSON")
    what.add_argument("--dry-run", action="store_true", help="show what would be submitted and why, and write nothing")
    what.add_argument(
        "--force", action="store_true", help="run complete and stale configurations again, from the first question"
    )
    runs = parser.add_argument_group("which runs")
    _add_limit(runs)
    _add_task(runs, " (default gsm8k)")
    runs.add_argument("--experiment", metavar="E", help=f"{' '.join(experiments(ROOT))} (default {DEFAULT_EXPERIMENT})")
    runs.add_argument(
        "--config",
        metavar="C[,C]",
        action="append",
        default=[],
        help=f"only these of the experiment's configurations, plain, or a range of layers such as k2_8-19: {names}",
    )
    runs.add_argument("configurations", metavar="CONFIG", nargs="*", help="the same as --config CONFIG")
    _add_settings(runs)
    _add_model(runs, "default the first")
    _add_confirmation(runs)
    jobs = parser.add_argument_group("jobs")
    _add_chain(jobs, "3")
    _add_jobs(jobs)
    other = parser.add_argument_group("other")
    other.add_argument(
        "--report",
        action="store_true",
        help="what the results say: verdict, alarms, tables, pictures; the options of python -m fast_dllm.report, "
        "such as --experiment E[,E], --task T, --limit N, --against E/CONFIG",
    )
    _add_help(other)
    return parser


def local_parser() -> ScriptParser:
    names = " ".join(matrix_of(DEFAULT_EXPERIMENT, ROOT).names)
    parser = ScriptParser(
        "local.sh",
        "bash sbatch/local.sh [OPTION...]",
        "Evaluates on this machine (makes the venv if it is missing) and writes\n"
        "results/<experiment>/<task>[_limit_<N>]/<configuration>/{results.json,summary.json}.\n"
        "Interrupted, it goes on where it was.",
        """examples:
  bash sbatch/local.sh --demo
  bash sbatch/local.sh --model tiny --task gsm8k --limit 10
  bash sbatch/local.sh --task toy_math --limit 50 --config k2_middle
  bash sbatch/local.sh --task toy_math --limit 50 --matrix""",
    )
    runs = parser.add_argument_group("which runs")
    _add_task(runs, " (default gsm8k)")
    _add_limit(runs)
    runs.add_argument("--experiment", metavar="E", help=f"{' '.join(experiments(ROOT))} (default {DEFAULT_EXPERIMENT})")
    runs.add_argument(
        "--config",
        metavar="C[,C]",
        action="append",
        default=[],
        help="plain (the model without layer reuse, the default), a range of layers such as k2_8-19, or one of the "
        f"experiment's: {names}",
    )
    runs.add_argument(
        "--matrix", action="store_true", help="all of the experiment's; those that are complete are skipped"
    )
    runs.add_argument(
        "--demo",
        action="store_true",
        help="the matrix on toy_math with the tiny model, 200 questions each, its table and report: a few minutes",
    )
    runs.add_argument(
        "--force", action="store_true", help="answer every question again; with --matrix the complete ones too"
    )
    _add_model(runs, "default: the first with a CUDA GPU, else tiny")
    _add_settings(runs)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch_size",
        "--batch-size",
        metavar="N",
        help="questions decoded side by side (default 1), or auto: what fits",
    )
    _add_confirmation(how)
    how.add_argument(
        "--traces",
        action="store_true",
        help="write traces.jsonl.gz too: what each denoising step of each answer saw and did (docs/traces.md)",
    )
    _add_help(how)
    return parser


def baseline_parser() -> ScriptParser:
    parser = ScriptParser(
        "baseline.sh",
        "sbatch sbatch/baseline.sh [OPTION...]\n       bash sbatch/baseline.sh [OPTION...]   (without Slurm)",
        f"Evaluates the plain model (no layer reuse, threshold 1) on {' '.join(baseline_tasks())},\n"
        "each with its own number of examples in the prompt. Results: results/00_baseline/<task>[_limit_<N>]/plain/.\n"
        "A task that fails does not stop the others; the exit status is 1 then. Tasks that are complete are skipped.",
    )
    runs = parser.add_argument_group("which runs")
    _add_task(runs, f" (default {','.join(baseline_tasks())})", several=True)
    _add_limit(runs)
    _add_model(runs, "default the first")
    _add_confirmation(runs)
    runs.add_argument("--force", action="store_true", help="run complete ones again, from the first question")
    jobs = parser.add_argument_group("jobs")
    _add_chain(jobs, "3")
    submitted = parser.add_argument_group("jobs that it submits, each task as run.sh does it: bash sbatch/baseline.sh")
    _add_jobs(submitted)
    _add_help(jobs)
    _add_handed_on(parser)
    return parser


def prefetch_parser() -> ScriptParser:
    parser = ScriptParser(
        "prefetch.sh",
        "bash sbatch/prefetch.sh [--task T[,T]] [--model M] [--keep]",
        "Downloads the model and the tasks' data sets into the hub's cache (HF_HOME), after a look at the free space,\n"
        "and says what is not accessible. Afterwards put HF_HUB_OFFLINE=1 into sbatch/cluster.env.",
    )
    group = parser.add_argument_group("options")
    group.add_argument("--task", metavar="T[,T]", help=f"{_tasks()} {_tasks(code=True)} (default gsm8k)")
    _add_model(group, "default the first")
    group.add_argument(
        "--keep",
        action="store_true",
        help="download nothing; touch the files of model, data and venv, so that no purge of scratch takes them",
    )
    _add_help(group)
    return parser


def job_parser(script: str = "_job.sh") -> ScriptParser:
    parser = ScriptParser(
        script,
        f"sbatch sbatch/{script} [OPTION...]",
        "One configuration of one task as a job; run.sh submits it with the code of that moment (--snapshot).",
    )
    group = parser.add_argument_group("options")
    for option in ("--experiment", "--task", "--limit", "--model", "--threshold", "--model_args", "--num_fewshot"):
        group.add_argument(option)
    group.add_argument("--config", action="append", default=[])
    group.add_argument("--confirm_run_unsafe_code", action="store_true")
    group.add_argument("--gpus", default="1")
    group.add_argument("--shards")
    group.add_argument("--continue", dest="further_jobs", default="0")
    _add_handed_on(parser)
    return parser


def _add_handed_on(parser: ScriptParser) -> None:
    """Options that only a job of this project gives to the next one."""
    for option, default in (("--snapshot", None), ("--after", ""), ("--progress", "0+0"), ("--stalled", "0")):
        parser.add_argument(option, default=default, help=argparse.SUPPRESS)


# -- values ------------------------------------------------------------------------------------------------------------
def _request(
    options: argparse.Namespace, whole_matrix: bool = False, several_tasks: bool = False, executes: bool = True
) -> Request:
    """executes: whether answers will be scored, so that a task that runs them needs its confirmation."""
    given = {name: getattr(options, name) for name in REQUEST_OPTIONS if hasattr(options, name)}
    request = read_request(project_root(), ROOT, **given, whole_matrix=whole_matrix, several_tasks=several_tasks)
    if executes:
        request.check_confirmed()
    return request


def _chain(options: argparse.Namespace) -> Chain:
    return Chain(
        further_jobs=check_count("--continue", options.further_jobs, least=0),
        after=tuple(job for job in options.after.split(",") if job),
        progress=options.progress,
        stalled=check_count("--stalled", options.stalled, least=0),
    )


def _submit_options(options: argparse.Namespace, request: Request, dry_run: bool = False) -> SubmitOptions:
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
    if options.status:
        return print_status(request, as_json_text=options.json, check=options.check)
    submit = _submit_options(options, request, dry_run=options.dry_run)
    load_cluster_settings(request.root)
    os.chdir(str(request.root))
    return run_submission(request, submit)


def _report(words: list[str]) -> int:
    """Replace this process by the report's program; the words are its own."""
    root = project_root()
    os.chdir(str(root))
    load_cluster_settings(root)
    folder = venv.ensure(ROOT, root)
    if folder is None:
        return 1
    environment = {**venv.environment_of(folder, os.environ), "PYTHONPATH": str(ROOT)}
    os.execvpe("python", ["python", "-m", "fast_dllm.report", *words], environment)


def local(words: list[str]) -> int:
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
    options = baseline_parser().parse(words)
    if options.task is None:
        options.task = ",".join(baseline_tasks())
    options.config = ["plain"]
    request = _request(options, several_tasks=True).with_model()
    chain = _chain(options)
    submission = None
    if any(value is not None for value in (options.shards, options.gpus, options.gpu, options.hours)):
        submission = _submit_options(options, request)
    load_cluster_settings(request.root)
    os.chdir(str(request.root))
    return run_baseline(BaselineOptions(request, chain, options.force, options.snapshot, submission, tuple(words)))


def job(words: list[str]) -> int:
    return run_job(_job_options(job_parser().parse(words)))


def _job_options(options: argparse.Namespace) -> JobOptions:
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
    return JobOptions(request, _chain(options), options.snapshot, shards if isinstance(shards, int) else None, gpus)


def array(words: list[str]) -> int:
    """The deprecated job array: the configuration whose number in the matrix is this job's number in the array."""
    say(
        "_array.sh is deprecated: use bash sbatch/run.sh, which skips what is complete and continues what was "
        "interrupted"
    )
    options = job_parser("_array.sh").parse(words)
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not number.isdigit():
        raise UsageError("this is a job array: sbatch sbatch/_array.sh")
    names = _request(options, whole_matrix=True).names
    if int(number) >= len(names):
        raise UsageError(f"no configuration number {number}; valid: 0 to {len(names) - 1} ({' '.join(names)})")
    options.config = [names[int(number)]]
    return run_job(_job_options(options))


def fetch(words: list[str]) -> int:
    options = prefetch_parser().parse(words)
    request = _request(options, several_tasks=True, executes=False)
    os.chdir(str(request.root))
    if options.keep:
        return prefetch.keep(request)
    load_cluster_settings(request.root)  # the cache may be named there
    return prefetch.fetch(request)


def make_venv(words: list[str]) -> int:
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
