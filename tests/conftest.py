"""Fixtures that many tests share: the golden models and the outside material that may be absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from random_model import save_random_model
from safetensors.torch import load_file

from fast_dllm.config import FastDLLMConfig
from fast_dllm.model import FastDLLMForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"
GOLDEN_MODELS = ("tiny28", "tiny36")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def golden_json(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text())


def golden_model(name: str) -> FastDLLMForCausalLM:
    model = FastDLLMForCausalLM(FastDLLMConfig(**golden_json(f"{name}.config.json")))
    missing, unexpected = model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    return model.eval()


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
