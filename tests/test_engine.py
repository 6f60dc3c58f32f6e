"""One device-to-host transfer a forward, none for a greedy re-read, on a device that sees every kind of read."""

from __future__ import annotations

import pytest
import torch
from golden_models import generate, golden_model
from transfers import FakeDevice

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
