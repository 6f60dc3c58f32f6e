"""Files of a checkpoint that ask for another network, or are damaged: honoured, or refused in one line before memory
is taken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from golden_models import ROOT
from safetensors.torch import load_file, save_file
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

from fast_dllm.errors import DataError, UsageError
from fast_dllm.network import chat_template, config, loading
from fast_dllm.network.config import read_config
from fast_dllm.network.loading import TINY_MODEL, load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import load_tokenizer, render
from fast_dllm.spec.checkpoint import CONFIG_FILE, INDEX_FILE

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


class _Gone:
    """Stands for a field that the file lacks; has the same name in every process, for the names of tests."""

    def __repr__(self) -> str:
        return "GONE"


GONE = _Gone()  # the value of a field that is taken out


@pytest.fixture
def folder(random_model, tmp_path) -> Path:
    """A copy of a random model's folder."""
    return Path(shutil.copytree(random_model, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not GONE}))


def refusal(folder: Path) -> str:
    """What the tokenizer's loading and the model's say, which is the same one line."""
    lines = []
    for load in (load_tokenizer, load_model):
        with pytest.raises(UsageError) as raised:
            load(str(folder))
        lines.append(str(raised.value))
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    assert str(folder) in lines[0]
    return lines[0]


# -- what transformers 5 writes ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def qwen2(request) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, tie_word_embeddings=request.param,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def as_fast_dllm(qwen2: Qwen2ForCausalLM, folder: Path, **changes: object) -> FastDLLMForCausalLM:
    """transformers' saved copy under this project's model type. Blocks of one position make attention causal."""
    qwen2.save_pretrained(folder)
    change_config(folder, model_type="Fast_dLLM_Qwen", bd_size=1, **changes)
    return load_model(str(folder), "cpu")


def greedy_tokens(model: Qwen2ForCausalLM | FastDLLMForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_copy_that_transformers_5_saved_gives_qwen2s_tokens(qwen2, tmp_path):
    model = as_fast_dllm(qwen2, tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / CONFIG_FILE).read_text()), "transformers 5 nests it"
    assert model.config.rope_theta == 1e4
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, qwen2(ids).logits, atol=1e-3, rtol=1e-4)
    prompt = list(range(3, 83))
    assert greedy_tokens(model, prompt, 48) == greedy_tokens(qwen2, prompt, 48)


