"""What many tests share and is no fixture: folders, and the golden models of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from fast_dllm import experiments
from fast_dllm.config import FastDLLMConfig
from fast_dllm.model import FastDLLMForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"
GOLDEN_MODELS = ("tiny28", "tiny36")


def golden_json(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text())


def golden_model(name: str) -> FastDLLMForCausalLM:
    model = FastDLLMForCausalLM(FastDLLMConfig(**golden_json(f"{name}.config.json")))
    missing, unexpected = model.load_state_dict(load_file(GOLDEN / f"{name}.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    return model.eval()


def generate(model, prompts, **settings):
    """The active policy's answers."""
    return experiments.load(None).generate(model, prompts, **settings)


def denoise(model, prompts, **settings):
    return experiments.load(None).denoise(model, prompts, **settings)
