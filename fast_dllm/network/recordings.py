"""Records work that recurs as CUDA graphs, and replays it. A replay is one launch, however many kernels it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch

PLAIN_RUNS = 2  # runs as written before work is recorded, in which libraries allocate memory and tune themselves
CAPACITY = 1024  # recordings that are kept, if the GPU's memory has room
# Evict the least recently used recording only if its last use is more than PATIENCE x (number of recordings) calls ago.
PATIENCE = 8
FREE_SHARE = 0.1  # share of the GPU's memory that recordings leave free

Work = Callable[[], object]
Record = Callable[[Work], Callable[[], object]]


class CudaRecorder:
    """Records work on the current GPU and returns a function that repeats it. All recordings share one memory pool,
    because they are replayed one after another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def has_room(device: torch.device) -> bool:
    """Whether the GPU has free memory for another recording, the memory of all processes counted. True on a CPU.

    If it has not, torch first releases the memory that it has cached but does not use.
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if free <= FREE_SHARE * total < unused:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    return free > FREE_SHARE * total


class Replays:
    """Runs pieces of work that recur under the same key: as written at first, then recorded, then replayed.

    record: takes the work and returns a function that repeats it, without having run it; None records nothing. Between
    two calls with one key, only the values in the tensors that the work reads may change. At most `capacity` recordings
    are kept, and no new one while `room` returns False. A new recording evicts only one that is out of use. If none is,
    its work runs as written, because keys that recur in turn and evict each other would be recorded all the time.
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
        self._num_calls: Counter[Hashable] = Counter()
        # the recordings and the number of the call that last used each, least recently used first
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
        self._num_calls[key] += 1
        if self._record is None or self._num_calls[key] <= self._plain_runs or not self._make_room(call):
            self.counts["plain"] += 1
            work()
            return
        replay = self._record(work)
        self._recorded[key] = replay, call
        self.counts["recorded"] += 1
        replay()

    def _make_room(self, call: int) -> bool:
        """Return whether another recording may be made. If there is no room, first evict one that is out of use."""
        if len(self._recorded) < self._capacity and self._room():
            return True
        if not self._recorded:
            return False
        oldest_key, (_, last_use) = next(iter(self._recorded.items()))
        if call - last_use <= PATIENCE * len(self._recorded):
            return False
        del self._recorded[oldest_key]
        return True
