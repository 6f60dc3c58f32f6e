"""What a script was asked for: the words of its command line, checked, and the runs that they stand for."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec import matrix as matrices
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT, DEFAULT_MODEL
from fast_dllm.spec.matrix import GENERATION_FILE, NAME, NINE, Matrix
from fast_dllm.spec.shares import parse_division
from fast_dllm.spec.tasks import TASKS, Task, check_task, split_tasks, task_folder
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
        """Below results/, logs/ and artifacts/; also the job's name."""
        return f"{self.experiment}/{task_folder(self.task.name, self.limit)}/{self.folder}"


@dataclass(frozen=True)
class Request:
    """root: the project's folder, which has the results. code_root: the code that runs; in a job its snapshot.

    model: None where none was named. given: the model arguments of the command line, and num_fewshot. share: the name
    of the one share of the runs that is meant, or None.
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
    given: Mapping[str, object]
    share: str | None = None

    @property
    def task(self) -> str:
        return self.tasks[0]

    @property
    def model_or_default(self) -> str:
        return self.model or DEFAULT_MODEL

    def runs(self) -> list[Run]:
        return [self.run(task, name) for task in self.tasks for name in self.names]

    def run(self, task: str, name: str) -> Run:
        defaults = {**self.defaults, "num_fewshot": TASKS[task].num_fewshot}
        arguments = matrices.effective_arguments(self.matrix, name, self.given, defaults)
        folder = matrices.folder_name(self.matrix, name, self.given, defaults)
        return Run(self.experiment, TASKS[task], self.limit, name, folder, arguments)

    def words(self, task: str, name: str) -> list[str]:
        """The options of _job.sh that name one run."""
        threshold = canonical(self.run(task, name).arguments["threshold"])
        named = ["--config", name, "--model", self.model_or_default, "--threshold", threshold]
        return [*self._words_of_what(task), *named, *self._words_of_given("threshold")]

    def words_of_all(self, names: Iterable[str]) -> list[str]:
        """The options of run.sh that name these configurations, as they were given."""
        model = ["--model", self.model] if self.model is not None else []
        return [*self._words_of_what(self.task), *model, *self._words_of_given(), *names]

    def _words_of_what(self, task: str) -> list[str]:
        limit = ["--limit", str(self.limit)] if self.limit is not None else []
        return ["--experiment", self.experiment, "--task", task, *limit]

    def _words_of_given(self, *without: str) -> list[str]:
        others = {key: value for key, value in self.given.items() if key not in (*without, "num_fewshot")}
        words = ["--model_args", join_arguments(others)] if others else []
        return words + (["--num_fewshot", str(self.given["num_fewshot"])] if "num_fewshot" in self.given else [])


def join_arguments(arguments: Mapping[str, object]) -> str:
    return ",".join(f"{name}={canonical(value)}" for name, value in arguments.items())


# -- reading -----------------------------------------------------------------------------------------------------------
def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that name the runs; `read_request` checks what they say."""
    for option in ("--experiment", "--task", "--limit", "--model", "--threshold", "--model_args", "--num_fewshot"):
        parser.add_argument(option)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--matrix", action="store_true", help="all configurations where none is named")
    parser.add_argument("--several", action="store_true", help="tasks, by commas")
    parser.add_argument("--code_tasks", action="store_true", help="offer them too")


def read_request(options: argparse.Namespace, root: Path, code_root: Path) -> Request:
    """Raises UsageError: one line naming the fault and the valid choices."""
    task = "gsm8k" if options.task is None else options.task
    tasks = split_tasks(task, options.code_tasks) if options.several else [check_task(task, options.code_tasks).name]
    experiment = check_experiment(
        options.experiment if options.experiment is not None else DEFAULT_EXPERIMENT, code_root
    )
    limit = None if options.limit is None else check_count("--limit", options.limit)
    model = None if options.model is None else resolve_model(options.model, Path.cwd())
    matrix = matrices.matrix_of(experiment, code_root)
    defaults = matrices.defaults_of(experiment, code_root)
    names = [name for text in options.config for name in text.split(",")]
    names = matrices.check_names(matrix, names, defaults)
    if not names:
        names = list(matrix.names) if options.matrix else ["plain"]
    given = parse_arguments(options.model_args) if options.model_args is not None else {}
    given = check_arguments(given, {**defaults, "graphs": "auto"})
    if options.threshold is not None:
        if "threshold" in given:
            raise UsageError("--threshold and --model_args both give the threshold")
        given["threshold"] = check_threshold(options.threshold)
    if options.num_fewshot is not None:
        given["num_fewshot"] = check_count("--num_fewshot", options.num_fewshot, least=0)
    return Request(root, code_root, experiment, tuple(tasks), limit, tuple(names), matrix, defaults, model, given)


def experiments(code_root: Path) -> list[str]:
    """The folders under experiments/ that have generation code; one with another kind of name is none."""
    found = (path.parent.name for path in (Path(code_root) / "experiments").glob(f"*/{GENERATION_FILE}"))
    return sorted(name for name in found if NAME.fullmatch(name))


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
def evaluation_words(request: Request, runs: list[Run], batch_size: int, confirmed: bool) -> list[str]:
    """eval.py's words for these runs of one task. Several, and those whose folder reuse_k and layer_subset alone do not
    tell, are named (`--configurations`); a folder's name says what it changes of a configuration."""
    first = runs[0]
    words = ["--tasks", first.task.name, "--batch_size", str(batch_size)]
    words += ["--num_fewshot", str(first.arguments["num_fewshot"])]
    words += ["--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn"]
    words += ["--limit", str(request.limit)] if request.limit is not None else []
    words += ["--confirm_run_unsafe_code"] if confirmed else []
    if request.share:
        words += ["--shard", f"{request.share.partition('-')[0]}/{parse_division(request.share)[0]}"]
    arguments: dict[str, object] = {"model_path": request.model_or_default}
    folder = f"results/{request.experiment}/{task_folder(first.task.name, request.limit)}/"
    common = {"show_speed": True, "experiment_name": request.experiment}
    if "graphs" in request.given:
        common["graphs"] = request.given["graphs"]
    if len(runs) == 1 and first.folder == first.name and (first.name == "plain" or first.name in NINE.configurations):
        own = matrices.arguments_of(request.matrix, first.name, request.defaults)
        arguments.update({"threshold": first.arguments["threshold"], **common})
        if first.name != "plain":
            arguments.update((key, value) for key, value in own.items() if key not in arguments)
        folder += f"{first.folder}/"
    else:
        words += ["--configurations", ",".join(run.folder for run in runs)]
        arguments.update(common)
    return [*words, "--model_args", join_arguments(arguments), "--output_path", folder]
