"""benchmarks/roofline.py: its sums, and that docs/experiments.md shows what it prints."""

from __future__ import annotations

import sys

import pytest
import torch
from golden_models import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import roofline

from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.runner.roofline import PUBLISHED, type_of_card

SIZES = roofline.Sizes.of(FastDLLMConfig())


def test_the_document_shows_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline.py"])
    roofline.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2
    assert all(table.count("\n") > 5 for table in tables)
    document = (ROOT / "docs" / "experiments.md").read_text()
    for table in tables:
        assert f"\n\n{table}\n\n" in document


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_counted_as_the_model_has_them(tied):
    config = FastDLLMConfig(hidden_size=128, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = FastDLLMForCausalLM(config)
    assert roofline.Sizes.of(config).total_bytes == 2 * sum(weight.numel() for weight in model.parameters())


def test_the_runner_counts_the_published_sizes_without_the_models_libraries():
    assert roofline.Sizes.of(PUBLISHED).total_bytes == SIZES.total_bytes
    assert {name: getattr(FastDLLMConfig(), name) for name in vars(PUBLISHED)} == vars(PUBLISHED)


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        ("Quadro RTX 6000", "rtx_6000"),
        ("Tesla V100-PCIE-32GB", "v100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_blackwell"),
        ("NVIDIA RTX 6000 Ada Generation", ""),
        ("None", ""),
    ],
)
def test_a_card_is_known_by_the_name_that_its_driver_tells(card, kind):
    assert type_of_card(card) == kind
