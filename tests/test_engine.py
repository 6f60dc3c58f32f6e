"""What the engine does beside a policy: transfers, admission, grouping, and the numbers that it refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from golden_models import denoise, generate, golden_model
from torch import Tensor, nn
from transfers import FakeDevice

from fast_dllm.errors import NonFiniteError

COMMON = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 32, "threshold": 0.5}


@pytest.mark.parametrize("reuse", [{}, {"reuse_k": 2, "layer_subset": "last"}, {"refresh": "rows"}])
def test_a_forward_costs_one_transfer_to_the_host(reuse):
    with torch.inference_mode(), FakeDevice() as device:
        model = device.move(golden_model("tiny36"))
        (got,) = generate(model, [[5, 6, 7] * 12], **COMMON, **reuse)
    forwards = {kind: count for kind, count in got.forwards.items() if count}
    unread = 1  # the prefill of a prompt that ends within a block
    assert sum(device.to_host.values()) == sum(forwards.values()) - forwards.get("reused", 0) - unread
    assert device.to_host


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(3, 318) for _ in range(length)]


def counted(module: nn.Module, fault: Callable[[int, Tensor], Tensor]) -> Callable[[], None]:
    """Puts a module's n-th output through fault(n, output); returns what takes it off."""
    calls = itertools.count()
    return module.register_forward_hook(lambda module, given, output: fault(next(calls), output)).remove


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_an_error_at_every_step(tiny36, value, temperature):
    """Prefill, full, sub and commit, whichever row and token it is: no answer is made of them."""
    settings = COMMON | {"max_new_tokens": 64, "refresh": "rows", "temperature": temperature}
    rng = random.Random(2)
    whole_block = [rng.randrange(3, 318) for _ in range(32)]
    spoilt = last = -1

    def spoil(number: int, logits: Tensor) -> Tensor:
        nonlocal last
        last = number
        if number == spoilt:
            logits = logits.clone()
            logits.view(-1, logits.shape[-1])[-1, number % logits.shape[-1]] = value
        return logits

    def answer() -> None:
        remove = counted(tiny36.lm_head, spoil)
        try:
            generate(tiny36, [whole_block], **settings, generator=torch.Generator().manual_seed(0))
        finally:
            remove()

    answer()
    num_forwards, kinds = last + 1, []
    assert num_forwards > 15
    every = range(15) if value != value else (0, 1, 9)
    for number in every:
        spoilt = number
        with pytest.raises(NonFiniteError, match=r"^the model's logits are not finite in a \w+ forward$") as told:
            answer()
        kinds.append(str(told.value).split()[-2])
    assert kinds[:2] == ["prefill", "full"]
    if value != value and not temperature:
        assert set(kinds) == {"prefill", "full", "sub", "commit"}


def spied(monkeypatch, model, name: str) -> list[tuple]:
    """The cache rows of every call of a model's method, and its other arguments."""
    calls, method = [], getattr(model, name)
    monkeypatch.setattr(
        model,
        name,
        lambda cache, rows, *rest, **named: (
            calls.append((list(rows), rest, named)) or method(cache, rows, *rest, **named)
        ),
    )
    return calls


@pytest.mark.parametrize("num_rows", [1, 3])
def test_requests_beyond_the_rows_are_admitted_as_rows_become_free(tiny36, monkeypatch, num_rows):
    """In the order they came, each into a row that another has left, and each answered as it is alone."""
    prompts = [prompt(length) for length in (70, 5, 33, 64, 12)]
    alone = [generate(tiny36, [each], **COMMON)[0] for each in prompts]
    caches, begun = [], []
    make = tiny36.new_cache
    monkeypatch.setattr(tiny36, "new_cache", lambda *given: caches.append(make(*given)) or caches[-1])
    blocks = spied(monkeypatch, tiny36, "run_block")
    got = [None] * len(prompts)
    for event in denoise(tiny36, prompts, num_rows=num_rows, **COMMON):
        if event.row not in begun:
            begun.append(event.row)
            assert len([row for row in begun if got[row] is None]) <= num_rows
        got[event.row] = event.generation
    assert got == alone
    assert begun == sorted(begun)
    assert [cache.batch_size for cache in caches] == [num_rows]
    assert max(len(rows) for rows, _, _ in blocks) == num_rows, "rows that are there are used together"
    assert {row for rows, _, _ in blocks for row in rows} == set(range(num_rows))


def test_prompts_of_equally_many_whole_blocks_are_prefilled_together(tiny36, monkeypatch):
    """One forward for each length; a prompt that ends with its block needs its last logits, and stands by itself."""
    lengths = (40, 5, 64, 41, 70, 63, 96, 127, 128)
    prompts = [prompt(length) for length in lengths]
    alone = [generate(tiny36, [each], **COMMON)[0] for each in prompts]
    calls = spied(monkeypatch, tiny36, "prefill")
    assert generate(tiny36, prompts, **COMMON) == alone
    found = {(len(ids[0]), named["read_last"]): [lengths[row] for row in rows] for rows, (ids,), named in calls}
    assert found == {
        (32, False): [40, 41, 63],
        (64, True): [64],
        (64, False): [70],
        (96, True): [96],
        (96, False): [127],
        (128, True): [128],
    }
    assert len(calls) == len(found)
