"""What can be said in a moment about whether a job will work: no network, and nothing but the standard library.

sbatch/run.sh asks before it submits, on a login node whose Python may have none of the packages. fast_dllm.doctor asks
the same and more.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fast_dllm.errors import UsageError
from fast_dllm.runner import venv
from fast_dllm.runner.environment import evaluation_environment, load_cluster_settings
from fast_dllm.spec.checkpoint import CONFIG_FILE, INDEX_FILE, config_fault, read_object, weight_files
from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.files import read_json
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import experiments, resolve_model
from fast_dllm.spec.tasks import TASKS, check_task, task_of

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30
MODEL_SPACE = 20 * GIB  # what sbatch/prefetch.sh asks for: 15 GB of weights, and data sets
LOW_SPACE = 1 * GIB
# The data sets whose authors let nobody in without a token.
GATED = frozenset(task.gated for task in TASKS.values() if task.gated)
DATA_SETS_FILE = "data_sets.json"  # in the venv, whose lm_eval it describes; written by fast_dllm.doctor


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


def read_situation(tasks: list[str], model: str, root: Path = ROOT) -> Situation:
    """The situation of a job on `tasks` with `model`. Raises UsageError with the scripts' own words for a wrong one."""
    for task in tasks:
        check_task(task)
    model = resolve_model(model or DEFAULT_MODEL, root)
    load_cluster_settings(root)
    folder = venv.find_complete(root, root, for_jobs=True)
    known = {}
    if folder and (record := folder / DATA_SETS_FILE).is_file():
        known = {
            task: frozenset(DataSet(*one) for one in found) for task, found in json.loads(record.read_text()).items()
        }
    for task in tasks:
        described = task_of(task)
        if task not in known and described and described.gated:
            known[task] = frozenset({DataSet(described.gated)})
    return Situation(
        root=root,
        tasks=tuple(dict.fromkeys(tasks)),
        model=model,
        builds=tuple(venv.builds_of(root, root, for_jobs=True)),
        builds_folder=Path(f"{venv.location(root)}.d"),
        venv=folder,
        environment=evaluation_environment(os.environ, root),
        data_sets={task: known[task] for task in tasks if task in known},
    )


def check_venv(situation: Situation) -> Iterator[Finding]:
    if situation.venv:
        yield Finding("ok", f"venv: {situation.venv}")
        return
    last = situation.builds[0] if situation.builds else None
    command = "bash sbatch/venv.sh"
    if venv.torch_build_wanted() != venv.torch_build_wanted(for_jobs=True):
        command = f"FAST_DLLM_TORCH={venv.CUDA} {command}"  # what a job on a GPU needs, not what this node would take
    if last and (last / venv.FAILED).exists():
        yield Finding("warn", f"venv: its last build failed, see {last}/build.log; {command} tries again")
    elif last and (last / venv.COMPLETE).exists():
        yield Finding("warn", f"venv: the interpreter of {last} is gone; {command} builds another")
    else:
        yield Finding("warn", f"venv: none for these requirements; the first job builds it, or now: {command}")


