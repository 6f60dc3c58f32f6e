"""The bound on float32 forwards (tests/oracle.py) holds for every order of summation and for no wrong network."""

from __future__ import annotations

import pytest
import torch
from golden_models import GOLDEN_MODELS, assert_forward_is_the_references, golden_model
from torch import Tensor

from fast_dllm.network import model as network
from fast_dllm.network.cache import rope_tables
from fast_dllm.network.model import FastDLLMForCausalLM, RMSNorm

# Other orders of summation: what another kind of CPU would compute


def reordered(name: str, seed: int) -> FastDLLMForCausalLM:
    """The same function of the token ids with its hidden and MLP dimensions shuffled: every sum in another order."""
    generator = torch.Generator().manual_seed(seed)
    model = golden_model(name)
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if key.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            weights[key] = value[hidden]
        elif value.dim() == 2:
            weights[key] = value[:, hidden]
    for layer in range(model.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        order = torch.randperm(model.config.intermediate_size, generator=generator)
        for key in (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"):
            weights[key] = weights[key][order]
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, order]
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_every_order_of_summation_is_within_the_bound(name, seed):
    model = reordered(name, seed)
    assert_forward_is_the_references(name, lambda ids: model(ids).logits)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_sums_one_term_after_another_are_within_the_bound(name, monkeypatch):
    """The least exact order there is, which no library uses."""

    def linear(self, x: Tensor) -> Tensor:
        out = torch.zeros(self.out_features) if self.bias is None else self.bias
        for column in range(self.in_features):
            out = out + x[..., column, None] * self.weight[:, column]
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    model = golden_model(name)
    assert_forward_is_the_references(name, lambda ids: model(ids).logits)


# Planted faults, by configuration, weights or arguments where it can be: so they outlive a rewritten network


def caught(forward_of) -> None:
    for name in GOLDEN_MODELS:
        with pytest.raises(AssertionError, match="times the reference's"):
            assert_forward_is_the_references(name, forward_of(name))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 2e-6}, {"rope_theta": 1e6 + 100}, {"bd_size": 31}], ids=str)
def test_a_wrong_constant_is_caught(changes):
    def forward_of(name: str):
        model = golden_model(name, **changes)
        return lambda ids: model(ids).logits

    caught(forward_of)


def tables_rounded_to_bfloat16(positions: Tensor, config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(positions, config, torch.bfloat16)
    return cos.to(dtype), sin.to(dtype)


def tables_with_both_sines_positive(positions: Tensor, config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(positions, config, dtype)
    return cos, sin.chunk(2, dim=-1)[1].repeat(1, 2)


@pytest.mark.parametrize(
    "tables", [tables_rounded_to_bfloat16, tables_with_both_sines_positive], ids=lambda tables: tables.__name__
)
def test_wrong_rotary_tables_are_caught(monkeypatch, tables):
    monkeypatch.setattr(network, "rope_tables", tables)
    caught(lambda name: lambda ids: golden_model(name)(ids).logits)


def without(*names: str):
    """Biases left out, or norm weights left at one."""

    def change(model: FastDLLMForCausalLM) -> None:
        for name in names:
            model.get_parameter(name).data.fill_(1.0 if "norm" in name else 0.0)

    change.__name__ = " ".join(names)
    return change


@pytest.mark.parametrize(
    "change",
    [
        without("model.norm.weight"),
        without("model.layers.9.input_layernorm.weight"),
        without("model.layers.5.self_attn.k_proj.bias"),
    ],
    ids=lambda change: change.__name__,
)
def test_wrong_weights_are_caught(change):
    def forward_of(name: str):
        model = golden_model(name)
        change(model)
        return lambda ids: model(ids).logits

    caught(forward_of)


@pytest.mark.parametrize(
    "allowed",
    [
        pytest.param(lambda query, key: query // 32 + 1 >= key // 32, id="one block further"),
        pytest.param(lambda query, key: query // 32 == key // 32, id="own block alone"),
        pytest.param(lambda query, key: query >= key, id="causal"),
    ],
)
def test_a_wrong_mask_is_caught(allowed):
    def forward_of(name: str):
        model = golden_model(name)

        def forward(ids: Tensor) -> Tensor:
            positions = torch.arange(ids.shape[1])
            return model(ids, attention_mask=allowed(positions[:, None], positions)).logits

        return forward

    caught(forward_of)


# What float32 is for in a model of 16 bits: in float32 nobody sees a cast that is missing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_for_16_bits_are_float32s_rounded_once(dtype):
    config = golden_model("tiny36").config
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = rope_tables(positions, config, dtype)
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = positions.double()[:, None] * config.rope_theta**-pairs
    # half of what separates two numbers below 1, and what float32 loses of an angle of 2000
    allowed = torch.finfo(dtype).eps / 4 + 2e-4
    for table, truth in ((cos, angles.cos().repeat(1, 2)), (sin, torch.cat((-angles.sin(), angles.sin()), dim=-1))):
        assert (table.double() - truth).abs().max() <= allowed


def test_the_mean_square_of_16_bits_is_taken_in_float32():
    norm = RMSNorm(64, 1e-6).half()
    x = torch.linspace(100, 1000, 64).half()  # its squares are beyond float16
    truth = x.double() / x.double().square().mean().sqrt()
    assert (norm(x).double() / truth - 1).abs().max() <= torch.finfo(torch.float16).eps
