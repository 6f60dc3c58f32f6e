"""benchmarks.full_size at a small shape: it writes a checkpoint of the published form, and removes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_models import ROOT

from benchmarks.full_size import checkpoint, shards_of
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM


def options(shared, tmp_path, **changes):
    files = shared / "reference" / "fast_dllm_v2_7b"
    return SimpleNamespace(folder=tmp_path, files=files, shape="tiny", shards=3, **changes)


def test_a_sharded_checkpoint_with_tied_weights_loads_and_is_removed(shared, tmp_path):
    with checkpoint(options(shared, tmp_path)) as (folder, written):
        assert written["shards"] == len(list(folder.glob("*.safetensors"))) > 1
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert "lm_head.weight" not in weight_map
        model = load_model(str(folder), "cpu", "bfloat16")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert sum(each.numel() * each.element_size() for each in model.parameters()) == written["bytes"]
        layer = model.layer(2)
        assert layer.input_layernorm.weight.eq(1).all()
        assert layer.self_attn.q_proj.bias.eq(0).all()
        assert 0.015 < float(layer.mlp.down_proj.weight.float().std()) < 0.025
    assert list(tmp_path.iterdir()) == []


def test_the_7b_is_divided_as_the_published_one(shared):
    """Each tensor is in the shard of the published index."""
    index = shared / "reference" / "fast_dllm_v2_7b" / "model.safetensors.index.json"
    with torch.device("meta"):
        model = FastDLLMForCausalLM(FastDLLMConfig(), randomise=False)
    shards = shards_of({name: tensor.shape for name, tensor in model.state_dict().items()}, index, 2)
    published = json.loads(index.read_text())["weight_map"]
    assert {name: file for file, names in shards.items() for name in names} == published


@pytest.mark.slow
def test_one_question_is_answered_and_each_step_has_its_time(shared, tmp_path):
    files, data = shared / "reference" / "fast_dllm_v2_7b", ROOT / "tests" / "fixtures" / "hub"
    words = ["--folder", tmp_path, "--shape", "tiny", "--files", files, "--data", data, "--threshold", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.full_size", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["write"]["bytes"] < report["load"]["peak_bytes"]
    steps = report["answer"]["steps"]
    assert steps[0]["kind"] == "prefill"
    assert all(step["ms"] > 0 for step in steps)
    assert sum(step["unmasked"] for step in steps) >= report["answer"]["new_tokens"] > 0
    assert list(tmp_path.iterdir()) == []
