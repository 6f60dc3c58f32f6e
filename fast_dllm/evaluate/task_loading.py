"""Loads lm_eval's tasks, after checks of what they need, and makes their prompts and scores reproducible."""

from __future__ import annotations

import functools
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from fast_dllm.errors import DataError, UsageError, line_of
from fast_dllm.spec.tasks import packaged_data, unconfirmed

ROOT = Path(__file__).resolve().parent.parent.parent
SANDBOXED = ("humaneval", "mbpp")  # the starts of the names of lm_eval's tasks that use evaluate's code_eval


def find_tasks(config: EvaluatorConfig) -> TaskManager:
    """The TaskManager for `config.tasks`, which become a list of names.

    It knows this project's tasks/, the folder of --include_path, and lm_eval's tasks. lm_eval itself reads all of its
    13,000 task files to find one task, which takes longer than loading a small model. So a task is first looked for in
    lm_eval/tasks/<start of its name>, and a group with a folder's name in lm_eval/tasks/benchmarks too. If one of the
    names is not found there, the whole index is read.
    """
    config.include_path = [path for path in (config.include_path, str(ROOT / "tasks")) if path]
    names = (
        config.tasks.split(",") if isinstance(config.tasks, str) else [n for t in config.tasks for n in t.split(",")]
    )
    if all(name.replace("_", "").isalnum() for name in names):
        library = Path(lm_eval.tasks.__file__).parent
        parts = [name.split("_") for name in names]
        starts = dict.fromkeys(
            "_".join(name_parts[:length]) for name_parts in parts for length in range(1, len(name_parts) + 1)
        )
        folders = [str(library / start) for start in starts if (library / start).is_dir()]
        groups = library / "benchmarks"
        if any((groups / f"{name}.yaml").is_file() and (library / name).is_dir() for name in names):
            folders.append(str(groups))
        manager = lm_eval.tasks.TaskManager(
            include_path=config.include_path + folders, include_defaults=False, metadata=config.metadata
        )
        if all(name in manager.all_tasks for name in names):
            config.tasks = list(dict.fromkeys(names))
            return manager
    return config.process_tasks(config.metadata)


def keep_documents(manager: TaskManager) -> TaskManager:
    """Let every task that `manager` loads have the same documents each time that they are read; returns `manager`.

    lm_eval calls a task's `process_docs` for the prompts, and again for the right answers. GPQA's function shuffles the
    four options with a random generator. Its second call would give another order than the prompts have, unless
    `datasets` has the first result in its cache on disk.
    """
    manager._factory = _Factory(meta=manager.metadata)
    return manager


class _Factory(TaskFactory):
    def _load_full_config(self, entry: Entry, overrides: dict | None = None) -> dict:
        config = super()._load_full_config(entry, overrides)
        data = packaged_data(str(config.get("dataset_path")))
        if data is not None:
            config.update(dataset_path="json", dataset_name=None, dataset_kwargs={"data_files": {"test": str(data)}})
        if callable(config.get("process_docs")):
            config["process_docs"] = _with_first_state(config["process_docs"])
        return config

    def _build_task(self, entry: Entry, overrides: dict | None) -> Task:
        try:
            return super()._build_task(entry, overrides)
        except (OSError, ValueError) as error:  # `datasets` and the hub's client raise many kinds
            places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            if not any("/datasets/" in place or "/huggingface_hub/" in place for place in places):
                raise
            if isinstance(error, (FileNotFoundError, NotADirectoryError, PermissionError)) and error.filename:
                raise UsageError(
                    f"the data of {entry.name} cannot be kept in {error.filename!r} ({error.strerror}); HF_HOME names "
                    "the folder for the hub's files, one that can be written"
                ) from error
            raise DataError(
                f"the data of {entry.name} cannot be had ({type(error).__name__}: {line_of(error)}); where there is a "
                f"network: bash sbatch/prefetch.sh --task {entry.name} --model tiny"
            ) from error


def _with_first_state(process_docs: Callable) -> Callable:
    """`process_docs`, with the random generators of its module reset to their first state before each call."""
    generators = [value for value in process_docs.__globals__.values() if isinstance(value, random.Random)]
    states = [(generator, _first_state(generator)) for generator in generators]

    @functools.wraps(process_docs)
    def process(dataset):
        for generator, state in states:
            generator.setstate(state)
        return process_docs(dataset)

    return process


