"""What only a CUDA GPU can show: the same tokens as on the CPU, the automatic dtype, and one transfer a step."""

from __future__ import annotations

import warnings

import pytest
import torch
from golden_models import generate, golden_json, golden_model

from fast_dllm.decode import experiments
from fast_dllm.network import kernels
from fast_dllm.network.loading import load_model
from fast_dllm.network.modes import use_graphs, use_padded_shapes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]
ARGUMENTS = ("mask_id", "stop_token", "max_new_tokens", "small_block_size", "threshold", "use_block_cache")


@pytest.fixture(scope="module")
def model():
    torch.backends.cuda.matmul.allow_tf32 = False
    return golden_model("tiny36").to("cuda")


def test_float32_tokens_equal_the_reference(model):
    for case in golden_json("tiny36.generate.json")[::4]:
        (got,) = generate(model, [case["prompt"]], refresh="rows", **{key: case[key] for key in ARGUMENTS})
        assert got.tokens == case["expected"]


def test_a_batch_equals_one_by_one(model):
    prompts = [case["prompt"] for case in golden_json("tiny36.generate.json")[::6]]
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


# -- graphs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["float32", "bfloat16"])
def typed(request):
    if request.param == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU computes no bfloat16")
    return golden_model("tiny36").to("cuda", getattr(torch, request.param)).fuse()


def answers(model, mode: str, name: str | None = None, **knobs):
    """Of one prompt, then of several at once, three times: the last time nearly everything is replayed."""
    prompts = [case["prompt"] for case in golden_json("tiny36.generate.json")[::8]]
    settings = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 48, "threshold": 0.7} | knobs
    if mode == "padded":
        use_padded_shapes(model)
    else:
        use_graphs(model, mode)
    experiment = experiments.load(name)
    given = [experiment.generate(model, prompts[:1], **settings)[0]]
    given += [
        each for _ in range(3 if mode == "auto" else 1) for each in experiment.generate(model, prompts, **settings)
    ]
    counts = model.execution.counts if model.execution else {}
    use_graphs(model, "off")
    return given, counts


KNOBS = [
    (None, {}),
    (None, {"refresh": "rows"}),
    (None, {"reuse_k": 2, "layer_subset": "last"}),
    ("02_residual_reuse", {"reuse_k": 3, "layer_subset": "middle"}),
    ("02_residual_reuse", {"reuse_k": 3, "layer_subset": "middle", "tolerance": 0.05}),
    ("02_residual_reuse", {"reuse_k": 2, "layer_subset": "first", "part": "mlp", "order": 1}),
    ("03_carry_rows", {}),
]


@pytest.mark.parametrize(("name", "knobs"), KNOBS)
def test_replayed_forwards_give_the_tokens_of_the_same_shapes_unrecorded(typed, name, knobs):
    replayed, counts = answers(typed, "auto", name, **knobs)
    (alone, *batches), (padded, _) = replayed, answers(typed, "padded", name, **knobs)
    size = len(padded) - 1
    for begin in range(0, 3 * size, size):
        assert [alone, *batches[begin : begin + size]] == padded
    assert counts["replayed"] > counts["recorded"] > 0
    if typed.dtype == torch.float32:
        assert padded == answers(typed, "off", name, **knobs)[0]


def test_replayed_forwards_give_the_references_tokens(model):
    use_graphs(model, "auto")
    try:
        for _ in range(3):
            test_float32_tokens_equal_the_reference(model)
        assert model.execution.counts["replayed"]
    finally:
        use_graphs(model, "off")


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_the_host_waits_for_the_gpu_once_a_forward(model, mode):
    prompt = golden_json("tiny36.generate.json")[0]["prompt"]
    settings = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 64, "threshold": 0.7, "refresh": "rows"}
    use_graphs(model, mode)
    try:
        for _ in range(4):
            (warm,) = generate(model, [prompt], **settings)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            (got,) = generate(model, [prompt], **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        use_graphs(model, "off")
    assert got == warm
    unread = len(prompt) >= 32 and len(prompt) % 32 != 0  # a prefill that predicts nothing
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == sum(got.forwards.values()) - unread


def test_compiled_kernels_compute_what_the_plain_ones_do(typed):
    ids = torch.randint(3, 300, (2, 64), device="cuda")
    with torch.inference_mode():
        with kernels.compiled_on_cuda.used():
            compiled = typed(ids).logits.double()
        assert kernels.compiled_on_cuda.is_enabled, "they could be made"
        plain = typed(ids).logits.double()
        exact = typed.to(torch.float64)(ids).logits
    spread = float((plain - exact).abs().max())
    assert float((compiled - exact).abs().max()) < 2 * spread + 1e-6
