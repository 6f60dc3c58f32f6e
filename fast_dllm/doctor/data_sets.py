"""Checks of the data: each data set that a task names, the sentence data of ifeval, access on the hub."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from fast_dllm.doctor.situation import DATA_SETS_FILE, GATED, DataSet, Finding, Situation
from fast_dllm.errors import UsageError, line_of
from fast_dllm.spec.files import write_json
from fast_dllm.spec.tasks import packaged_data

NETWORK_SECONDS = 10


def place_of_data(situation: Situation, data: DataSet) -> Path | None:
    """Where a data set is on this machine, or None.

    That is a folder of its name, a Python package, or the tables that `datasets` has cached.
    """
    if (situation.root / data.path).is_dir():
        return situation.root / data.path
    packaged = packaged_data(data.path)
    if packaged is not None:
        return packaged
    # The cache's folder is <owner>___<name>, with the name in snake case: IFEval -> if_eval.
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


def ask_hub(kind: str, path: str) -> Finding:
    """A finding: whether the hub lets this account read a model or a data set. kind: "model" or "dataset"."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    what = _in_words(kind, path)
    get_session().timeout = NETWORK_SECONDS
    try:
        HfApi().auth_check(path, repo_type=kind)
    except GatedRepoError:
        return Finding("fail", f"{what}: gated, and this account may not read it; {how_to_get_access(path, kind)}")
    except RepositoryNotFoundError:
        return Finding("fail", f"{what}: the hub has none of that name, or it is private to others")
    except (HTTPError, OSError) as error:
        return Finding(
            "fail",
            f"{what}: not in the cache, and the hub does not answer ({line_of(error)}); where there is a network, "
            "bash sbatch/prefetch.sh with the same --task and --model fetches it",
        )
    return Finding(
        "warn", f"{what}: not in the cache; the hub gives it out, bash sbatch/prefetch.sh fetches it once for all jobs"
    )


def hub_is_silent(kind: str, path: str) -> Finding:
    """The finding where the hub could not be reached a moment ago. kind, path: as `ask_hub` takes them."""
    return Finding(
        "fail",
        f"{_in_words(kind, path)}: not in the cache, and the hub cannot be reached from here; where there is a "
        "network, bash sbatch/prefetch.sh with the same --task and --model fetches it",
    )


def _in_words(kind: str, path: str) -> str:
    return f"{'data set' if kind == 'dataset' else 'model'} {path}"


def data_sets_of(tasks: tuple[str, ...]) -> dict[str, frozenset[DataSet]]:
    """Task -> the data sets that lm_eval's definitions of it name, with groups and tags resolved. Downloads nothing."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from fast_dllm.evaluate.task_loading import find_tasks, task_configs

    index = find_tasks(EvaluatorConfig(tasks=list(tasks))).task_index
    return {
        task: frozenset(
            DataSet(config["dataset_path"], config.get("dataset_name"))
            for config in task_configs(index, task)
            if config.get("dataset_path")
        )
        for task in tasks
    }


def learn_data_sets(situation: Situation) -> Situation:
    """The situation with the data sets of all tasks and the hub to ask; stored in the venv for the quick checks."""
    from fast_dllm.evaluate.hub import prepare_hub_client

    is_silent = not situation.offline and prepare_hub_client()  # before lm_eval imports the hub's libraries
    data_sets = data_sets_of(situation.tasks)
    if situation.venv and Path(sys.prefix).samefile(situation.venv):
        known = {**situation.data_sets, **data_sets}
        content = {task: sorted([data.path, data.name] for data in needed) for task, needed in known.items()}
        write_json(situation.venv / DATA_SETS_FILE, content)
    reach = None if situation.offline else hub_is_silent if is_silent else ask_hub
    return dataclasses.replace(situation, data_sets=data_sets, reach=reach)


def check_sentences(situation: Situation) -> Iterator[Finding]:
    if "ifeval" in situation.tasks:
        from fast_dllm.evaluate.task_loading import find_sentence_data

        try:
            yield Finding("ok", f"nltk's sentence data for ifeval: {find_sentence_data()}")
        except UsageError as error:
            yield Finding("fail", str(error))
