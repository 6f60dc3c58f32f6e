"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from golden_models import GOLDEN_MODELS, SHARED, golden_model
from random_model import save_random_model

from fast_dllm.network.model import FastDLLMForCausalLM

pytest_plugins = ["browser_page"]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


# Files of minutes. They begin first (with xdist's --no-loadscope-reorder), else one of them runs alone at the end.
LONG = ("jobs", "runner_shards", "page_views", "page", "eval", "engine", "graphs", "kills", "new_experiment", "shards")
LONG += ("experiments_contract", "decoding", "tiny_model", "baseline", "transcripts", "golden", "runner", "doctor")
LONG += ("compiled",)


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
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def golden_models() -> dict[str, FastDLLMForCausalLM]:
    """The reference implementation's two small random models, by name."""
    return {name: golden_model(name) for name in GOLDEN_MODELS}


@pytest.fixture(scope="session")
def tiny36(golden_models) -> FastDLLMForCausalLM:
    return golden_models["tiny36"]


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
