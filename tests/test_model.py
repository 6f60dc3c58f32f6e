"""Loading: the published checkpoint's names and tokenizer, dtypes, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_models import eager
from random_model import save_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fast_dllm.errors import UsageError
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.devices import pick_device, pick_dtype
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import load_tokenizer, special_ids


def test_the_published_checkpoints_tensor_names_are_the_models_and_no_others(shared):
    folder = shared / "reference" / "fast_dllm_v2_7b"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(config, FastDLLMConfig)
    with torch.device("meta"):
        model = FastDLLMForCausalLM(config)
    assert set(model.state_dict()) == set(index["weight_map"])
    num_bytes = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    assert num_bytes == index["metadata"]["total_size"]


def test_the_published_tokenizer_loads_with_its_template_and_special_ids(shared):
    folder = shared / "reference" / "fast_dllm_v2_7b"
    tokenizer = load_tokenizer(str(folder))
    ids = special_ids(tokenizer)
    assert (ids.mask, ids.stop, ids.pad) == (151665, 151645, 151643)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("|<MASK>|") == [ids.mask]


def test_a_saved_model_loads_again_and_computes_the_same(random_model, tmp_path):
    model = load_model(str(random_model), "cpu")
    model.save_pretrained(tmp_path / "copy")
    again = load_model(str(tmp_path / "copy"), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        # not bit for bit: how a file's weights are aligned in memory may decide how they are summed
        torch.testing.assert_close(model(ids).logits, again(ids).logits, atol=1e-3, rtol=0)
    assert again.config.bd_size == 32
    assert again.config.rope_theta == 1e6


def test_sharded_checkpoints_load(random_model, tmp_path):
    model = load_model(str(random_model), "cpu")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = load_model(str(tmp_path / "shards"), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tied_head_shares_the_embedding(tmp_path):
    model = load_model(str(save_random_model(tmp_path / "tied", "tiny28")), "cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def damaged(random_model: Path, folder: Path, change) -> str:
    save_random_model(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.7.mlp.up_proj.weight"), r"lacks tensor model\.layers\.7\.mlp\.up_proj\.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight of shape \[31\] instead of \[32\]",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_wrong_tensor_is_named(random_model, tmp_path, change, message):
    with pytest.raises(UsageError, match=message) as raised:
        load_model(damaged(random_model, tmp_path / "model", change), "cpu")
    assert "\n" not in str(raised.value)


def test_a_truncated_file_a_missing_folder_and_another_models_config_are_one_line(random_model, tmp_path):
    folder = save_random_model(tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for source in (folder, tmp_path / "nowhere", other):
        with pytest.raises(UsageError) as raised:
            load_model(str(source), "cpu")
        assert "\n" not in str(raised.value)
        assert source.name in str(raised.value)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_auto_dtype_follows_the_gpus_compute_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda", 0)) == expected
    assert pick_dtype("float32", torch.device("cuda", 0)) == torch.float32
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_device_that_is_not_there_is_refused():
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=device):
            pick_device(device)


def test_a_long_prompt_is_prefilled_in_chunks_with_equal_logits(tiny36):
    ids = torch.randint(3, 318, (1, 1536), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        executor = eager(tiny36, 1, 1536)
        (logits,) = executor.prefill([0], ids.tolist(), read=[ids.shape[1] - 1])
        torch.testing.assert_close(logits, tiny36(ids).logits[0, -1], atol=1e-3, rtol=0)
    assert executor.cache.lengths == [1536]


def test_more_positions_than_the_model_has_are_refused(tiny36):
    with pytest.raises(UsageError, match="4096 positions, the model has 2048"):
        tiny36.new_cache(1, 4096, 32)
    with pytest.raises(ValueError, match="whole blocks of 32"):
        eager(tiny36, 1, 64).prefill([0], [[5] * 40])
