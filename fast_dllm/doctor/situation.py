"""What the checks look at, and what a check says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fast_dllm.runner import venv
from fast_dllm.runner.environment import evaluation_environment, load_cluster_settings
from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.request import resolve_model
from fast_dllm.spec.tasks import ROOT, TASKS, check_task, task_of

GIB = 2**30
DATA_SETS_FILE = "data_sets.json"  # in the venv, whose lm_eval it describes; written by fast_dllm.doctor
# The data sets whose authors let nobody in without a token.
GATED = frozenset(task.gated for task in TASKS.values() if task.gated)


@dataclass(frozen=True)
class Finding:
    """One line: `ok`, `warn` (a job works, or may), or `fail` (a job would not) with what to do about it."""

    level: str
    text: str


@dataclass(frozen=True)
class DataSet:
    """A data set as a task's definition names it: hub id and configuration (None: its only one)."""

    path: str
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({self.name})" if self.name else self.path


@dataclass(frozen=True)
class Situation:
    """What the checks look at.

    `venv`: the complete one for the requirements; `builds`: all builds for them, the latest first; `builds_folder`:
    where the builds of all requirements are.
    `environment`: what an evaluation would see, with sbatch/cluster.env. `data_sets`: by task, where they are known.
    `reach`: asks the hub whether it gives out a "model" or "dataset"; None: ask nobody.
    """

    root: Path
    tasks: tuple[str, ...]
    model: str
    builds_folder: Path
    venv: Path | None
    environment: Mapping[str, str]
    data_sets: Mapping[str, frozenset[DataSet]]
    reach: Callable[[str, str], Finding] | None = None
    builds: tuple[Path, ...] = ()

    @property
    def offline(self) -> bool:
        value = self.environment.get("HF_HUB_OFFLINE") or self.environment.get("TRANSFORMERS_OFFLINE") or ""
        return value.upper() in ("1", "ON", "YES", "TRUE")

    @property
    def hub_home(self) -> Path:
        cache = self.environment.get("XDG_CACHE_HOME") or "~/.cache"
        return self._path("HF_HOME", f"{cache}/huggingface")

    @property
    def hub_cache(self) -> Path:
        return self._path("HF_HUB_CACHE", self.environment.get("HUGGINGFACE_HUB_CACHE") or f"{self.hub_home}/hub")

    @property
    def data_cache(self) -> Path:
        return self._path("HF_DATASETS_CACHE", f"{self.hub_home}/datasets")

    @property
    def has_token(self) -> bool:
        file = self._path("HF_TOKEN_PATH", f"{self.hub_home}/token")
        return bool(self.environment.get("HF_TOKEN") or (file.is_file() and file.read_text().strip()))

    def _path(self, name: str, default: str) -> Path:
        return self.root / os.path.expandvars(Path(self.environment.get(name) or default).expanduser())

    @property
    def is_hub_model(self) -> bool:
        return self.model != "tiny" and not Path(self.model).is_absolute()

    @property
    def model_folder(self) -> Path:
        """Where the model's files are or will be; a hub model without a snapshot gives its folder in the cache."""
        if not self.is_hub_model:
            return self.root / "models" / "tiny" if self.model == "tiny" else Path(self.model)
        folder = self.hub_cache / f"models--{self.model.replace('/', '--')}"
        commit = folder / "refs" / "main"
        return folder / "snapshots" / commit.read_text().strip() if commit.is_file() else folder


def read_situation(tasks: list[str], model: str) -> Situation:
    """The situation of a job on `tasks` with `model`. Raises UsageError with the scripts' own words for a wrong one."""
    for task in tasks:
        check_task(task)
    model = resolve_model(model or DEFAULT_MODEL, ROOT)
    load_cluster_settings(ROOT)
    folder = venv.find_complete(ROOT, ROOT, for_jobs=True)
    known = {}
    if folder and (record := folder / DATA_SETS_FILE).is_file():
        known = {
            task: frozenset(DataSet(*one) for one in data_sets)
            for task, data_sets in json.loads(record.read_text()).items()
        }
    for task in tasks:
        described = task_of(task)
        if task not in known and described and described.gated:
            known[task] = frozenset({DataSet(described.gated)})
    return Situation(
        root=ROOT,
        tasks=tuple(dict.fromkeys(tasks)),
        model=model,
        builds=tuple(venv.builds_of(ROOT, ROOT, for_jobs=True)),
        builds_folder=Path(f"{venv.location(ROOT)}.d"),
        venv=folder,
        environment=evaluation_environment(os.environ, ROOT),
        data_sets={task: known[task] for task in tasks if task in known},
    )
