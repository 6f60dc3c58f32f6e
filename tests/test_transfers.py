"""The device that counts what crosses (tests/transfers.py) misses no kind of transfer, and counts none twice."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from golden_models import golden_model
from transfers import DEVICE, FakeDevice, OnDevice

ONE = {"item": 1}
COPY = {"copy": 1}


@pytest.fixture(params=["inference", "plain"])
def mode(request):
    modes = {"inference": torch.inference_mode, "plain": contextlib.nullcontext}
    with modes[request.param]():
        yield


@pytest.fixture
def device(mode):
    with FakeDevice() as device:
        yield device


TO_HOST = {
    "item": (lambda x, n, m: n.item(), ONE),
    "bool": (lambda x, n, m: bool(n), ONE),
    "int": (lambda x, n, m: int(n), ONE),
    "float": (lambda x, n, m: float(n), ONE),
    "range": (lambda x, n, m: range(n), ONE),
    "list index": (lambda x, n, m: [5, 6, 7][n], ONE),
    "slice": (lambda x, n, m: x[n:], ONE),
    "iteration": (lambda x, n, m: [int(value) for value in x[0]], {"item": 3}),
    "in": (lambda x, n, m: 3 in x, ONE),
    "allclose": (lambda x, n, m: torch.allclose(x, x), {"equal": 1}),
    "equal": (lambda x, n, m: torch.equal(x, x), {"equal": 1}),
    "nonzero": (lambda x, n, m: m.nonzero(), {"nonzero": 1}),
    "boolean index": (lambda x, n, m: x[m], {"boolean index": 1}),
    "boolean store": (lambda x, n, m: x.clone().__setitem__(m, x[0]), {"boolean index": 1}),
    "masked_select": (lambda x, n, m: x.masked_select(m), {"masked_select": 1}),
    "unique": (lambda x, n, m: x.unique(), {"unique": 1}),
    "repeat_interleave": (lambda x, n, m: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), 0), None),
    "tolist": (lambda x, n, m: x.tolist(), COPY),
    "cpu": (lambda x, n, m: x.cpu(), COPY),
    "to": (lambda x, n, m: x.to("cpu"), COPY),
    "cpu().numpy": (lambda x, n, m: x.cpu().numpy(), COPY),
    "copy_": (lambda x, n, m: torch.empty(2, 3).copy_(x), COPY),
    "two": (lambda x, n, m: (x.argmax().item(), x.tolist()), {"item": 1, "copy": 1}),
}


@pytest.mark.parametrize("kind", TO_HOST)
def test_every_transfer_to_the_host_is_counted_once(device, kind):
    read, expected = TO_HOST[kind]
    x = OnDevice(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    read(x, OnDevice(torch.tensor(1)), OnDevice(torch.tensor([[True, False, True], [False, True, False]])))
    if expected is None:
        assert device.transfers == 1
    else:
        assert device.to_host == Counter(expected)


def test_work_that_stays_on_the_device_counts_none(device):
    x = torch.arange(6, device=DEVICE).view(2, 3).float()
    y = torch.zeros(2, 3, device=DEVICE)
    y[:, 1:] = x[:, :2] * 2 + 1
    y.index_copy_(0, torch.arange(2, device=DEVICE), x)
    y[y > 3] = 0.0
    y = torch.where(y > 1, y, x).masked_fill(x > 2, 0).softmax(-1)
    y = (y @ x.T).sort(dim=-1).values.gather(1, y[:, :1].long()).to(torch.bfloat16).to(DEVICE)
    top = torch.multinomial(x + 1, 1)
    assert y.shape == (2, 1)
    assert top.shape == (2, 1)
    assert device.to_host == Counter()
    assert device.to_device == Counter()


def test_transfers_to_the_device_are_counted_apart(device):
    x = torch.tensor([[1, 2], [3, 4]], device=DEVICE)
    torch.zeros(2).to(DEVICE, non_blocking=True)
    x.copy_(torch.ones(2, 2, dtype=torch.long))
    assert device.to_device == {"copy": 3}
    assert x[[1, 0]].shape == (2, 2)
    assert device.to_device == {"copy": 3, "index": 1}
    assert device.to_host == Counter()


def test_what_a_gpu_refuses_is_refused(device):
    x = torch.zeros(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2)
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()
    with pytest.raises((TypeError, RuntimeError)):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device=DEVICE, generator=torch.Generator())
    assert (x + torch.tensor(1.0)).shape == (2,)  # a number in a tensor may come from the host


def test_a_models_forward_needs_none_and_computes_the_same():
    plain = golden_model("tiny36")
    ids = torch.arange(3, 73)[None]
    with torch.inference_mode(), FakeDevice() as device:
        model = device.move(golden_model("tiny36"))
        assert model.device == DEVICE
        logits = model(ids.to(DEVICE)).logits
        assert device.to_host == Counter()
        assert device.to_device == {"copy": 1}
        torch.testing.assert_close(logits.cpu(), plain(ids).logits, atol=1e-3, rtol=0)
