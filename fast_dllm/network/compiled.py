"""Forwards with decoder layers that are compiled for this CPU (layer_libraries.py).

A layer of a small model is about thirty operations of a few microseconds each. A compiled layer is one call.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fast_dllm.network.cache import Attend, KVCache
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.executor import Execution, Executor
from fast_dllm.network.layer_libraries import LayerLibraries, Variant, library_folder
from fast_dllm.network.model import FastDLLMForCausalLM


class CompiledExecutor(EagerExecutor):
    """Runs each decoder layer as one call of its library.

    Layers run module by module instead for candidates, for one row per sequence, for weights that are not float32, and
    while gradients are computed.
    """

    def __init__(self, model: FastDLLMForCausalLM, cache: KVCache, libraries: LayerLibraries):
        super().__init__(model, cache)
        self._libraries = libraries
        self._weights = [list(layer.parameters()) for layer in model.model.layers]

    def run_network(self, ids: Tensor, attend: Attend) -> Tensor:
        network = self.model.model
        return network.norm(self.run_layers(network.embed(ids), attend, range(len(network.layers))))

    def run_layers(self, x: Tensor, attend: Attend, layers: range) -> Tensor:
        """Pass hidden rows (B, T, C) through some layers. Raises UsageError if their library cannot be compiled."""
        if (
            attend.candidates is not None
            or x.shape[1] == 1
            or self.model.dtype != torch.float32
            or torch.is_grad_enabled()
        ):
            return super().run_layers(x, attend, layers)
        cache, mask = self.cache, attend.mask
        assert attend.flat_positions is not None, "a forward over a cache says where its rows are written"
        B, T, _ = x.shape
        cos, sin = (table if table.dim() == 4 else table.unsqueeze(0) for table in (attend.cos, attend.sin))
        if mask is not None:
            mask = mask[:, :, :T].contiguous()  # the other rows repeat it for the other heads
        library = self._libraries.library(
            Variant(
                B > 1,
                cache.batch_size > 1,
                None if mask is None else (mask.shape[0] > 1, mask.shape[2] > 1),
                cos.shape[0] > 1,
                attend.cache_rows is not None,
                torch.get_num_threads(),
            )
        )
        # The library does not check that its inputs are contiguous, and reads wrong numbers if they are not.
        flat_positions = attend.flat_positions.view(B, T)
        cache_rows, positions = flat_positions // cache.max_length, flat_positions % cache.max_length
        picked = None if attend.cache_rows is None else attend.cache_rows.clone(memory_format=torch.contiguous_format)
        x, cos, sin, seen = x.contiguous(), cos.contiguous(), sin.contiguous(), cache.cos[: attend.num_keys]
        with self._libraries.running:
            for index in layers:
                keys, values, weights = cache.keys[index], cache.values[index], self._weights[index]
                x = library(x, cos, sin, mask, keys, values, cache_rows, positions, picked, seen, weights)
        return x


class CompiledExecution(Execution):
    """Runs a model's layers by the libraries of their shape."""

    def __init__(self, model: FastDLLMForCausalLM, folder: Path | None = None):
        """folder: where libraries are kept (default: `library_folder`)."""
        self._model = model
        self.libraries = LayerLibraries(model.config, model.layer(0), folder or library_folder())

    def executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        cache = self._model.new_cache(num_rows, max_length, block_size)
        return CompiledExecutor(self._model, cache, self.libraries)