def missing_model_files(folder: Path) -> list[str]:
    """What a checkpoint's folder lacks: configuration, tokenizer, weights (of a sharded one every shard)."""
    index = folder / INDEX_FILE
    weights = []
    if index.is_file():
        try:
            weights = weight_files(read_object(index))
        except UsageError as error:
            return [f"a usable index of its weights ({error})"]
    names = [CONFIG_FILE, "tokenizer_config.json", *(weights or ["model.safetensors"])]
    missing = [name for name in names if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json or vocab.json")
    return missing


def damaged_model_files(folder: Path) -> list[str]:
    """What is there and cannot be what it should be: JSON that is none, weights with fewer or more bytes than their
    header counts."""
    faults = []
    for name in (CONFIG_FILE, "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            content, fault = read_json(path)
            faults += [f"{name} is not valid JSON: {fault}"] if content is None else []
    return faults + [
        f"{path.name} {fault}"
        for path in sorted(folder.glob("*.safetensors"))
        if path.is_file() and (fault := fault_of_weights(path))
    ]


def fault_of_weights(path: Path) -> str:
    """Of a safetensors file: eight bytes tell the header's length, the header where each tensor's bytes end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is cut off: {size:,} bytes, its header alone takes {8 + length:,}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return "has no readable header"
    whole = 8 + length + max(ends, default=0)
    return "" if size == whole else f"is {'cut off' if size < whole else 'too long'}: {size:,} bytes of {whole:,}"


def check_model(situation: Situation) -> Iterator[Finding]:
    folder, model = situation.model_folder, situation.model
    missing = missing_model_files(folder)
    if damaged := damaged_model_files(folder):
        more = f" (and {len(damaged) - 1} more faults)" if len(damaged) > 1 else ""
        yield Finding("fail", f"model {model}: {damaged[0]}{more}, in {folder}; remove it and fetch it again")
        return
    config, _ = read_json(folder / CONFIG_FILE)
    if config and (fault := config_fault(config)):
        yield Finding("fail", f"model {model}: {CONFIG_FILE}: {fault}")
        return
    if not missing:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        yield Finding("ok", f"model {model}: whole, {size / 1e9:.2f} GB of weights in {folder}")
        return
    lacks = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    fetch = f"bash sbatch/prefetch.sh --model {model}"
    if not situation.is_hub_model:
        yield Finding("fail", f"model {model}: {folder} lacks {lacks}")
    elif situation.offline:
        yield Finding("fail", f"model {model}: {folder} lacks {lacks}; HF_HUB_OFFLINE is set; online: {fetch}")
    else:
        free = shutil.disk_usage(existing(situation.hub_cache)).free
        if free < MODEL_SPACE:
            need = f"{MODEL_SPACE // GIB} GiB are needed in {situation.hub_cache}, {free / GIB:.1f} are free"
            yield Finding("fail", f"model {model}: not in the cache yet; {need}; set HF_HOME to a larger disk")
        elif situation.reach:
            yield situation.reach("model", model)
        else:
            yield Finding("warn", f"model {model}: the first job downloads it; {fetch} does it now")


def place_of_data(situation: Situation, data: DataSet) -> Path | None:
    """Where `datasets` finds a data set without the hub: a folder of its name, or the tables it made of it before."""
    if (situation.root / data.path).is_dir():
        return situation.root / data.path
    # its folder is <owner>___<name>, the name in snake case: IFEval -> if_eval
    wanted = data.path.replace("/", "___").lower().replace("_", "")
    for folder in situation.data_cache.glob("*___*"):
        if folder.name.lower().replace("_", "") == wanted and any(folder.glob(f"{data.name or '*'}/*/*/*.arrow")):
            return folder
    return None


def check_data_sets(situation: Situation) -> Iterator[Finding]:
    for task in situation.tasks:
        if task in situation.data_sets:
            yield from check_data_of_task(situation, task)
        elif situation.offline:
            look = f"python -m fast_dllm.doctor --task {task}"
            yield Finding("warn", f"data of {task}: HF_HUB_OFFLINE is set; {look} looks whether it is in the cache")


def check_data_of_task(situation: Situation, task: str) -> Iterator[Finding]:
    needed = situation.data_sets[task]
    absent = {data for data in needed if place_of_data(situation, data) is None}
    if not absent:
        here = ", ".join(sorted({data.path for data in needed})) or "made by the task itself"
        yield Finding("ok", f"data of {task}: {here}{f', {len(needed)} configurations' if len(needed) > 1 else ''}")
        return
    names = sorted(map(str, absent))
    what = f"data of {task}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    fetch = f"bash sbatch/prefetch.sh --task {task}"
    gated = sorted({data.path for data in absent} & GATED)
    if situation.offline:
        yield Finding("fail", f"{what}: not in {situation.data_cache}; HF_HUB_OFFLINE is set; online: {fetch}")
    elif gated and not situation.has_token:
        yield Finding("fail", f"{what}: gated and no token here; {how_to_get_access(gated[0], 'dataset')}")
    elif situation.reach:
        yield from (situation.reach("dataset", path) for path in sorted({data.path for data in absent}))
    else:
        yield Finding("warn", f"{what}: the first job downloads it; {fetch} does it now")


def how_to_get_access(path: str, kind: str) -> str:
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{path}"
    return f"accept its terms at {page}, then `hf auth login` (or HF_TOKEN)"


def existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_disk(situation: Situation) -> Iterator[Finding]:
    """That there is room, by writing: a quota does not show in the free space."""
    places = {
        "results": situation.root / "results",
        "logs": situation.root / "logs",
        "data cache": situation.data_cache,
        "venv": situation.builds_folder,
    }
    for name, path in places.items():
        if path.is_symlink() and not path.exists():
            target = os.readlink(path)
            yield Finding("fail", f"{name}: {path} leads to {target}, which is gone; mkdir -p {target}")
            continue
        folder = existing(path)
        free = shutil.disk_usage(folder).free
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            unused = name == "data cache" and not any(situation.data_sets.values())  # as far as is known
            fault = f"cannot write to {folder}: {error.strerror}; make room there or change the place"
            yield Finding("warn" if unused else "fail", f"{name}: {fault}")
            continue
        level, hint = ("warn", "; make room") if free < LOW_SPACE else ("ok", "")
        yield Finding(level, f"{name}: {free / GIB:.1f} GiB free in {folder}{hint}")


def check_experiments(situation: Situation) -> Iterator[Finding]:
    """That the experiments' own configurations can be read."""
    for name in experiments(situation.root):
        try:
            matrix_of(name, situation.root)
        except UsageError as error:
            yield Finding("warn", f"experiment {name}: {error}; run.sh refuses it")


QUICK_CHECKS = (check_venv, check_model, check_data_sets, check_disk, check_experiments)
