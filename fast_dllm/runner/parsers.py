"""The option parsers of the scripts in sbatch/: which options each takes, and the help texts."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any, NoReturn, Sequence

from fast_dllm.errors import UsageError
from fast_dllm.runner.roofline import TYPES
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT, PUBLISHED_MODELS
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import experiments
from fast_dllm.spec.tasks import ROOT, TASKS, baseline_tasks, benchmarks


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps hub ids whole: they have hyphens, and are copied from the help."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class ScriptParser(argparse.ArgumentParser):
    """A parser whose errors are one line with the valid choices, raised as UsageError."""

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
        """The options that these words give. Raises UsageError."""
        options, unknown = self.parse_known_intermixed_args(list(words))
        if unknown:
            names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(f"unknown option {unknown[0]!r}; valid: {' '.join(names)}")
        return options


# Options that several scripts take, as argparse's add_argument has them.
COMMON: dict[str, dict[str, Any]] = {
    "--limit": {
        "metavar": "N",
        "help": "only the first N questions (of each subtask); stored apart, as <task>_limit_<N>",
    },
    "--threshold": {"metavar": "X", "help": "confidence above which a token is accepted, 0 to 1"},
    "--model_args": {
        "metavar": "A=V[,A=V]",
        "help": "any other model argument or knob of the experiment; what is not the configuration's own is part of "
        "the name of the results' folder, as in k2_middle+threshold=0.8",
    },
    "--num_fewshot": {"metavar": "N", "help": "examples in the prompt (default: the task's own)"},
    "--confirm_run_unsafe_code": {
        "action": "store_true",
        "help": "run the code that the model writes, in a sandbox where the machine has one (docs/experiments.md, Code "
        f"tasks); {' '.join(benchmarks(code=True))} need it",
    },
    "--continue": {
        "metavar": "N",
        "default": "3",
        "dest": "further_jobs",
        "help": "how many further jobs may continue one that Slurm ended: time limit, preemption, node failure "
        "(default %(default)s)",
    },
    "--hours": {
        "metavar": "H",
        "help": "wall time of a job, within what its QOS allows; auto: what the evaluation may take, from the speed of "
        "a run that is complete or from the GPU's data sheet, with a margin (default 12, or the QOS's limit)",
    },
    "--gpu": {
        "metavar": "TYPE[,TYPE]",
        "help": f"{' '.join(TYPES)}; of several the one that starts soonest; soonest: of all that the model can run on "
        "(default rtx_6000)",
    },
    "--gpus": {"metavar": "P", "help": "P GPUs of one node for each job, which divide its questions among them"},
    "--shards": {
        "metavar": "N",
        "help": "each configuration's questions in N shards, a job array, and a short job that finishes it; auto: as "
        "many that each shard ends within a job's wall time",
    },
    "--help": {"action": "help", "help": "show this and exit"},
}
SETTINGS = ("--threshold", "--model_args", "--num_fewshot")
JOBS = ("--hours", "--gpu", "--gpus", "--shards")


def _add(group: argparse._ArgumentGroup, *options: str) -> None:
    for option in options:
        group.add_argument(*["-h"] * (option == "--help"), option, **COMMON[option])


def _add_model(group: argparse._ArgumentGroup, default: str = "default the first") -> None:
    published = ", ".join(PUBLISHED_MODELS)
    group.add_argument("--model", metavar="M", help=f"a hub id (published: {published}), a folder or tiny ({default})")


def _add_experiment(group: argparse._ArgumentGroup) -> None:
    names = " ".join(experiments(ROOT))
    group.add_argument("--experiment", metavar="E", help=f"{names} (default {DEFAULT_EXPERIMENT})")


def _add_config(group: argparse._ArgumentGroup, meaning: str) -> None:
    """meaning: what the help says before it lists the configurations of the default experiment."""
    names = " ".join(matrix_of(DEFAULT_EXPERIMENT, ROOT).names)
    group.add_argument("--config", metavar="C[,C]", action="append", default=[], help=f"{meaning}: {names}")


def _add_task(group: argparse._ArgumentGroup, default: str, metavar: str = "T") -> None:
    """default: the tasks without this option."""
    names, code_names = (" ".join(benchmarks(code=code)) for code in (False, True))
    text = f"{names} (default {default}); with --confirm_run_unsafe_code also {code_names}"
    group.add_argument("--task", metavar=metavar, help=text)


def run_parser() -> ScriptParser:
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
        "--rehearse",
        action="store_true",
        help="two questions of one configuration through everything that a job does, interrupted once as preemption "
        "does; says for each step whether it works and how long it took, and touches no result",
    )
    what.add_argument(
        "--force", action="store_true", help="run complete and stale configurations again, from the first question"
    )
    runs = parser.add_argument_group("which runs")
    _add(runs, "--limit")
    _add_task(runs, "gsm8k")
    _add_experiment(runs)
    _add_config(runs, "only these of the experiment's configurations, plain, or a range of layers such as k2_8-19")
    runs.add_argument("configurations", metavar="CONFIG", nargs="*", help="the same as --config CONFIG")
    _add(runs, *SETTINGS)
    _add_model(runs)
    _add(runs, "--confirm_run_unsafe_code")
    _add(parser.add_argument_group("jobs"), "--continue", *JOBS)
    other = parser.add_argument_group("other")
    other.add_argument(
        "--report",
        action="store_true",
        help="what the results say: verdict, alarms, tables, pictures; the options of python -m fast_dllm.report, "
        "such as --experiment E[,E], --task T, --limit N, --against E/CONFIG, --csv",
    )
    _add(other, "--help")
    return parser


def local_parser() -> ScriptParser:
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
    _add_task(runs, "gsm8k")
    _add(runs, "--limit")
    _add_experiment(runs)
    _add_config(
        runs,
        "plain (the model without layer reuse, the default), a range of layers such as k2_8-19, or one of the "
        "experiment's",
    )
    runs.add_argument(
        "--matrix", action="store_true", help="all of the experiment's, then the report; what is complete is skipped"
    )
    runs.add_argument(
        "--demo",
        action="store_true",
        help="the matrix on toy_math with the tiny model, 200 questions each, then the report: a few minutes",
    )
    runs.add_argument(
        "--force", action="store_true", help="answer every question again; with --matrix the complete ones too"
    )
    _add_model(runs, "default: the first with a CUDA GPU, else tiny")
    _add(runs, *SETTINGS)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--batch_size",
        "--batch-size",
        metavar="N",
        help="questions decoded side by side (default 1), or auto: what fits",
    )
    _add(how, "--confirm_run_unsafe_code")
    how.add_argument(
        "--traces",
        action="store_true",
        help="write traces.jsonl.gz too: what each denoising step of each answer saw and did (docs/traces.md)",
    )
    _add(how, "--help")
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
    _add_task(runs, ",".join(baseline_tasks()), metavar="T[,T]")
    _add(runs, "--limit")
    _add_model(runs)
    _add(runs, "--confirm_run_unsafe_code")
    runs.add_argument("--force", action="store_true", help="run complete ones again, from the first question")
    jobs = parser.add_argument_group("jobs")
    submitted = parser.add_argument_group("jobs that it submits, each task as run.sh does it: bash sbatch/baseline.sh")
    _add(jobs, "--continue", "--help")
    _add(submitted, *JOBS)
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
    group.add_argument("--task", metavar="T[,T]", help=f"{' '.join(TASKS)} (default gsm8k)")
    _add_model(group)
    group.add_argument(
        "--keep",
        action="store_true",
        help="download nothing; touch the files of model, data and venv, so that no purge of scratch takes them",
    )
    _add(group, "--help")
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
    """Hidden options, which a job of this project gives to the job that continues it."""
    for option, default in (("--snapshot", None), ("--after", ""), ("--progress", "0+0"), ("--stalled", "0")):
        parser.add_argument(option, default=default, help=argparse.SUPPRESS)