def test_that_comparison_sees_a_rope_theta_that_is_not_read(qwen2, tmp_path):
    other = as_fast_dllm(qwen2, tmp_path, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    prompt = list(range(3, 83))
    assert greedy_tokens(other, prompt, 48) != greedy_tokens(qwen2, prompt, 48)


# -- config.json: each field is honoured or refused --------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": GONE, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"type": "default"}, "head_dim": 8, "layer_types": ["full_attention"] * 36},
        {"attention_bias": True, "mlp_bias": False, "attention_dropout": 0.1, "torch_dtype": "bfloat16"},
        {"use_sliding_window": False, "sliding_window": 4096, "torch_dtype": GONE, "dtype": "float16"},
    ],
    ids=str,
)
def test_a_config_of_the_same_network_loads(folder, changes):
    change_config(folder, **changes)
    model = load_model(str(folder), "cpu")
    assert (model.config.rope_theta, model.config.head_dim) == (1e6, 8)
    assert load_tokenizer(str(folder)).mask_token_id == 319


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": YARN}, "rope_scaling: RoPE scaling of type 'yarn'"),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}}, "rope_parameters: RoPE scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "'factor' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "'mrope_section'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "they must be equal"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a number"),
        ({"rope_theta": GONE}, "lacks rope_theta"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"head_dim": 16}, "head_dim 16 is not supported"),
        ({"attention_bias": False}, "attention_bias False"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types must be"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"tie_word_embeddings": GONE}, "lacks tie_word_embeddings"),
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"num_key_value_heads": 3}, "must each divide"),
        ({"hidden_size": 36}, "it must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"bd_size": "32"}, "bd_size must be a whole number"),
        *(({"hidden_size": size}, "hidden_size must be a whole number from 1") for size in (0, "32", True, 10**12)),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1000"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be"),
    ],
    ids=str,
)
def test_a_config_of_another_network_is_refused_before_memory_is_taken(folder, changes, named, monkeypatch):
    monkeypatch.setattr(loading, "FastDLLMForCausalLM", None)  # nothing is built
    change_config(folder, **changes)
    assert named in refusal(folder)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings of fast_dllm/network/config.py. caplog misses them once another test has set up logging."""
    lines: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_an_unknown_field_is_named_in_a_warning(folder, warnings):
    load_model(str(folder), "cpu")
    load_model(str(TINY_MODEL), "cpu")
    assert warnings == []
    change_config(folder, logit_scale=0.5)
    load_model(str(folder), "cpu")
    assert warnings == [f"config.json of {folder}: unknown fields have no effect: logit_scale"]


def test_the_published_config_loads_without_a_warning(shared, warnings):
    published = read_config(str(shared / "reference" / "fast_dllm_v2_7b"))
    assert warnings == []
    assert (published.rope_theta, published.head_dim, published.bd_size) == (1e6, 128, 32)


@pytest.mark.parametrize(
    "text",
    ["[]", "nope", "[" * 100_000, '{"hidden_size": 1' + "0" * 5000 + "}", '{"rms_norm_eps": NaN}'],
    ids=lambda text: text[:12],
)
def test_a_config_that_is_no_object_is_one_line(folder, text):
    (folder / CONFIG_FILE).write_text(text)
    assert "config.json is not a JSON object" in refusal(folder)


# -- weights -----------------------------------------------------------------------------------------------------------
def refused_weights(folder: Path, monkeypatch) -> str:
    """The line of a refusal that comes before memory is taken on a device."""
    monkeypatch.setattr(loading, "_read_weights", None)
    with pytest.raises(UsageError) as raised:
        load_model(str(folder), "cpu")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ([], "is not a JSON object"),
        ({"weight_map": {}}, "weight_map must be an object"),
        ({"weight_map": {"lm_head.weight": "../other/model.safetensors"}}, "in the same folder"),
        ({"weight_map": {"lm_head.weight": "model.bin"}}, "in the same folder"),
        ({"weight_map": {"lm_head.weight": "absent.safetensors"}}, "absent.safetensors"),
    ],
    ids=str,
)
def test_an_index_that_leads_elsewhere_or_is_none_is_refused(folder, index, named, monkeypatch):
    (folder / "../other").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "../other")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert named in refused_weights(folder, monkeypatch)


def test_sizes_that_the_weights_do_not_have_take_no_memory(folder, monkeypatch):
    change_config(folder, vocab_size=4096, hidden_size=64)
    assert "of shape [320, 32] instead of [4096, 64]" in refused_weights(folder, monkeypatch)
    change_config(folder, vocab_size=2**22, hidden_size=2**16)  # a terabyte
    assert "its weights take" in refused_weights(folder, monkeypatch)


def test_weights_that_are_no_floating_point_numbers_are_refused(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "has model.norm.weight as I8" in refused_weights(folder, monkeypatch)


def test_a_tensor_in_two_files_is_refused(folder, monkeypatch):
    shutil.copy(folder / "model.safetensors", folder / "second.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}))
    assert "in two files" in refused_weights(folder, monkeypatch)


def test_a_tied_head_may_be_in_the_file_where_it_is_the_embedding(folder):
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        load_model(str(folder), "cpu")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_model(str(folder), "cpu").lm_head.weight, tensors["lm_head.weight"])


# -- every program -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "run_chatbot.py --model {} --once Hi",
        "eval.py --model fast_dllm_v2 --tasks toy_math --limit 1 --model_args model_path={}",
        "-m fast_dllm.drift --model {} --task toy_math --limit 1",
    ],
    ids=["chat", "eval", "drift"],
)
def test_every_program_refuses_another_network_in_one_line(folder, command):
    change_config(folder, rope_theta=GONE, rope_parameters=YARN | {"rope_theta": 1e6})
    words = [sys.executable, *(word.format(folder) for word in command.split())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # without a network eval.py says so before
    assert line.endswith("config.json: rope_parameters: RoPE scaling of type 'yarn' is not supported; the network has "
                         "'default'")  # fmt: skip


# -- chat templates ----------------------------------------------------------------------------------------------------
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}X{% endfor %}{% endfor %}"


def set_template(folder: Path, template: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "template",
    [
        LOOP.replace("X", "text" * 1000),
        "{{ 7 ** (messages|length * 10 ** 9) }}",
        "{{ 'x' * (messages|length * 10 ** 11) }}",
    ],
    ids=["growing loop", "power", "memory"],
)
def test_an_endless_chat_template_is_refused_in_bounded_time(folder, template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    set_template(folder, template)
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"the chat template of .* does not end within") as raised:
        load_tokenizer(str(folder))
    assert time.monotonic() - began < 20
    assert "\n" not in str(raised.value)


def test_a_chat_template_that_refuses_a_conversation_is_one_line_when_it_does(folder):
    set_template(folder, "{{ raise_exception('no\nsystem message') if messages[0].role == 'system' else 'text' }}")
    tokenizer = load_tokenizer(str(folder))
    assert render(tokenizer, [{"role": "user", "content": "Hi"}], True) == "text"
    with pytest.raises(UsageError, match=r"fails: no system message$"):
        render(tokenizer, [{"role": "system", "content": "Hi"}], True)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_model_that_the_hub_may_have_is_no_wrong_input(monkeypatch, load):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'somebody/some_model': the hub does not answer"):
        load("somebody/some_model")
    with pytest.raises(UsageError, match="cannot load model '/nowhere'"):
        load("/nowhere")
