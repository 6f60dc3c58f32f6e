"""How many sequences fit in a device's memory side by side, and retrying with fewer where they did not fit."""

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
    """Each request when its answer is complete: (request, answer, seconds since the answer before, rows side by side).

    denoise: starts to answer requests in this many rows (Experiment.denoise). Where the GPU's memory does not hold the
    rows, all requests without an answer start again in half as many rows. Raises torch.OutOfMemoryError where it does
    not hold one row.
    """
    left, num_rows, seconds = list(requests), max(num_rows, 1), 0.0
    while left:
        num_rows = min(num_rows, len(left))
        done: set[int] = set()
        events, fits = denoise(left, num_rows), True
        while True:
            began = time.perf_counter()
            try:
                event = next(events, None)
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
                event, fits = None, False
            seconds += time.perf_counter() - began
            if event is None:
                break
            if event.generation is not None:
                done.add(event.row)
                yield left[event.row], event.generation, seconds, num_rows
                seconds = 0.0
        left = [request for row, request in enumerate(left) if row not in done]
        if not fits:
            del events  # The exception held the frames and with them the memory; it is gone here.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("%d rows do not fit the GPU's memory; going on with %d", num_rows, num_rows // 2)
            num_rows //= 2
        elif left:
            raise RuntimeError(f"{len(left)} requests were given no answer")


def rows_that_fit(model: FastDLLMForCausalLM, longest: int, block_size: int) -> int:
    """How many sequences of up to `longest` positions fit in the free memory: at least one, at most MOST_ROWS."""
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    free = free_on_gpu(model.device) if kind == "cuda" else available_on_host()
    item = model.lm_head.weight.element_size()
    of_prefill = PREFILL_ROWS * _bytes_of_row(model.config, item, read=0)
    of_sequence = _cache_bytes(model.config, item) * longest + block_size * _bytes_of_row(model.config, item, read=1)
    return max(1, min(int((free * SHARE_OF_FREE[kind] - of_prefill) // of_sequence), MOST_ROWS[kind]))


def _cache_bytes(config: FastDLLMConfig, item: int) -> int:
    """Bytes of the keys and values of one position. item: bytes of a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item


def _bytes_of_row(config: FastDLLMConfig, item: int, read: int) -> int:
    """Bytes that one row takes at the peak of a forward: hidden rows and the MLP's three products. A row that is read
    (`read` 1) has logits too, and three float32 copies of them. item: bytes of a number."""
    return item * (6 * config.hidden_size + 3 * config.intermediate_size) + read * config.vocab_size * (item + 12)
