"""Forwards of block rows as CUDA graphs: the parts of a forward are recorded once for each shape and then replayed.

At batch 1 the host needs longer to launch the kernels of a forward than the GPU to run them. A recorded part is one
launch. A forward is cut where a store's layers begin and end, so that every pattern of reuse, and a decision taken in
mid-forward, is a composition of three recorded parts: before, in (run, or stood in for), after.

What fixes a shape: the exact number of sequences and rows (padding these would change the shapes of the products, and
with them tokens), and the number of keys that are read, rounded up to a bucket whose tail is masked. A part reads and
writes tensors that stay in their place, its `Frame` and the cache; nothing else that it depends on may change between
two forwards of one shape. `padded` runs the same parts without recording them: the same kernels on the same shapes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fast_dllm.errors import UsageError
from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.cache import BlockInputs, BlockShape, Choice, KVCache
from fast_dllm.network.compiled import CompiledLayers
from fast_dllm.network.kernels import compiled_on_cuda
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.sampling import greedy_with_check
from fast_dllm.spec.defaults import GRAPH_MODES

PLAIN_RUNS = 2  # how often a part runs as written before it is recorded: libraries set themselves up meanwhile
CAPACITY = 1024  # recorded parts that are kept, where the GPU's memory holds them
PATIENCE = 8  # a recording goes for another one only when this many times as many calls as there are have passed it by
ROOM = 0.1  # of the GPU's memory that recordings leave free

Work = Callable[[], object]
Record = Callable[[Work], Callable[[], object]]


class CudaRecorder:
    """Records work on the current GPU; what is returned runs it again. One pool of memory for all recordings: they are
    replayed one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def has_room(device: torch.device) -> bool:
    """Whether a GPU's memory takes another recording: the driver's answer, which counts everybody's, once torch has
    given back what it only keeps."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if free <= ROOM * total < kept:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    return free > ROOM * total


class Replays:
    """Runs pieces of work that come again under the same key: as written at first, then recorded, then replayed.

    `record` (None: never) takes the work and returns what repeats it, without having run it. The work of a key must be
    the same each time but for the values in the tensors that it reads. At most `capacity` recordings are kept, and
    fewer where `room` says so. Where there are more keys than recordings, those that come round do not throw out each
    other, which would record all the time: a new one takes the place of one that is out of use, or runs as written.
    """

    def __init__(
        self,
        record: Record | None,
        plain_runs: int | None = None,
        capacity: int = CAPACITY,
        room: Callable[[], bool] = lambda: True,
    ):
        self._record, self._capacity, self._room = record, capacity, room
        self._plain_runs = PLAIN_RUNS if plain_runs is None else plain_runs
        self._seen: Counter[Hashable] = Counter()
        # the recordings and at which call each was used last, those used last at the end
        self._recorded: dict[Hashable, tuple[Callable[[], object], int]] = {}
        self.counts: Counter[str] = Counter()  # how often: "plain", "recorded", "replayed"

    def __call__(self, key: Hashable, work: Work) -> None:
        call = self.counts.total()
        if key in self._recorded:
            replay, _ = self._recorded.pop(key)
            self._recorded[key] = replay, call
            self.counts["replayed"] += 1
            replay()
            return
        self._seen[key] += 1
        if self._record is None or self._seen[key] <= self._plain_runs or not self._make_place(call):
            self.counts["plain"] += 1
            work()
            return
        replay = self._record(work)
        self._recorded[key] = replay, call
        self.counts["recorded"] += 1
        replay()

    def _make_place(self, call: int) -> bool:
        """Whether another recording may be made, one that is out of use being let go for it."""
        if len(self._recorded) < self._capacity and self._room():
            return True
        if not self._recorded:
            return False
        oldest, (_, used) = next(iter(self._recorded.items()))
        if call - used <= PATIENCE * len(self._recorded):
            return False
        del self._recorded[oldest]
        return True


class Frame:
    """What parts of one batch size and width read and write: numbers (B, 4 + T + R) as FastDLLMForCausalLM.pack_numbers
    gives them, hidden (B, T, C), logits (B, R, V), and what these predict, found (3, B * R)."""

    def __init__(self, model: FastDLLMForCausalLM, logits: Tensor, batch_size: int, width: int, num_read: int):
        """logits: (rows, V) of the arena, of which the first hold this frame's: one frame is read at a time."""
        like = model.lm_head.weight
        self.key = (batch_size, width, num_read)
        self.numbers = torch.zeros(batch_size, 4 + width + num_read, dtype=torch.long, device=like.device)
        self.hidden = model.model.hidden_like().new_zeros(batch_size, width, model.config.hidden_size)
        self.logits = logits[: batch_size * num_read].view(batch_size, num_read, model.config.vocab_size)
        self.found = torch.zeros(3, batch_size * num_read, dtype=torch.float64, device=like.device)


