"""Forwards of block rows as CUDA graphs: the parts of a forward are recorded once for each shape and then replayed.

At batch 1 the host needs longer to launch the kernels of a forward than the GPU to run them. A recorded part is one
launch. A forward is cut where a store's layers begin and end, so that every pattern of reuse, and a decision in
mid-forward, is put together from three recorded parts: before, in (run, or replaced by what is stored), after.

A shape is: the exact number of sequences and rows (padding these would change the shapes of the products, and with
them tokens), and the number of keys that are read, rounded up to a bucket whose tail is masked. A part reads and writes
tensors that keep their addresses: its `Frame`, the cache and the stores. Nothing else that it depends on may change
between two forwards of one shape. Without a recorder the same parts run on the same shapes as written (for tests).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.cache import KVCache
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.executor import Choice, Execution, Executor
from fast_dllm.network.kernels import compiled_on_cuda
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.packing import NUM_FIXED, BlockInputs, BlockRows, BlockShape, pack_numbers, unpack
from fast_dllm.network.recordings import Record, Replays, has_room
from fast_dllm.sampling import greedy_with_check


class Frame:
    """What the parts of one batch size and width read and write.

    numbers (B, NUM_FIXED + T + R): see packing.pack_numbers. hidden (B, T, C). logits (B, R, V). predictions
    (3, B * R): see Executor.greedy.
    """

    def __init__(self, model: FastDLLMForCausalLM, logits: Tensor, batch_size: int, width: int, num_read: int):
        """logits: (rows, V), shared by all frames, since one frame is read at a time; this one uses the first rows."""
        like = model.lm_head.weight
        self.key = (batch_size, width, num_read)
        self.numbers = torch.zeros(batch_size, NUM_FIXED + width + num_read, dtype=torch.long, device=like.device)
        self.hidden = model.model.hidden_like().new_zeros(batch_size, width, model.config.hidden_size)
        self.logits = logits[: batch_size * num_read].view(batch_size, num_read, model.config.vocab_size)
        self.predictions = torch.zeros(3, batch_size * num_read, dtype=torch.float64, device=like.device)


class GraphExecutor(EagerExecutor):
    """Runs forwards of block rows as recorded parts. Prefills run module by module.

    A part is a segment of the eager forward, or all of it.

    Its cache, stores and frames keep their addresses from one run to the next, and with them the recordings. `release`
    is called at the end of each run, with True if the run failed.
    """

    def __init__(
        self,
        model: FastDLLMForCausalLM,
        cache: KVCache,
        record: Record | None,
        release: Callable[[bool], None],
    ):
        super().__init__(model, cache)
        self.pays_by_row = False
        self.replays = Replays(record, room=lambda: has_room(model.device))
        self._release = release
        rows = cache.batch_size * cache.block_size
        self._logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self._frames: dict[tuple[int, int, int], Frame] = {}
        self._last_frame: Frame | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(kind is not None and issubclass(kind, Exception))

    def run_block(self, block: BlockRows, *, store: LayerStore | None = None, choose: Choice | None = None) -> Tensor:
        num_keys = min(bucket(max(block.num_keys(self.cache))), self.cache.max_length)
        numbers, shape = pack_numbers(self.cache, block, num_keys)
        frame = self._frame(len(block.cache_rows), shape.width, numbers.shape[1] - NUM_FIXED - shape.width)
        frame.numbers.copy_(numbers, non_blocking=True)
        self._last_frame = frame
        if store is None:
            self._run_part(frame, shape, "whole", lambda inputs: self._write_logits(frame, inputs))
        else:
            assert choose is not None, "a store is written or read as `choose` says"
            self._run_three_parts(frame, shape, store, choose)
        return frame.logits

    def greedy(self, logits: Tensor, mask_id: int) -> Tensor:
        """As `Executor.greedy`, but by a recorded part for the logits that the last `run_block` returned."""
        frame = self._last_frame
        if frame is None or logits.data_ptr() != frame.logits.data_ptr():
            return super().greedy(logits, mask_id)

        def predict() -> None:
            frame.predictions.copy_(greedy_with_check(frame.logits.flatten(0, 1), mask_id))

        self.replays((frame.key, "greedy", mask_id), predict)
        return frame.predictions

    def _frame(self, batch_size: int, width: int, num_read: int) -> Frame:
        key = (batch_size, width, num_read)
        if key not in self._frames:
            if len(self._logits) < batch_size * num_read:
                # Candidates read more rows than sequences have. Frames that exist go on with the smaller buffer.
                rows = max(batch_size * num_read, 2 * len(self._logits))
                self._logits = self._logits.new_zeros(rows, self._logits.shape[1])
            self._frames[key] = Frame(self.model, self._logits, *key)
        return self._frames[key]

    def _run_part(self, frame: Frame, shape: BlockShape, name: Hashable, work: Callable[[BlockInputs], object]) -> None:
        """Run, record or replay one part of a forward over this frame."""

        def run() -> None:
            with compiled_on_cuda.used():
                work(unpack(self.cache, frame.numbers, shape))

        self.replays((frame.key, shape, name), run)

    def _write_logits(self, frame: Frame, inputs: BlockInputs) -> None:
        """The whole forward as one part."""
        hidden = self.run_network(inputs.ids, inputs.attend)
        frame.logits.copy_(self.logits_of(hidden, inputs))

    def _run_three_parts(self, frame: Frame, shape: BlockShape, store: LayerStore, choose: Choice) -> None:
        """A forward in three parts: before, in and after the layers of `store`."""
        layers = store.layers

        def before(inputs: BlockInputs) -> None:
            frame.hidden.copy_(self.run_before(inputs, layers))

        def after(inputs: BlockInputs) -> None:
            frame.logits.copy_(self.logits_of(self.run_after(frame.hidden, inputs, layers), inputs))

        self._run_part(frame, shape, ("before", layers), before)
        cache_rows, first_row = frame.numbers[:, :1], frame.numbers[:, NUM_FIXED - 1 : NUM_FIXED]
        block_rows = first_row + torch.arange(shape.width, device=first_row.device)
        reads = list(choose(frame.hidden, cache_rows, block_rows))
        if len(set(reads)) == 1:
            self._run_range_part(frame, shape, store, reads[0])
        else:
            for read in (False, True):
                members = [index for index, reads_store in enumerate(reads) if reads_store == read]
                self._run_range_of_some(frame, shape, store, read, members)
        self._run_part(frame, shape, ("after", layers), after)

    def _run_range_part(self, frame: Frame, shape: BlockShape, store: LayerStore, read: bool) -> None:
        """The store's layers over the frame's hidden rows: see EagerExecutor.run_range."""

        def work(inputs: BlockInputs) -> None:
            x = frame.hidden
            x.copy_(self.run_range(x, inputs.attend, inputs.cache_rows, inputs.block_rows, store, read))

        self._run_part(frame, shape, ("range", store.layers, store.part, store.previous is not None, read), work)

    def _run_range_of_some(
        self, frame: Frame, shape: BlockShape, store: LayerStore, read: bool, members: list[int]
    ) -> None:
        """`_run_range_part` for some sequences of the frame, copied to a frame of their number and back."""
        small_frame = self._frame(len(members), frame.key[1], frame.key[2])
        index = torch.tensor(members).to(frame.hidden.device, non_blocking=True)
        small_frame.numbers.copy_(frame.numbers[index])
        small_frame.hidden.copy_(frame.hidden[index])
        self._run_range_part(small_frame, replace(shape, first_rows=False), store, read)
        frame.hidden[index] = small_frame.hidden


class GraphExecution(Execution):
    """The graphs of one model. One run at a time has the executor; a run that begins meanwhile is not recorded."""

    def __init__(self, model: FastDLLMForCausalLM, make_record: Callable[[], Record | None]):
        """make_record: makes the recorder of a new executor, or None where nothing is recorded."""
        self._model, self._make_record = model, make_record
        self._executor: GraphExecutor | None = None
        self._lock = threading.Lock()

    def executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        if not self._lock.acquire(blocking=False):
            return self.unshared_executor(num_rows, max_length, block_size)
        try:
            if self._executor is None or not _is_large_enough(self._executor.cache, num_rows, max_length, block_size):
                size = self._size_for(num_rows, max_length)
                self._executor = None  # its memory is released before more is taken
                cache = self._model.new_cache(*size, block_size)
                self._executor = GraphExecutor(self._model, cache, self._make_record(), self._release)
            cache = self._executor.cache
            cache.lengths[:] = [0] * cache.batch_size
        except BaseException:
            self._lock.release()
            raise
        return self._executor

    def unshared_executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        return EagerExecutor(self._model, self._model.new_cache(num_rows, max_length, block_size))

    def _size_for(self, num_rows: int, max_length: int) -> tuple[int, int]:
        """Rows and length of the next cache: as much as this run needs and as the last cache had."""
        length = max(max_length, min(bucket(max_length), self._model.config.max_position_embeddings))
        if self._executor is None:
            return num_rows, length
        last_cache = self._executor.cache
        size = max(num_rows, last_cache.batch_size), max(length, last_cache.max_length)
        # After a run of many short answers and one of few long answers, no run has needed room for many long answers.
        if size[0] * size[1] > 2 * max(num_rows * length, last_cache.batch_size * last_cache.max_length):
            return num_rows, length
        return size

    def _release(self, failed: bool) -> None:
        if failed:
            self.forget()  # the buffers may contain NaN, or be too large for the memory
        self._lock.release()

    def forget(self) -> None:
        """Drop the executor with all recordings and buffers; the next run makes a new one."""
        self._executor = None

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._executor.replays.counts) if self._executor else {}


def _is_large_enough(cache: KVCache, num_rows: int, max_length: int, block_size: int) -> bool:
    return cache.batch_size >= num_rows and cache.max_length >= max_length and cache.block_size == block_size


def bucket(num_keys: int) -> int:
    """How many keys are read where `num_keys` are needed: at most 127 or an eighth more, so that few shapes occur."""
    step = max(128, 1 << max((num_keys - 1).bit_length() - 4, 0))
    return -(-num_keys // step) * step
