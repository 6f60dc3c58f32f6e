"""What many tests share and is no fixture: folders, and the golden models of the reference implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Oracle, assert_float32_of
from safetensors.torch import load_file
from torch import Tensor

from fast_dllm.decode import experiments
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.transcripts import GOLDEN
from fast_dllm.transcripts import GOLDEN_MODELS as GOLDEN_MODELS
from fast_dllm.transcripts import golden_model as golden_model

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SUBSETS = ("first", "middle", "last")


def golden_json(name: str) -> list[dict]:
    return json.loads((GOLDEN / name).read_text())


def few_layers(count: int = 6) -> FastDLLMForCausalLM:
    """The first layers of tiny36 and its head: several times as fast, for what does not depend on the network."""
    model = golden_model("tiny36")
    del model.model.layers[count:]
    model.config.num_hidden_layers = count
    return model


def eager(model: FastDLLMForCausalLM, num_rows: int, max_length: int, block_size: int = 32) -> EagerExecutor:
    """Forwards module by module over an empty cache."""
    return EagerExecutor(model, model.new_cache(num_rows, max_length, block_size))


def generate(model, prompts, **settings):
    """The active policy's answers."""
    return experiments.load(None).generate(model, prompts, **settings)


def denoise(model, prompts, **settings):
    return experiments.load(None).denoise(model, prompts, **settings)


def in_each_subset(cases: list) -> list:
    """(name, case, layer subset) of pytest's (name, case). Of each case one subset, in turn; the two others are slow.

    The cases come in threes, of k = 1, 2 and 3; each of these meets every subset.
    """
    return [
        pytest.param(*each.values, subset, id=f"{each.id}-{subset}", marks=[] if turn == number else pytest.mark.slow)
        for index, each in enumerate(cases)
        for turn in [(index + index // 3) % len(SUBSETS)]
        for number, subset in enumerate(SUBSETS)
    ]


@cache
def oracle(name: str) -> Oracle:
    return Oracle(GOLDEN / f"{name}.config.json", GOLDEN / f"{name}.safetensors")


@cache
def golden_forwards(name: str) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """Batches of token ids; all their logits in a row, in float64 and as the reference computed them in float32."""
    tensors = load_file(GOLDEN / f"{name}.forward.safetensors")
    batches = [tensors[key] for key in sorted(tensors) if key.startswith("ids_")]
    truth = [oracle(name).logits(ids) for batch in batches for ids in batch.tolist()]
    reference = [tensors[key] for key in sorted(tensors) if key.startswith("logits_")]
    return batches, np.concatenate(truth).ravel(), torch.cat([x.flatten() for x in reference]).numpy()


def assert_forward_is_the_references(name: str, forward: Callable[[Tensor], Tensor]) -> None:
    """`forward` (token ids -> logits) computes in float32 what the reference computed, on whatever CPU."""
    batches, truth, reference = golden_forwards(name)
    with torch.inference_mode():
        got = torch.cat([forward(batch).flatten() for batch in batches]).numpy()
    assert_float32_of(truth, got, reference)
