"""What a script was asked for: the checked words of its command line, and the runs that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec import matrix as matrices
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT, DEFAULT_MODEL
from fast_dllm.spec.matrix import GENERATION_FILE, NAME, Matrix
from fast_dllm.spec.shard_names import parse_sharding
from fast_dllm.spec.tasks import TASKS, Task, check_task, split_tasks, task_folder, unconfirmed
from fast_dllm.spec.values import canonical, check_arguments, parse_arguments


@dataclass(frozen=True)
class Run:
    """One configuration of one task. name: the configuration; folder: after what runs; arguments: all that a token
    depends on, num_fewshot included."""

    experiment: str
    task: Task
    limit: int | None
    name: str
    folder: str
    arguments: Mapping[str, object]

    @property
    def path(self) -> str:
        """The run's folder below results/, logs/ and artifacts/; also the job's name."""
        return f"{self.experiment}/{task_folder(self.task.name, self.limit)}/{self.folder}"


@dataclass(frozen=True)
class Request:
    """root: the project's folder, which has the results. code_root: the code that runs; in a job its snapshot.

    model: None where none was named. command_line_arguments: model arguments, and num_fewshot. shard: the name
    of the one shard of the runs that is meant, or None. confirm_run_unsafe_code: whether what the model writes may be
    run, for tasks that are scored so.
    """

    root: Path
    code_root: Path
    experiment: str
    tasks: tuple[str, ...]
    limit: int | None
    names: tuple[str, ...]
    matrix: Matrix
    defaults: Mapping[str, object]
    model: str | None
    command_line_arguments: Mapping[str, object]
    shard: str | None = None
    confirm_run_unsafe_code: bool = False

    @property
    def task(self) -> str:
        return self.tasks[0]

    @property
    def model_or_default(self) -> str:
        return self.model or DEFAULT_MODEL

    def only(self, task: str, names: Iterable[str]) -> Request:
        """The same request for these configurations of one task."""
        return replace(self, tasks=(task,), names=tuple(names))

    def check_confirmed(self) -> None:
        """Raises UsageError for tasks that run what the model writes, unless that was confirmed."""
        names = [task for task in self.tasks if TASKS[task].code]
        if names and not self.confirm_run_unsafe_code:
            raise UsageError(unconfirmed(names))

    def words_of_confirmation(self, *tasks: str) -> list[str]:
        """The option that lets these tasks run what the model writes, where one of them does and it was given."""
        needed = self.confirm_run_unsafe_code and any(TASKS[task].code for task in tasks)
        return ["--confirm_run_unsafe_code"] if needed else []

    def with_model(self, shard: str | None = None) -> Request:
        """The same request with the default model named where none is, for one shard."""
        return replace(self, model=self.model_or_default, shard=shard)

    def runs(self) -> list[Run]:
        return [self.run(task, name) for task in self.tasks for name in self.names]

    def run(self, task: str, name: str) -> Run:
        defaults = {**self.defaults, "num_fewshot": TASKS[task].num_fewshot}
        arguments = matrices.effective_arguments(self.matrix, name, self.command_line_arguments, defaults)
        folder = matrices.folder_name(self.matrix, name, self.command_line_arguments, defaults)
        return Run(self.experiment, TASKS[task], self.limit, name, folder, arguments)

    def words(self, task: str, name: str) -> list[str]:
        """The options of _job.sh that name one run."""
        threshold = canonical(self.run(task, name).arguments["threshold"])
        named = ["--config", name, "--model", self.model_or_default, "--threshold", threshold]
        return [*self._task_words(task), *named, *self._argument_words("threshold")]

    def words_of_all(self, names: Iterable[str]) -> list[str]:
        """The options of run.sh that name these configurations, as they were given."""
        model = ["--model", self.model] if self.model is not None else []
        return [*self._task_words(self.task), *model, *self._argument_words(), *names]

    def _task_words(self, task: str) -> list[str]:
        limit = ["--limit", str(self.limit)] if self.limit is not None else []
        return ["--experiment", self.experiment, "--task", task, *limit, *self.words_of_confirmation(task)]

    def _argument_words(self, *without: str) -> list[str]:
        others = {
            key: value for key, value in self.command_line_arguments.items() if key not in (*without, "num_fewshot")
        }
        words = ["--model_args", join_arguments(others)] if others else []
        return words + (
            ["--num_fewshot", str(self.command_line_arguments["num_fewshot"])]
            if "num_fewshot" in self.command_line_arguments
            else []
        )


def join_arguments(arguments: Mapping[str, object]) -> str:
    return ",".join(f"{name}={canonical(value)}" for name, value in arguments.items())


# -- reading -----------------------------------------------------------------------------------------------------------
def read_request(
    root: Path,
    code_root: Path,
    *,
    task: str | None = None,
    experiment: str | None = None,
    limit: str | None = None,
    model: str | None = None,
    threshold: str | None = None,
    model_args: str | None = None,
    num_fewshot: str | None = None,
    config: Iterable[str] = (),
    whole_matrix: bool = False,
    several_tasks: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> Request:
    """Check the values of a command line and return what they ask for.

    config: names, several in one separated by commas; without any, all of the experiment's for `whole_matrix`, else
    `plain`. several_tasks: `task` may name several, separated by commas. Raises UsageError: one line that names the
    fault and the valid choices.
    """
    task = "gsm8k" if task is None else task
    tasks = split_tasks(task) if several_tasks else [check_task(task).name]
    experiment = check_experiment(DEFAULT_EXPERIMENT if experiment is None else experiment, code_root)
    matrix = matrices.matrix_of(experiment, code_root)
    defaults = matrices.defaults_of(experiment, code_root)
    names = [name for text in config for name in text.split(",")]
    names = matrices.check_names(matrix, names, defaults)
    if not names:
        names = list(matrix.names) if whole_matrix else ["plain"]
    model_arguments = parse_arguments(model_args) if model_args is not None else {}
    model_arguments = check_arguments(model_arguments, {**defaults, "graphs": "auto"})
    if threshold is not None:
        if "threshold" in model_arguments:
            raise UsageError("--threshold and --model_args both give the threshold")
        model_arguments["threshold"] = check_threshold(threshold)
    if num_fewshot is not None:
        model_arguments["num_fewshot"] = check_count("--num_fewshot", num_fewshot, least=0)
    return Request(
        root=root,
        code_root=code_root,
        experiment=experiment,
        tasks=tuple(tasks),
        limit=None if limit is None else check_count("--limit", limit),
        names=tuple(names),
        matrix=matrix,
        defaults=defaults,
        model=None if model is None else resolve_model(model, Path.cwd()),
        command_line_arguments=model_arguments,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )


def experiments(code_root: Path) -> list[str]:
    """The folders under experiments/ that have generation code; one with another kind of name is none."""
    names = (path.parent.name for path in (Path(code_root) / "experiments").glob(f"*/{GENERATION_FILE}"))
    return sorted(name for name in names if NAME.fullmatch(name))


def check_experiment(name: str, code_root: Path) -> str:
    names = experiments(code_root)
    if name not in names:
        raise UsageError(f"no experiment named {name!r}; there is: {' '.join(names) or 'none'}")
    return name


def check_count(option: str, text: str, least: int = 1, most: int | None = None, other: str = "") -> int:
    """other: a word that the option takes too."""
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or int(text) < least or (text[0] == "0" and text != "0"):
        choices = f"a whole number from {least}" + (f", or {other}" if other else "")
        raise UsageError(f"{option} must be {choices}, not {text!r}")
    if most is not None and int(text) > most:
        raise UsageError(f"{option} must be at most {most}, not {text}")
    return int(text)


def check_threshold(text: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", text, re.ASCII) or not 0 <= float(text) <= 1:
        raise UsageError(f"--threshold must be a number from 0 to 1, not {text!r}")
    return float(text)


def resolve_model(text: str, folder: Path, option: str = "--model") -> str:
    """`tiny`, a folder (absolute, for a job starts elsewhere) or a hub id. Raises UsageError."""
    if text == "tiny":
        return text
    if re.search(r"[,=\x00-\x1f\x7f]", text):
        raise UsageError(f"{option}: a comma, an equals sign or a control character cannot be passed on in {text!r}")
    path = Path(folder) / text
    if text and path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{option}: no config.json in the folder {text!r}")
        resolved = str(path.resolve())
        if re.search(r"[,=\x00-\x1f\x7f]", resolved):
            raise UsageError(f"{option}: the folder's full path has a comma or an equals sign: {resolved!r}")
        return resolved
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", text):
        return text
    raise UsageError(f"{option}: {text!r} is neither 'tiny', nor a folder, nor a hub id (owner/name)")


# -- the evaluation's command ------------------------------------------------------------------------------------------
def evaluation_words(request: Request, runs: list[Run], batch_size: str) -> list[str]:
    """eval.py's words for these runs of one task. A folder's name says which configuration a run is, and what it
    changes of it."""
    task = runs[0].task.name
    words = ["--tasks", task, "--batch_size", batch_size]
    words += ["--num_fewshot", str(runs[0].arguments["num_fewshot"])]
    words += ["--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn"]
    words += ["--limit", str(request.limit)] if request.limit is not None else []
    words += request.words_of_confirmation(task)
    if request.shard:
        words += ["--shard", f"{request.shard.partition('-')[0]}/{parse_sharding(request.shard)[0]}"]
    arguments = {
        "model_path": request.model_or_default,
        "show_speed": True,
        "experiment_name": request.experiment,
    }
    if "graphs" in request.command_line_arguments:
        arguments["graphs"] = request.command_line_arguments["graphs"]
    words += ["--configurations", ",".join(run.folder for run in runs), "--model_args", join_arguments(arguments)]
    return [*words, "--output_path", f"results/{request.experiment}/{task_folder(task, request.limit)}/"]
