"""Chooses how a model's forwards are run: module by module, as CUDA graphs, or with layers compiled for a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fast_dllm.errors import UsageError
from fast_dllm.network.compiled import CompiledExecution
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.executor import Executor
from fast_dllm.network.graphs import GraphExecution
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.recordings import CudaRecorder
from fast_dllm.spec.defaults import GRAPH_MODES


def use_graphs(model: FastDLLMForCausalLM, mode: str, *, several: bool = False) -> FastDLLMForCausalLM:
    """Set how this model's forwards are run, and return the model.

    mode: `auto`, as CUDA graphs if the model is on a CUDA GPU, else module by module; `off`, module by module;
    `compiled`, with layers compiled for this CPU and for torch's present number of threads. several: also compile what
    sequences side by side need. Hooks on modules see neither replayed forwards nor compiled layers.

    Raises UsageError for another mode, and where `compiled` is impossible.
    """
    if mode not in GRAPH_MODES:
        raise UsageError(f"graphs must be one of {', '.join(GRAPH_MODES)}, not {mode!r}")
    model.execution = None
    if mode == "compiled":
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise UsageError(
                f"graphs=compiled is for float32 on a CPU, not for {str(model.dtype)[6:]} on {model.device}; "
                "graphs=auto is for every device"
            )
        execution = CompiledExecution(model)
        execution.libraries.prepare(several)
        model.execution = execution
    elif mode == "auto" and model.device.type == "cuda":
        model.execution = GraphExecution(model, CudaRecorder)
    return model


def use_padded_shapes(model: FastDLLMForCausalLM) -> FastDLLMForCausalLM:
    """Run the shapes of CUDA graphs on any device and record nothing. Tests compare recorded forwards with this."""
    model.execution = GraphExecution(model, lambda: None)
    return model


@contextlib.contextmanager
def as_written(model: FastDLLMForCausalLM) -> Iterator[None]:
    """Within this context the model's forwards run module by module, so that hooks and the profiler see them."""
    saved, model.execution = model.execution, None
    try:
        yield
    finally:
        model.execution = saved


def open_executor(
    model: FastDLLMForCausalLM, num_rows: int, max_length: int, block_size: int, *, shared: bool = True
) -> Executor:
    """An executor with an empty cache for `num_rows` sequences of at most `max_length` positions.

    shared: the executor may use buffers that other runs have used; then enter and leave it as a context. Raises
    UsageError if the model has fewer positions.
    """
    if model.execution is None:
        return EagerExecutor(model, model.new_cache(num_rows, max_length, block_size))
    make = model.execution.executor if shared else model.execution.unshared_executor
    return make(num_rows, max_length, block_size)
