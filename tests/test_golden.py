"""What the reference implementation computes, this one computes (docs/design.md, "What 'the same' means")."""

from __future__ import annotations

import pytest
from golden_models import GOLDEN_MODELS, assert_forward_is_the_references, golden_json

from generation_functions import generate

ARGUMENTS = ("mask_id", "stop_token", "max_new_tokens", "block_size", "small_block_size", "threshold")
ARGUMENTS += ("use_block_cache", "temperature")


def cases(kind: str) -> list:
    return [
        pytest.param(name, case, id=f"{name}-{index}")
        for name in GOLDEN_MODELS
        for index, case in enumerate(golden_json(f"{name}.{kind}.json"))
    ]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_forward_logits_are_as_near_to_float64_as_the_references(golden_models, name):
    assert_forward_is_the_references(name, lambda ids: golden_models[name](ids).logits)


def assert_forwards(got: dict[str, int], case: dict, expected: list[int]) -> None:
    """Equal counts, apart from a last commit that nothing reads; an upper bound where the answer stopped early.

    The reference counts the first commit of a prompt without a whole block as its prefill, and a reuse step as sub.
    """
    counted = {
        "full": got["full"],
        "sub": got["sub"] + got["reused"],
        "prefill and commit": got["prefill"] + got["commit"],
    }
    golden = {
        "full": case["forwards"].get("full", 0),
        "sub": case["forwards"].get("sub", 0),
        "prefill and commit": case["forwards"].get("prefill", 0) + case["forwards"].get("commit", 0),
    }
    if expected[-1] == case["stop_token"]:
        assert all(counted[kind] <= golden[kind] for kind in golden), (counted, golden)
    else:
        golden["prefill and commit"] -= 1
        assert counted == golden


@pytest.mark.parametrize(("name", "case"), cases("generate"))
def test_generated_tokens_equal_the_reference(golden_models, name, case):
    (got,) = generate(golden_models[name], [case["prompt"]], **{key: case[key] for key in ARGUMENTS})
    assert got.tokens == case["expected"]
    assert_forwards(got.forwards, case, case["expected"])


@pytest.mark.parametrize(("name", "case"), cases("layer_output_reuse"))
@pytest.mark.parametrize("layer_subset", ["first", "middle", "last"])
def test_output_reuse_tokens_equal_the_reference(golden_models, name, case, layer_subset):
    (got,) = generate(
        golden_models[name],
        [case["prompt"]],
        **{key: case[key] for key in ARGUMENTS},
        reuse_k=case["reuse_k"],
        layer_subset=layer_subset,
    )
    expected = case["expected_by_subset"][layer_subset]
    assert got.tokens == expected
    assert_forwards(got.forwards, case, expected)
    assert (got.forwards["reused"] > 0) == (case["reuse_k"] > 1 and case["forwards"]["sub"] > 1)