class Arena:
    """A cache, stores and frames that stay in place from one run to the next, and the parts recorded over them."""

    def __init__(self, model: FastDLLMForCausalLM, cache: KVCache, record: Record | None):
        self.cache = cache
        self.stores: dict[tuple, LayerStore] = {}
        self.replays = Replays(record, room=lambda: has_room(model.device))
        self._model = model
        rows = cache.batch_size * cache.block_size
        self._logits = model.lm_head.weight.new_zeros(rows, model.config.vocab_size)
        self._frames: dict[tuple[int, int, int], Frame] = {}
        self._last: Frame | None = None

    def run_block(
        self,
        rows: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        offsets: Sequence[int],
        read: Sequence[Sequence[int]],
        *,
        store: LayerStore | None = None,
        choose: Choice | None = None,
    ) -> Tensor:
        """As FastDLLMForCausalLM.run_block over this arena's cache. The logits (B, R, V) hold until the next call."""
        longest = max(self.cache.lengths[row] for row in rows) + self.cache.block_size
        num_keys = min(bucket(longest), self.cache.max_length)
        numbers, shape = self._model.pack_numbers(self.cache, rows, token_ids, offsets, read, num_keys)
        frame = self._frame(len(rows), shape.width, numbers.shape[1] - 4 - shape.width)
        frame.numbers.copy_(numbers, non_blocking=True)
        self._last = frame
        if store is None:
            self._part(frame, shape, "whole", lambda inputs: frame.logits.copy_(self._model.run_packed(inputs)))
            return frame.logits
        assert choose is not None, "a store is written or read as `choose` says"
        network, layers = self._model.model, store.layers
        self._part(
            frame, shape, ("before", layers), lambda inputs: frame.hidden.copy_(network.run_before(inputs, layers))
        )
        cache_rows, offset = frame.numbers[:, :1], frame.numbers[:, 3:4]
        block_rows = offset + torch.arange(shape.width, device=offset.device)
        reads = list(choose(frame.hidden, cache_rows, block_rows))
        if len(set(reads)) == 1:
            self._range(frame, shape, store, reads[0])
        else:
            for kind in (False, True):
                self._range_of_some(frame, shape, store, kind, [i for i, each in enumerate(reads) if each == kind])
        self._part(
            frame,
            shape,
            ("after", layers),
            lambda inputs: frame.logits.copy_(
                self._model.logits_of(network.run_after(frame.hidden, inputs, layers), inputs)
            ),
        )
        return frame.logits

    def greedy(self, mask_id: int) -> Tensor:
        """What the logits of the last `run_block` predict: (3, B * R), see sampling.greedy_with_check."""
        assert self._last is not None, "a block has been run"
        frame = self._last

        def predict() -> None:
            frame.found.copy_(greedy_with_check(frame.logits.flatten(0, 1), mask_id))

        self.replays((frame.key, "greedy", mask_id), predict)
        return frame.found

    def _frame(self, batch_size: int, width: int, num_read: int) -> Frame:
        key = (batch_size, width, num_read)
        if key not in self._frames:
            self._frames[key] = Frame(self._model, self._logits, *key)
        return self._frames[key]

    def _part(self, frame: Frame, shape: BlockShape, name: Hashable, work: Callable[[BlockInputs], object]) -> None:
        def run() -> None:
            with compiled_on_cuda.used():
                work(self._model.unpack(self.cache, frame.numbers, shape))

        self.replays((frame.key, shape, name), run)

    def _range(self, frame: Frame, shape: BlockShape, store: LayerStore, read: bool) -> None:
        """The store's layers over the frame's hidden rows: run and stored, or (`read`) stood in for."""

        def work(inputs: BlockInputs) -> None:
            frame.hidden.copy_(
                self._model.model.run_range(
                    frame.hidden, inputs.attend, inputs.cache_rows, inputs.block_rows, store, read
                )
            )

        self._part(frame, shape, ("range", store.layers, store.part, store.before is not None, read), work)

    def _range_of_some(self, frame: Frame, shape: BlockShape, store: LayerStore, read: bool, picked: list[int]) -> None:
        """`_range` for the sequences `picked` of the frame alone, in a frame of their number."""
        part = self._frame(len(picked), frame.key[1], frame.key[2])
        index = torch.tensor(picked).to(frame.hidden.device, non_blocking=True)
        part.numbers.copy_(frame.numbers[index])
        part.hidden.copy_(frame.hidden[index])
        self._range(part, replace(shape, first_rows=False), store, read)
        frame.hidden[index] = part.hidden


