"""benchmarks.full_size at a small shape: it writes a checkpoint of the published form, and removes it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

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
