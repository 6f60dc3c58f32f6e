"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from golden_models import GOLDEN_MODELS, SHARED, few_layers, golden_model
from random_model import save_random_model

from fast_dllm.network.model import FastDLLMForCausalLM

pytest_plugins = ["browser_page"]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


# With `--dist loadfile --no-loadscope-reorder` a process takes a whole file, because its tests share what they set up
# (see `pytest_xdist_make_scheduler`). Files that take minutes begin first. The tests of the files APART share nothing,
# so each is given out by itself, at the end: no process waits long for the last one.
LONG = (
    "page_views",
    "page",
    "page_safety",
    "eval",
    "engine",
    "graphs",
    "kills",
    "new_experiment",
    "shards",
    "experiments_contract",
)
LONG += ("decoding", "tiny_model", "baseline", "transcripts", "golden", "doctor", "compiled")
APART = ("jobs", "runner", "runner_keeps", "runner_limits", "runner_matrix", "runner_shards", "setup_scripts", "venv")
APART += ("locks", "snapshot", "rehearsal")
ORDER = {f"test_{name}.py": place for place, name in enumerate(LONG)} | {f"test_{name}.py": 100 for name in APART}


@pytest.hookimpl(tryfirst=True)  # before -m picks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    met: Counter[tuple] = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker and not item.get_closest_marker("slow"):
            key = (item.path, getattr(item, "originalname", item.name))
            if met[key] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            met[key] += 1
    items.sort(key=lambda item: -1 if item.path.parent.name == "slurm" else ORDER.get(item.path.name, 50))


def group_of(nodeid: str) -> str:
    """Tests of one group are run by one process: those of a file; one Slurm and one browser serve several files."""
    path = nodeid.partition("::")[0]
    folder, _, name = path.rpartition("/")
    if folder.endswith("slurm"):
        return "slurm"
    if name.startswith("test_page"):
        return "page"
    return nodeid if ORDER.get(name) == 100 else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile` by the groups of `group_of`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # only where pytest-xdist is in use

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return LoadGroups(config, log)


@pytest.fixture(scope="session")
def golden_models() -> dict[str, FastDLLMForCausalLM]:
    """The reference implementation's two small random models, by name."""
    return {name: golden_model(name) for name in GOLDEN_MODELS}


@pytest.fixture(scope="session")
def tiny36(golden_models) -> FastDLLMForCausalLM:
    return golden_models["tiny36"]


@pytest.fixture(scope="session")
def short_model() -> FastDLLMForCausalLM:
    return few_layers()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the published tokenizer and GSM8K, which are others' and stay outside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ beside this checkout (published tokenizer, GSM8K)")
    return SHARED


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A folder that loads like the published checkpoint: the golden 36-layer weights and a byte-level tokenizer."""
    return save_random_model(tmp_path_factory.mktemp("models") / "random36")


@pytest.fixture(scope="session")
def short_random(tmp_path_factory) -> Path:
    """The same with six layers, for what does not depend on the network and reuses no layers."""
    return save_random_model(tmp_path_factory.mktemp("models") / "random6", num_layers=6)
