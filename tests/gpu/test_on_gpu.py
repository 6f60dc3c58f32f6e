"""What only a CUDA GPU can show: the same tokens as on the CPU, the automatic dtype, and one transfer a step."""

from __future__ import annotations

import pytest
import torch
from golden_models import generate, golden_json, golden_model

from fast_dllm.model import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
ARGUMENTS = ("mask_id", "stop_token", "max_new_tokens", "small_block_size", "threshold", "use_block_cache")


@pytest.fixture(scope="module")
def model():
    torch.backends.cuda.matmul.allow_tf32 = False
    return golden_model("tiny36").to("cuda")


def test_float32_tokens_equal_the_reference(model):
    for case in golden_json("tiny36.generate.json"):
        (got,) = generate(model, [case["prompt"]], refresh="rows", **{key: case[key] for key in ARGUMENTS})
        assert got.tokens == case["expected"]


def test_a_batch_equals_one_by_one(model):
    prompts = [case["prompt"] for case in golden_json("tiny36.generate.json")[::3]]
    settings = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 64, "threshold": 0.7}
    assert generate(model, prompts, **settings) == [generate(model, [prompt], **settings)[0] for prompt in prompts]


def test_the_automatic_dtype_is_the_gpus(random_model):
    major, _ = torch.cuda.get_device_capability()
    expected = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    model = load_model(str(random_model))
    assert model.device.type == "cuda"
    assert model.dtype == expected
    (got,) = generate(model, [[5] * 40], mask_id=319, stop_token=2, max_new_tokens=64)
    assert got.tokens
