"""Which form of a kernel runs where, and that a GPU whose kernels cannot be compiled still decodes."""

from __future__ import annotations

import pytest
import torch

from fast_dllm.network import kernels
from fast_dllm.network.kernels import Compiling, gate, rms_norm, rotate


class OnGPU:
    """As much of a tensor as is looked at before a kernel runs."""

    is_cuda = True


@pytest.fixture
def on_cuda():
    return Compiling()


def test_a_gpu_gets_one_compiled_kernel_and_others_the_written_one(on_cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda kernel, **how: asked.append(how) or (lambda x: "compiled"))
    kernel = on_cuda(lambda x: "written")
    with on_cuda.used():
        assert kernel(torch.zeros(1)) == "written"
        assert [kernel(OnGPU()) for _ in range(3)] == ["compiled"] * 3
        assert asked == [{"dynamic": True, "options": kernels.OPTIONS}]
        on_cuda.is_enabled = False
        assert kernel(OnGPU()) == "written"


@pytest.mark.parametrize("at", ["making", "first call"])
def test_where_none_can_be_compiled_the_written_ones_run_and_a_line_says_so(on_cuda, monkeypatch, at):
    def broken(*given, **how):
        raise RuntimeError("no C compiler\nand a long trace")

    said: list[str] = []
    monkeypatch.setattr(kernels.logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(torch, "compile", broken if at == "making" else lambda kernel, **how: broken)
    first, second = on_cuda(lambda x: "first"), on_cuda(lambda x: "second")
    with on_cuda.used():
        assert [first(OnGPU()), second(OnGPU()), first(OnGPU())] == ["first", "second", "first"]
    assert said == ["kernels are not compiled, decoding is slower (no C compiler)"]


def test_memory_that_is_short_is_not_taken_for_a_compiler_that_is_missing(on_cuda, monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda kernel, **how: full)
    with on_cuda.used(), pytest.raises(torch.OutOfMemoryError):
        on_cuda(lambda x: "written")(OnGPU())
    assert on_cuda.is_enabled


@pytest.mark.slow
def test_this_torch_knows_the_options():
    """An unknown one is refused when a kernel is made."""
    torch.compile(lambda x: x, dynamic=True, options=kernels.OPTIONS)
    with pytest.raises(RuntimeError):
        torch.compile(lambda x: x, dynamic=True, options={"no_such_option": True})


def test_the_written_kernels_compute_what_they_say():
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    heads, angles = torch.randn(2, 5, 3, 4), torch.randn(5, 1, 2)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    turned = torch.view_as_complex(torch.stack(heads.split(2, -1), -1)) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(heads, cos, sin), torch.cat((turned.real, turned.imag), -1))
    torch.testing.assert_close(gate(x, x + 1), x * x.sigmoid() * (x + 1))
