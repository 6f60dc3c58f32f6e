"""Look before GPU hours are spent: would an evaluation work here? One line each, `ok` or what to do.

    python -m fast_dllm.doctor --task gsm8k,mmlu

Exit status: 0 (warnings included), 1 when something would make a job fail, 2 for a wrong option. --quick is what
sbatch/run.sh asks before it submits: no network, no packages needed, a moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fast_dllm.doctor.checks import (
    DATA_SETS_FILE,
    GIB,
    QUICK_CHECKS,
    DataSet,
    Finding,
    Situation,
    check_data_sets,
    check_disk,
    check_model,
    check_venv,
    damaged_model_files,
    how_to_get_access,
    missing_model_files,
    read_situation,
)
from fast_dllm.doctor.cluster import check_account, check_purge, check_quota, check_slurm, gpu_of_jobs, keep
from fast_dllm.errors import OneLineParser, UsageError, line_of
from fast_dllm.spec.files import write_json

if TYPE_CHECKING:
    from packaging.markers import Marker
    from packaging.requirements import Requirement

NETWORK_SECONDS = 10
CONTEXT_BYTES = GIB // 2  # CUDA's own share of a GPU's memory
WORK_BYTES = 2 * GIB  # that, caches and activations of one long question


# -- Python and packages -----------------------------------------------------------------------------------------------
def check_python(situation: Situation) -> Iterator[Finding]:
    """This Python and its packages against pyproject.toml, lm_eval's extras included."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((situation.root / "pyproject.toml").read_text())["project"]
    version = ".".join(map(str, sys.version_info[:3]))
    if version in SpecifierSet(project["requires-python"]):
        yield Finding("ok", f"Python {version}: {sys.prefix}")
    else:
        yield Finding(
            "fail", f"Python {version}: {project['requires-python']} is needed; bash sbatch/venv.sh finds one"
        )
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate()]
    faults = list(package_faults(wanted))
    if faults:
        build = "bash sbatch/venv.sh, then activate what it prints"
        yield Finding("fail", f"packages: {'; '.join(faults)}; {build}")
    else:
        yield Finding("ok", f"packages: {', '.join(f'{one.name} {metadata.version(one.name)}' for one in wanted)}")


def package_faults(wanted: list[Requirement]) -> Iterator[str]:
    """What is absent or outside its range; a requirement's extras are followed into that package's requirements."""
    from packaging.requirements import Requirement

    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield f"{one.name} is not installed"
            continue
        if not one.specifier.contains(version, prereleases=True):
            yield f"{one.name} {version} is not {one.specifier}"
        for extra in one.extras:
            parts = [Requirement(text) for text in metadata.requires(one.name) or ()]
            yield from package_faults([part for part in parts if part.marker and belongs_to(extra, part.marker)])


def belongs_to(extra: str, marker: Marker) -> bool:
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


# -- GPU and number format ---------------------------------------------------------------------------------------------
def weight_count(situation: Situation) -> int | None:
    """How many weights the model has, from its configuration alone; None while that is not here."""
    import torch

    from fast_dllm.network.config import read_config
    from fast_dllm.network.model import FastDLLMForCausalLM

    folder = situation.model_folder
    if "config.json" in missing_model_files(folder) or damaged_model_files(folder):
        return None  # check_model tells
    try:
        config = read_config(str(folder))
    except UsageError:
        return None
    with torch.device("meta"):
        return sum(weight.numel() for weight in FastDLLMForCausalLM(config).parameters())


def check_gpu(situation: Situation) -> Iterator[Finding]:
    """The device and dtype that fast_dllm.network.devices picks, whether this torch has code for it, and its memory."""
    import torch

    from fast_dllm.network.devices import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype("auto", device)
    count = weight_count(situation)
    weights = None if count is None else count * dtype.itemsize
    needs = (
        "the weights' size is not known before the model is here and whole"
        if weights is None
        else f"{weights / GIB:.1f} GiB of weights"
    )
    if device.type == "cpu":
        yield from findings_without_gpu(situation, weights, f"{str(dtype)[6:]}, {needs}")
        return
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    name = f"GPU {properties.name}, capability {capability[0]}.{capability[1]}"
    built_for = torch.cuda.get_arch_list()
    if not runs_on(capability, built_for):
        yield Finding(
            "fail",
            f"{name}: torch {torch.__version__} has code for {' '.join(built_for)} only; another GPU (SBATCH_GRES)",
        )
        return
    memory = f"{properties.total_memory / GIB:.1f} GiB for {needs} in {str(dtype)[6:]}"
    if weights is None or weights + WORK_BYTES <= properties.total_memory:
        yield Finding("ok", f"{name}: {memory}")
    elif weights + CONTEXT_BYTES > properties.total_memory:
        yield Finding("fail", f"{name}: {memory} do not fit; another GPU (SBATCH_GRES)")
    else:
        yield Finding("warn", f"{name}: {memory} leaves little for long questions; a larger GPU (SBATCH_GRES) is safer")


