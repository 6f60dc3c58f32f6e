"""Many requests side by side: how many a device's memory holds, and what is done when it holds fewer."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fast_dllm.decoding import DenoisingEvent, Generation
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.eager import PREFILL_ROWS
from fast_dllm.network.model import FastDLLMForCausalLM

logger = logging.getLogger(__name__)

Asked = TypeVar("Asked")

AUTO = "auto"  # a batch size: as many rows as fit
MOST_ROWS = {"cuda": 64, "cpu": 32}  # beyond it the products are as fast as they get
SHARE_OF_FREE = {"cuda": 0.85, "cpu": 0.5}  # of a host others have a part


def streamed(
    denoise: Callable[[list[Asked], int], Iterator[DenoisingEvent]], requests: Sequence[Asked], num_rows: int
) -> Iterator[tuple[Asked, Generation, float, int]]:
    """Each request as its answer is complete: (request, answer, seconds since the one before, rows side by side).

    denoise: starts requests in that many rows (an Experiment's, whose engine gives a row that is done the next one).
    Where the GPU's memory does not hold the rows, what is not answered begins again in half as many; raises
    torch.OutOfMemoryError where it does not hold one.
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
            del events  # here the exception is gone too, which held the frames and with them the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("%d rows do not fit the GPU's memory; going on with %d", num_rows, num_rows // 2)
            num_rows //= 2
        elif left:
            raise RuntimeError(f"{len(left)} requests were given no answer")


def rows_that_fit(model: FastDLLMForCausalLM, longest: int, block_size: int) -> int:
    """Sequences of up to `longest` positions that the free memory holds, at least one and at most MOST_ROWS."""
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    free = torch.cuda.mem_get_info(model.device)[0] + _cached(model) if kind == "cuda" else _available_on_host()
    item = model.lm_head.weight.element_size()
    of_prefill = PREFILL_ROWS * _bytes_of_row(model.config, item, read=0)
    of_sequence = _cache_bytes(model.config, item) * longest + block_size * _bytes_of_row(model.config, item, read=1)
    return max(1, min(int((free * SHARE_OF_FREE[kind] - of_prefill) // of_sequence), MOST_ROWS[kind]))


def _cached(model: FastDLLMForCausalLM) -> int:
    """What torch holds of the GPU's memory and does not use."""
    return torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)


def _available_on_host() -> int:
    """Bytes that may be taken without swapping, by Linux's estimate; elsewhere the pages that are free."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cache_bytes(config: FastDLLMConfig, item: int) -> int:
    """Keys and values of one position."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item


def _bytes_of_row(config: FastDLLMConfig, item: int, read: int) -> int:
    """What a forward holds for one row at its widest: hidden rows and the MLP's three, and of a row that is read its
    logits, and three copies of them in float32 (the mask token left out, the softmax)."""
    return item * (6 * config.hidden_size + 3 * config.intermediate_size) + read * config.vocab_size * (item + 12)