@functools.cache
def _first_state(generator: random.Random) -> tuple:
    """The generator's state when this was first called for it."""
    return generator.getstate()


def prepare(
    manager: TaskManager, tasks: Iterable[str | dict], *, confirm_run_unsafe_code: bool, seed: int | None
) -> TaskManager:
    """The manager, ready to load `tasks`: names of tasks, groups and tags, or configurations.

    Raises UsageError, which says what to do, if a task would fail after the model is loaded. seed: for scores that use
    random numbers.
    """
    configs = [config for task in tasks for config in task_configs(manager.task_index, task)]
    if any("/ifeval/" in str(config.get("process_results")) for config in configs):
        find_sentence_data()
        _seed_language_detection(seed)
    unsafe = [str(config["task"]) for config in configs if config.get("unsafe_code")]
    if unsafe and not confirm_run_unsafe_code:
        raise UsageError(unconfirmed(unsafe))
    if unsafe:
        _prepare_code_execution(unsafe)
    return keep_documents(manager)


def task_configs(index: Mapping[str, Entry], task: str | dict) -> Iterator[dict]:
    """The configurations of the tasks that a name, a group or a configuration means. Reads no data."""
    name = task if isinstance(task, str) else task.get("group", task.get("task"))
    entry = index.get(name) if isinstance(name, str) else None
    config = dict(entry.cfg or {"task": sorted(entry.tags)}) if entry else {}
    if isinstance(task, dict):
        config |= task
    if isinstance(config.get("task"), list):
        for child in config["task"]:
            yield from task_configs(index, child)
    elif config:
        yield config


def load_tasks(manager: TaskManager, names: list[str | dict]) -> dict[str, Task]:
    """Loads all tasks that `names` mean, with their data; returns name -> task.

    The next `manager.load(names)`, which lm_eval calls, returns the same tasks, so that no data set is read twice.
    Raises UsageError for a task that is named twice, and DataError for data that cannot be loaded.
    """
    try:
        loaded = manager.load(names)
    except ValueError as error:
        if "Duplicate task" not in str(error):
            raise
        raise UsageError(f"--tasks: {line_of(error)}; name each task once") from None
    load, preloaded = manager.load, [loaded]
    manager.load = lambda wanted: preloaded.pop() if preloaded and wanted == names else load(wanted)
    return loaded["tasks"]


def find_sentence_data() -> str:
    """The folder of nltk's data for counting sentences. Raises UsageError, which says what to do, if it is missing."""
    import nltk.data

    try:
        return str(nltk.data.find("tokenizers/punkt_tab/english/"))
    except LookupError:
        # lm_eval would try to download it while the GPU waits, on nodes that often reach no network
        raise UsageError(
            "ifeval needs nltk's sentence data, which is not there; run: bash sbatch/prefetch.sh --task ifeval"
            " (in a venv of your own: python -m fast_dllm.runner.nltk_data)"
        ) from None


def _seed_language_detection(seed: int | None) -> None:
    """Seed langdetect, which samples: without a seed it may give the same answer two languages on two days."""
    import langdetect

    langdetect.DetectorFactory.seed = seed


def _prepare_code_execution(names: list[str]) -> None:
    """Find the sandbox for the programs of these tasks, and print one line about it for each kind of task."""
    from fast_dllm.evaluate.code_scoring import use_sandbox
    from fast_dllm.evaluate.sandbox import find_sandbox

    use_sandbox()
    others = [name for name in names if not name.startswith(SANDBOXED)]
    if len(others) < len(names):
        sandbox = find_sandbox()
        guard = f": {sandbox.missing}" if sandbox.missing else ""
        _print_once(f"the model's programs are executed in a sandbox ({sandbox.name}{guard})")
    if others:
        _print_once(
            f"{', '.join(others)}: lm_eval's own scorer runs the model's programs, with your rights and no sandbox"
        )


def _print_once(text: str) -> None:
    """Print a line to stderr, in one of the evaluation's processes."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"eval.py: {text}", file=sys.stderr, flush=True)


def load_data(name: str) -> int:
    """Load the data of a task, from the hub where it is not in the cache; returns the number of its tasks."""
    from fast_dllm.evaluate.code_scoring import use_sandbox

    use_sandbox()
    manager = keep_documents(TaskManager(include_path=str(ROOT / "tasks")))
    return len(manager.load([name])["tasks"])