def runs_on(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a GPU runs one of these: sm_XY runs on X.Y and X's later minor versions, compute_XY on all later ones."""
    for target in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)", target)
        if match:
            major, minor = int(match[2]), int(match[3])
            if (major, minor) <= capability and (match[1] == "compute" or major == capability[0]):
                return True
    return False


def findings_without_gpu(situation: Situation, weights: int | None, needs: str) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if situation.model == "tiny":
        yield Finding("ok", f"no GPU: the embedded model runs on the CPU ({needs})")
    elif shutil.which("sbatch"):
        yield Finding(
            "warn", f"no GPU on this node; jobs ask for {gpu_of_jobs(situation)}. In an salloc the doctor checks theirs"
        )
    elif weights is not None and weights > memory:
        yield Finding("fail", f"no GPU, and {memory / GIB:.0f} GiB of memory for {needs}; --model tiny runs on the CPU")
    else:
        yield Finding("warn", f"no GPU: on the CPU ({needs}) a benchmark takes weeks; --model tiny is for trying out")


# -- the hub -----------------------------------------------------------------------------------------------------------
def ask_hub(kind: str, path: str) -> Finding:
    """Whether the hub lets this account read a "model" or "dataset"."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    what = f"{'data set' if kind == 'dataset' else 'model'} {path}"
    get_session().timeout = NETWORK_SECONDS
    try:
        HfApi().auth_check(path, repo_type=kind)
    except GatedRepoError:
        return Finding("fail", f"{what}: gated, and this account may not read it; {how_to_get_access(path, kind)}")
    except RepositoryNotFoundError:
        return Finding("fail", f"{what}: the hub has none of that name, or it is private to others")
    except (HTTPError, OSError) as error:
        return Finding("fail", f"{what}: not in the cache, and the hub does not answer ({line_of(error)})")
    return Finding(
        "warn", f"{what}: not in the cache; the hub gives it out, bash sbatch/prefetch.sh fetches it once for all jobs"
    )


def data_sets_of(tasks: tuple[str, ...]) -> dict[str, frozenset[DataSet]]:
    """The data sets that lm_eval's definitions of `tasks` name, groups and tags followed; nothing is downloaded."""
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
    """With every task's data sets and the hub to ask. Kept in the scripts' venv, where the quick checks find them."""
    found = data_sets_of(situation.tasks)
    if situation.venv and Path(sys.prefix).samefile(situation.venv):
        known = {**situation.data_sets, **found}
        content = {task: sorted([data.path, data.name] for data in needed) for task, needed in known.items()}
        write_json(situation.venv / DATA_SETS_FILE, content)
    return dataclasses.replace(situation, data_sets=found, reach=None if situation.offline else ask_hub)


def check_sentences(situation: Situation) -> Iterator[Finding]:
    if "ifeval" in situation.tasks:
        from fast_dllm.evaluate.task_loading import find_sentence_data

        try:
            yield Finding("ok", f"nltk's sentence data for ifeval: {find_sentence_data()}")
        except UsageError as error:
            yield Finding("fail", str(error))


THOROUGH_CHECKS = (
    check_python, check_gpu, check_venv, check_model, check_data_sets, check_sentences, check_disk, check_quota,
    check_account, check_slurm, check_purge,
)  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------
def thorough_findings(situation: Situation) -> Iterator[Finding]:
    needed = ["packaging", "torch", "transformers", "lm_eval", "datasets", "huggingface_hub"]
    if sys.version_info < (3, 11):
        needed.append("tomli")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        where = situation.venv or "what bash sbatch/venv.sh prints"
        yield Finding(
            "fail", f"this Python ({sys.prefix}) has no {', '.join(absent)}; source {where}/bin/activate first"
        )
        yield from quick_findings(situation)
        return
    situation = learn_data_sets(situation)
    for check in THOROUGH_CHECKS:
        yield from check(situation)


def quick_findings(situation: Situation) -> Iterator[Finding]:
    for check in QUICK_CHECKS:
        yield from check(situation)


def main() -> None:
    parser = OneLineParser(prog="doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gsm8k", metavar="T[,T]", help="tasks to be evaluated (default gsm8k)")
    parser.add_argument("--model", default="", help="tiny, a folder or a hub id (default: the published 7B)")
    parser.add_argument("--quick", action="store_true", help="only what needs no network and no packages")
    parser.add_argument("--keep", action="store_true", help="touch the files of model, data and venv against a purge")
    try:
        arguments = parser.parse_args()
        situation = read_situation(arguments.task.split(","), arguments.model)
    except UsageError as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        sys.exit(2)
    os.environ.update(situation.environment)  # cluster.env's, before a library reads them
    failed = False
    look = keep if arguments.keep else quick_findings if arguments.quick else thorough_findings
    for finding in look(situation):
        print(f"{finding.level:4} {finding.text}", flush=True)
        failed = failed or finding.level == "fail"
    sys.exit(failed)


if __name__ == "__main__":
    main()
