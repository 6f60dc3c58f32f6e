"""The interface between the engine and the network: what the engine may ask for, however the forwards are run.

An `Execution` belongs to a model and says how its forwards are run: recorded as CUDA graphs (graphs.py) or with
compiled layers (compiled.py). A model without one runs module by module (eager.py). An `Executor` serves one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor

from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.cache import KVCache
from fast_dllm.network.packing import BlockRows
from fast_dllm.sampling import greedy_with_check

# Decides in mid-forward, for each sequence, whether a store replaces its layers. It receives the hidden rows (B, T, C)
# that enter the layers, their cache rows (B, 1) and their rows of the block (B, T). It returns B truth values.
Choice = Callable[[Tensor, Tensor, Tensor], Sequence[bool]]


class Executor(ABC):
    """Runs the forwards of one run of the engine over one cache. Use it as a context; leaving it ends the run.

    cache: keys and values of the run's sequences. stores: outputs of layers, by `Reuse.store_key`. pays_by_row: True if
    a forward's time grows with its rows (a CPU). False if it hardly does, so that fewer forwards are better (a GPU).
    """

    pays_by_row: bool

    def __init__(self, cache: KVCache, hidden_like: Tensor):
        """hidden_like (..., C): has the size, dtype and device of a hidden row."""
        self.cache = cache
        self.stores: dict[tuple[range, str, int], LayerStore] = {}
        self._hidden_like = hidden_like

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run. kind: the type of its exception, None if it succeeded."""
        return None

    @abstractmethod
    def prefill(
        self, cache_rows: Sequence[int], token_ids: Sequence[Sequence[int]], read: Sequence[int] | None = None
    ) -> Tensor | None:
        """Append whole blocks of known tokens to the sequences of these cache rows.

        cache_rows (B,): of sequences that are equally long before. token_ids: B lists, which may differ in length; the
        shorter ones are padded, and no later forward sees the padding. read (B,): for each sequence, the index of the
        appended token whose logits are returned.

        Returns logits (B, V), or None without `read`. Raises ValueError for incomplete blocks and unlike lengths.
        """

    @abstractmethod
    def run_block(self, block: BlockRows, *, store: LayerStore | None = None, choose: Choice | None = None) -> Tensor:
        """Run rows of the current blocks and write their keys and values to the cache.

        store: outputs of a range of layers. `choose` then decides for each sequence whether these layers run and are
        stored, or the stored values replace them. Candidates cannot be run with a store.

        Returns logits (B, R, V), which are valid until the next call.
        """

    def store(self, layers: range, part: str, order: int) -> LayerStore:
        """The store for the outputs of these layers, which is made when it is first asked for.

        Raises ValueError for layers that the model does not have, and as LayerStore does.
        """
        key = layers, part, order
        if key not in self.stores:
            num_layers, num_rows = self.cache.keys.shape[:2]
            if not 0 <= layers.start < layers.stop <= num_layers:
                raise ValueError(f"layers {layers} are not within the model's {num_layers}")
            self.stores[key] = LayerStore(layers, part, num_rows, self.cache.block_size, self._hidden_like, order)
        return self.stores[key]

    def greedy(self, logits: Tensor, mask_id: int) -> Tensor:
        """Logits (N, V) -> (3, N) in float64: the most likely token, its probability, whether the row is finite.

        The mask token is never chosen.
        """
        return greedy_with_check(logits, mask_id)

    def commit(self, cache_row: int, slot: int | None = None) -> None:
        """Make the current block of a sequence part of its prefix. The last forward ran it with its final tokens.

        slot: the place in scratch room where the block ran as a candidate; its keys and values are copied from it.
        """
        if slot is not None:
            self.cache.copy_slot_to_block(cache_row, slot)
        self.cache.lengths[cache_row] += self.cache.block_size


class Execution(ABC):
    """How a model's forwards are run. Makes the executors."""

    @abstractmethod
    def executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        """An executor with an empty cache for `num_rows` sequences of at most `max_length` positions.

        Raises UsageError if the model has fewer positions.
        """

    def unshared_executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        """As `executor`, but it shares no buffer with other runs and need not be used as a context."""
        return self.executor(num_rows, max_length, block_size)

    def forget(self) -> None:
        """Drop whatever depends on the addresses of the model's weights. Called after they have moved."""
        return None

    @property
    def counts(self) -> dict[str, int]:
        """How many pieces of work ran as written ("plain"), were recorded, were replayed. Empty if nothing is ever
        recorded."""
        return {}
