"""The seam between the engine and the network: what the engine may ask for, however the forwards are run.

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

# Decides in mid-forward whether a store stands in for its layers. It receives the hidden rows that enter the layers
# (B, T, C), their cache rows (B, 1) and their rows of the block (B, T), and returns a truth value for each sequence.
Choice = Callable[[Tensor, Tensor, Tensor], Sequence[bool]]


class Executor(ABC):
    """Runs the forwards of one run of the engine over one cache. Use it as a context: it is given back at the end.

    cache: keys and values of its sequences. stores: what layers gave, by `Reuse.store_key`. pays_by_row: whether a
    forward's time grows with its rows (a CPU) or hardly does, so that fewer forwards are better (a GPU).
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
        """The run is over. `kind` is its exception, if it failed."""
        return None

    @abstractmethod
    def prefill(
        self,
        cache_rows: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        *,
        read_last: bool = True,
        read: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Append whole blocks of known tokens to the sequences of these cache rows, which are equally long before.

        Where they are not equally many, the shorter are padded; no later forward sees the padding. Returns logits
        (B, V): of each sequence's last position, or of the positions `read` (B,) among those appended; None where
        `read_last` is False and `read` is None. Raises ValueError for incomplete blocks and unlike lengths.
        """

    @abstractmethod
    def run_block(self, block: BlockRows, *, store: LayerStore | None = None, choose: Choice | None = None) -> Tensor:
        """Run rows of the current blocks and write their keys and values in place.

        With `store`, `choose` says for each sequence whether the store's layers run and are stored, or what is stored
        stands in for them; candidates have no store. Returns logits (B, R, V), which hold until the next call.
        """

    def store(self, layers: range, part: str, order: int) -> LayerStore:
        """The store of what these layers give; a new one has nothing in it.

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
        """Logits (N, V) -> (3, N) in float64: the most likely token but the mask token, its probability, and whether
        the row's logits are finite."""
        return greedy_with_check(logits, mask_id)

    def commit(self, cache_row: int, slot: int | None = None) -> None:
        """Count the current block of a sequence, run with its final tokens just before, as part of its prefix.

        slot: of the scratch room, where the block was run as a candidate; its keys and values are copied from there.
        """
        if slot is not None:
            self.cache.append_scratch(cache_row, slot)
        self.cache.lengths[cache_row] += self.cache.block_size


class Execution(ABC):
    """How a model's forwards are run. Makes the executors."""

    @abstractmethod
    def executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        """For a run of the engine: an empty cache for `num_rows` sequences of at most `max_length` positions.

        Raises UsageError where that is more than the model has positions.
        """

    def unshared_executor(self, num_rows: int, max_length: int, block_size: int) -> Executor:
        """As `executor`, but one that uses nothing of other runs and need not be given back."""
        return self.executor(num_rows, max_length, block_size)

    def forget(self) -> None:
        """The model's weights have moved: whatever holds their addresses is made anew."""
        return None

    @property
    def counts(self) -> dict[str, int]:
        """How many pieces of work were run as written ("plain"), recorded and replayed; empty where none can be."""
        return {}
