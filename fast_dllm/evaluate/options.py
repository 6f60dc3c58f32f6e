"""An evaluation's command line: lm_eval's options and two more, checked before the model is loaded.

Importing this needs neither torch nor lm_eval's tasks: a wrong option is answered at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from fast_dllm.errors import UsageError, line_of
from fast_dllm.guard import check_folder
from fast_dllm.record.shards import Shard
from fast_dllm.spec.launch import launched_processes
from fast_dllm.spec.matrix import arguments_of, defaults_of, folder_name, matrix_of, parse_folder
from fast_dllm.spec.tasks import ROOT, TASKS

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from fast_dllm.decode.arguments import ModelArguments

# lm_eval options that would write or send results by another way than results.json and summary.json.
UNSUPPORTED = ("wandb_args", "trackio_args", "hf_hub_log_args", "use_cache", "cache_requests", "predict_only")


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of one call of eval.py.

    config: lm_eval's options. model_args: unchecked. configurations: names; empty for the one that the model arguments
    make. shard: which questions to answer; None for all. traces: keep what each denoising step saw and did.
    """

    config: EvaluatorConfig
    model_args: dict[str, Any]
    configurations: list[str]
    shard: Shard | None
    num_processes: int
    traces: bool = False


def read_command_line(words: list[str]) -> EvaluationOptions:
    """Read the command line and check what can be checked without the tasks.

    Another command of lm_eval than `run` is run here and ends the program. Raises UsageError.
    """
    num_processes = launched_processes()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--configurations", metavar="C[,C]")
    parser.add_argument("--shard", metavar="i/N")
    parser.add_argument("--traces", action="store_true")
    options, lm_eval_words = parser.parse_known_args(words)
    shard = None if options.shard is None else Shard.parse(options.shard, num_processes)
    configurations = options.configurations.split(",") if options.configurations is not None else []
    config, model_args = _read_lm_eval_options(lm_eval_words)
    if shard and not config.output_path:
        raise UsageError("--shard needs --output_path: the answers are kept there")
    if options.traces and not config.output_path:
        raise UsageError("--traces needs --output_path: the traces are kept there")
    return EvaluationOptions(
        config, model_args, list(dict.fromkeys(configurations)), shard, num_processes, options.traces
    )


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message}; `python eval.py run --help` tells the options")


def _read_lm_eval_options(words: list[str]) -> tuple[EvaluatorConfig, dict[str, Any]]:
    """Returns lm_eval's options, and the model arguments, unchecked."""
    sys.argv[1:] = words  # lm_eval's parser reads the command line itself
    cli = HarnessCLI()
    for parser in (cli._parser, *cli._subparsers.choices.values()):
        parser.error = _refuse  # one line of eval.py, without lm_eval's usage
    namespace = cli.parse_args()
    if getattr(namespace, "command", None) != "run":
        cli.execute(namespace)
        sys.exit(0)
    for name in UNSUPPORTED:
        if getattr(namespace, name, None):
            raise UsageError(f"eval.py does not support --{name}; it writes results.json and summary.json itself")
    explicit_device = getattr(namespace, "device", None)
    try:
        config = EvaluatorConfig.from_cli(namespace)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(line_of(error)) from error
    if config.model != "fast_dllm_v2":
        raise UsageError(f"unknown model {config.model!r}; eval.py evaluates --model fast_dllm_v2")
    if config.output_path and Path(config.output_path).suffix in (".json", ".jsonl"):
        raise UsageError(f"--output_path must be a folder, not {config.output_path!r}")
    if namespace.output_path == "":
        raise UsageError("--output_path is empty; it names the folder for the results")
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise UsageError(f"--num_fewshot must be at least 0, not {config.num_fewshot}")
    if config.limit is not None and not 0 < config.limit < math.inf:
        raise UsageError(f"--limit must be above 0, not {config.limit:g}")
    model_args = {"batch_size": config.batch_size, "device": explicit_device, **config.model_args}
    model_args.pop("trust_remote_code", None)  # lm_eval's option concerns data sets; the model has no remote code
    if config.output_path:
        check_folder("--output_path", Path(config.output_path))
    return config, model_args


def load_and_check_tasks(options: EvaluationOptions) -> tuple[TaskManager, ModelArguments]:
    """Load the tasks with their data, before the model. Returns their manager and the checked model arguments.

    `options.config` gets the tasks' resolved names. Raises UsageError, and DataError for a task whose data cannot be
    loaded.
    """
    # These import torch, so only here, where the command line is known to be valid.
    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.evaluate import task_checks
    from fast_dllm.evaluate.task_loading import find_tasks, load_tasks, prepare

    config = options.config
    parsed = ModelArguments.parse(**options.model_args)  # before the tasks are looked for, which takes longer

    valid_tasks = f"{', '.join(TASKS)} (docs/experiments.md, Tasks) or another of lm_eval's"
    if not any(config.tasks):
        raise UsageError(f"no task given; --tasks takes {valid_tasks}")
    try:
        task_manager = find_tasks(config)
    except ValueError as error:
        raise UsageError(f"{error}; --tasks takes {valid_tasks}") from None
    task_manager = prepare(
        task_manager, config.tasks, confirm_run_unsafe_code=config.confirm_run_unsafe_code, seed=config.seed[0]
    )
    tasks = load_tasks(task_manager, config.tasks)
    if config.num_fewshot:
        task_checks.check_examples(tasks, config.num_fewshot)
    if config.samples:
        config.samples = task_checks.check_samples(tasks, config.samples)
    task_checks.check_generation(tasks, config.gen_kwargs or {}, parsed.knobs["max_new_tokens"])
    if options.traces and not any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values()):
        raise UsageError("--traces: an answer that is scored by log-likelihood has no denoising steps")
    if options.num_processes > 1:
        task_checks.check_processes(tasks, options.num_processes, config.limit, config.samples)
    return task_manager, parsed


def runs_of(options: EvaluationOptions, plain: ModelArguments) -> list[tuple[str, ModelArguments]]:
    """(name of the run, its model arguments) for each of --configurations.

    plain: the model arguments of the command line alone; without --configurations they are the one run. An argument of
    the command line replaces the configuration's, and is part of the run's name. The name of a configuration may also
    have such changes in it (`k2_middle+threshold=0.8`). Raises UsageError.
    """
    from fast_dllm.decode.arguments import ModelArguments

    if not options.configurations:
        return [(plain.config_name, plain)]
    config, experiment = options.config, plain.experiment_name
    matrix, defaults = matrix_of(experiment, ROOT), defaults_of(experiment, ROOT)
    command_line_arguments = {name: value for name, value in options.model_args.items() if value is not None}
    changed = {name: plain.as_dict()[name] for name in command_line_arguments if name in defaults}
    task = TASKS.get(str(config.tasks[0])) if len(config.tasks) == 1 else None
    if task is not None and config.num_fewshot is not None:
        defaults["num_fewshot"], changed["num_fewshot"] = task.num_fewshot, config.num_fewshot
    runs = []
    for folder in options.configurations:
        name, in_name = parse_folder(folder)
        changes = {key: value for key, value in in_name.items() if key != "num_fewshot"}  # that is lm_eval's own option
        arguments = ModelArguments.parse(
            plain.experiment, **{**arguments_of(matrix, name, defaults), **command_line_arguments, **changes}
        )
        runs.append((folder_name(matrix, name, {**in_name, **changed, **changes}, defaults), arguments))
    return runs
