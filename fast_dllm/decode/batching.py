"""Computes how many sequences fit in a device's memory, and starts again with fewer if the memory is exhausted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from fast_dllm.decoding import DenoisingEvent, Generation
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.eager import PREFILL_ROWS
from fast_dllm.network.memory import available_on_host, free_on_gpu
from fast_dllm.network.model import FastDLLMForCausalLM

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

AUTO = "auto"  # a batch size: as many rows as fit
MOST_ROWS = {"cuda": 64, "cpu": 32}  # more rows do not make the matrix products faster
SHARE_OF_FREE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory; a host's is also needed by others


def streamed(
    denoise: Callable[[list[Item], int], Iterator[DenoisingEvent]], requests: Sequence[Item], num_rows: int
) -> Iterator[tuple[Item, Generation, float, int]]:
    """Yield each request when its answer is complete: (request, answer, seconds since the last answer, number of rows).

    denoise: starts to answer requests in this many rows (Experiment.denoise). If the GPU's memory does not hold the
    rows, all unanswered requests start again in half as many rows. Raises torch.OutOfMemoryError if it does not hold
    one row.
    """
    unanswered, num_rows, seconds = list(requests), max(num_rows, 1), 0.0
    while unanswered:
        num_rows = min(num_rows, len(unanswered))
        done: set[int] = set()
        events, fits = denoise(unanswered, num_rows), True
        while True:
            start = time.perf_counter()
            try:
                event = next(events, None)
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
                event, fits = None, False
            seconds += time.perf_counter() - start
            if event is None:
                break
            if event.generation is not None:
                done.add(event.row)
                yield unanswered[event.row], event.generation, seconds, num_rows
                seconds = 0.0
        unanswered = [request for row, request in enumerate(unanswered) if row not in done]
        if not fits:
            del events  # Its frames hold the memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("%d rows do not fit the GPU's memory; going on with %d", num_rows, num_rows // 2)
            num_rows //= 2
        elif unanswered:
            raise RuntimeError(f"{len(unanswered)} requests were given no answer")


def rows_that_fit(model: FastDLLMForCausalLM, longest: int, block_size: int) -> int:
    """How many sequences of up to `longest` positions fit in the free memory: at least one, at most MOST_ROWS."""
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    free = free_on_gpu(model.device) if kind == "cuda" else available_on_host()
    number_bytes = model.lm_head.weight.element_size()
    prefill_bytes = PREFILL_ROWS * _row_bytes(model.config, number_bytes, read=0)
    sequence_bytes = _cache_bytes(model.config, number_bytes) * longest
    sequence_bytes += block_size * _row_bytes(model.config, number_bytes, read=1)
    return max(1, min(int((free * SHARE_OF_FREE[kind] - prefill_bytes) // sequence_bytes), MOST_ROWS[kind]))


def _cache_bytes(config: FastDLLMConfig, number_bytes: int) -> int:
    """Bytes of the keys and values of one position. number_bytes: bytes of one number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number_bytes


def _row_bytes(config: FastDLLMConfig, number_bytes: int, read: int) -> int:
    """Bytes that one row needs at the peak of a forward, for its hidden rows and the MLP's three products.

    read: 1 for a row that is read, which has logits too, and three float32 copies of them; else 0. number_bytes: bytes
    of one number.
    """
    hidden_and_mlp = number_bytes * (6 * config.hidden_size + 3 * config.intermediate_size)
    return hidden_and_mlp + read * config.vocab_size * (number_bytes + 12)