class BlockGraphs:
    """The graphs of one model. `lease` gives the arena to one run at a time; another that comes meanwhile gets none and
    decodes without graphs."""

    def __init__(self, model: FastDLLMForCausalLM, make_record: Callable[[], Record | None]):
        self._model, self._make_record = model, make_record
        self._arena: Arena | None = None
        self._lock = threading.Lock()

    def lease(self, num_rows: int, max_length: int, block_size: int) -> Arena | None:
        """An arena with an empty cache of at least this size, to be given back with `release`; None where it is out.

        Raises UsageError as FastDLLMForCausalLM.new_cache does.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            arena = self._arena
            rows, length = (arena.cache.batch_size, arena.cache.max_length) if arena else (0, 0)
            fits = rows >= num_rows and length >= max_length
            if arena is None or not fits or arena.cache.block_size != block_size:
                self._arena = arena = None  # its memory is free before more is taken
                limit = self._model.config.max_position_embeddings
                wanted = max(max_length, min(bucket(max_length), limit))
                both = max(num_rows, rows), max(wanted, length)
                # a cache for many short answers and for few long ones, but not for the product of the two
                if both[0] * both[1] > 2 * max(num_rows * wanted, rows * length):
                    both = num_rows, wanted
                cache = self._model.new_cache(*both, block_size)
                self._arena = arena = Arena(self._model, cache, self._make_record())
            arena.cache.lengths[:] = [0] * arena.cache.batch_size
        except BaseException:
            self._lock.release()
            raise
        return arena

    def release(self) -> None:
        self._lock.release()

    def clear(self) -> None:
        """Let go of everything recorded, and its memory: it is made anew when it is next wanted."""
        self._arena = None

    @property
    def counts(self) -> dict[str, int]:
        """How many parts were run as written, recorded and replayed over the arena there is."""
        return dict(self._arena.replays.counts) if self._arena else {}


def use_graphs(model: FastDLLMForCausalLM, mode: str = "auto", *, several: bool = False) -> FastDLLMForCausalLM:
    """Let the engine replay this model's forwards. mode: `auto` where it is on a CUDA GPU; `off`; `padded`: the
    shapes of `auto` on any device, nothing recorded; or `compiled`: on a CPU, its layers as fast_dllm.network.compiled
    makes them for the threads that are set, for `several` sequences side by side or for one. Hooks on its modules
    see no forward that is replayed, and none of compiled layers.

    Raises UsageError for another mode, and where `compiled` cannot be had.
    """
    if mode not in GRAPH_MODES:
        raise UsageError(f"graphs must be one of {', '.join(GRAPH_MODES)}, not {mode!r}")
    model.graphs = model.model.compiled = None
    if mode == "compiled":
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise UsageError(
                f"graphs=compiled is for float32 on a CPU, not for {str(model.dtype)[6:]} on {model.device}; "
                "graphs=auto is for every device"
            )
        compiled = CompiledLayers(model.config, model.model.layers)
        compiled.prepare(several)
        model.model.compiled = compiled
    elif mode == "padded":
        model.graphs = BlockGraphs(model, lambda: None)
    elif mode == "auto" and model.device.type == "cuda":
        model.graphs = BlockGraphs(model, CudaRecorder)
    return model


@contextlib.contextmanager
def as_written(model: FastDLLMForCausalLM) -> Iterator[None]:
    """Meanwhile the model's forwards run module by module, as hooks and the profiler see them."""
    network = model.model
    before = model.graphs, network.compiled
    model.graphs = network.compiled = None
    try:
        yield
    finally:
        model.graphs, network.compiled = before


def bucket(num_keys: int) -> int:
    """How many keys are read where `num_keys` are needed: at most 127, or an eighth, more."""
    step = max(128, 1 << max((num_keys - 1).bit_length() - 4, 0))
    return -(-num_keys // step) * step
