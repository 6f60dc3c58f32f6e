"""Runs one policy for many requests: cache rows, admission, grouping, predictions, what is kept for later steps.

Each request has a coroutine of its own (fast_dllm.decoding). The engine gathers the forwards that they ask for, runs
together those that can share one, and sends each its own prediction. A sequence never learns who its neighbours are, so
every request is answered as it would be alone. Each forward costs one device-to-host transfer, and one more where a
policy decides in mid-forward whether layers run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fast_dllm.decoding import (
    FORWARD_KINDS,
    Answer,
    DenoisingEvent,
    Forward,
    Options,
    Policy,
    Prediction,
    Reuse,
)
from fast_dllm.errors import non_finite
from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.graphs import Arena
from fast_dllm.network.model import DecoderLayer, FastDLLMForCausalLM
from fast_dllm.sampling import is_finite, predict

DecodeOne = Callable[[Answer, Options], Policy]
# A forward of its own costs reading every weight, or on a CPU some hundreds of small operations: as much as some rows.
PADDED_TOKENS = 64  # of one sequence, that a shared prefill may run for nothing
JOINING_BLOCKS = 4  # of a prefill that runs beside other sequences' blocks instead of in a forward of its own
# A CPU pays by the row once a forward has that many; then the keys that a shorter sequence reads for nothing, and the
# mask that hides them, cost more than a forward for each length.
ROWS_OF_ONE_LENGTH = 256
Store = tuple[range, str, int]  # the layers of a LayerStore, what of them it holds, and its order


@dataclass(frozen=True)
class Request:
    """A prompt (token ids), and the random stream that its tokens are drawn from where they are sampled."""

    prompt: list[int]
    generator: torch.Generator | None = None


@dataclass
class _Sequence:
    """A request at work: its coroutine, its cache row, and what it may read again."""

    answer: Answer
    policy: Policy
    generator: torch.Generator | None
    slot: int
    waiting: Forward | None = None
    runs: Forward | None = None  # what of it runs next: a prefill that joins other blocks runs one block at a time
    num_prefilled: int = 0
    kept: range = range(0)  # the positions of the block that can be read again
    kept_predictions: tuple[list[int], list[float]] = ([], [])  # greedy: what they predict
    kept_logits: Tensor | None = None  # sampled: (positions, V), each reading draws anew
    stored: dict[Store, Counter[int]] = field(
        default_factory=dict
    )  # how often a LayerStore has got a row of this block

    def asked(self) -> Forward:
        assert self.waiting is not None, "a sequence that asks for nothing is in no group"
        return self.waiting

    def running(self) -> Forward:
        assert self.runs is not None, "a sequence in a group runs something"
        return self.runs

    def next_block(self, block_size: int) -> Forward:
        """The next block of a prefill, as what it is to a model: a block of known tokens, run and committed."""
        asked, start = self.asked(), self.num_prefilled
        self.num_prefilled = start + block_size
        is_last = self.num_prefilled == len(asked.token_ids)
        wanted = range(block_size, block_size + len(asked.wanted)) if is_last else range(0)
        return Forward("commit", asked.token_ids[start : self.num_prefilled], wanted=wanted)

    @property
    def is_prefilling(self) -> bool:
        """Whether blocks of its prefill are left."""
        asked = self.asked()
        return asked.kind == "prefill" and 0 < self.num_prefilled < len(asked.token_ids)


class Engine:
    """Decodes requests with one model, one policy and one set of options, `num_rows` at a time.

    temperature 0 is greedy; else tokens are drawn from the `top_p` nucleus. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: FastDLLMForCausalLM,
        decode_one: DecodeOne,
        options: Options,
        *,
        num_rows: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
    ):
        options.check(model.config.num_hidden_layers)
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must not be negative and top_p in (0, 1], not {temperature} and {top_p}")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, not {num_rows}")
        self.model, self.decode_one, self.options = model, decode_one, options
        self.num_rows, self.temperature, self.top_p = num_rows, temperature, top_p
        self.num_layers = model.config.num_hidden_layers

    def run(self, requests: Sequence[Request]) -> Iterator[DenoisingEvent]:
        """The events of all requests as they happen; `row` is the request's index. Raises ValueError for an empty
        prompt, NonFiniteError for logits that are no numbers. Closing the iterator stops at the next forward."""
        if not all(request.prompt for request in requests):
            raise ValueError("every prompt needs at least one token")
        return self._run(deque(enumerate(requests)))

    def _run(self, queue: deque[tuple[int, Request]]) -> Iterator[DenoisingEvent]:
        if not queue:
            return
        num_rows = min(self.num_rows or len(queue), len(queue))
        longest = max(Answer(index, request.prompt, self.options, self.num_layers).limit for index, request in queue)
        graphs = self.model.graphs
        self._arena: Arena | None = None
        if graphs is not None:
            self._arena = graphs.lease(num_rows, longest, self.options.block_size)
        try:
            yield from self._run_over(queue, num_rows, longest)
        except Exception:
            if self._arena is not None:
                graphs.clear()  # what it holds may be no numbers, or too much for the memory
            raise
        finally:
            if self._arena is not None:
                graphs.release()

    def _run_over(self, queue: deque[tuple[int, Request]], num_rows: int, longest: int) -> Iterator[DenoisingEvent]:
        arena = self._arena
        self._cache = arena.cache if arena else self.model.new_cache(num_rows, longest, self.options.block_size)
        self._stores: dict[Store, LayerStore] = arena.stores if arena else {}
        free, active = list(range(num_rows)), dict[int, _Sequence]()
        while queue or active:
            while free and queue:
                sequence = self._admit(*queue.popleft(), slot=free.pop(0))
                yield from self._advance(sequence, None)
                if sequence.waiting is None:
                    free.append(sequence.slot)
                else:
                    active[sequence.slot] = sequence
            for group in self._groups(active):
                for sequence, prediction in zip(group, self._forward(group), strict=True):
                    if prediction is None:
                        continue
                    yield from self._advance(sequence, prediction)
                    if sequence.waiting is None:
                        free.append(active.pop(sequence.slot).slot)

    def _admit(self, index: int, request: Request, slot: int) -> _Sequence:
        answer = Answer(index, request.prompt, self.options, self.num_layers)
        self._cache.lengths[slot] = 0
        return _Sequence(answer, self.decode_one(answer, self.options), request.generator, slot)

    def _advance(self, sequence: _Sequence, prediction: Prediction | None) -> Iterator[DenoisingEvent]:
        """Send a sequence its prediction; pass on its events until it asks for a forward or ends.

        Greedy predictions that were kept are read again right here: they cost nothing.
        """
        sequence.waiting = None
        while True:
            try:
                item = next(sequence.policy) if prediction is None else sequence.policy.send(prediction)
            except StopIteration:
                return
            prediction = None
            if isinstance(item, DenoisingEvent):
                yield item
                continue
            self._check(sequence, item)
            if item.kind != "reused" or self._is_drawn(item):
                sequence.waiting = item
                return
            tokens, confidences = sequence.kept_predictions
            picked = _within(item.wanted, sequence.kept)
            prediction = self._result(sequence, item, tokens[picked], confidences[picked])

    def _check(self, sequence: _Sequence, item: object) -> None:
        """A policy that asks for what cannot be had is told so, before it reads numbers of something else."""
        if not isinstance(item, Forward):
            raise TypeError(f"decode_one yielded {item!r}; it yields Forward and DenoisingEvent")
        if item.kind not in FORWARD_KINDS:
            raise ValueError(f"unknown kind of forward {item.kind!r}; there are: {', '.join(FORWARD_KINDS)}")
        for positions in (item.wanted, item.keep):
            if positions.step != 1:
                raise ValueError(f"a forward's positions must be consecutive, not {positions}")
        held = sequence.kept if item.kind == "reused" else item.held
        if item.wanted and not (held.start <= item.wanted.start and item.wanted.stop <= held.stop):
            raise ValueError(f"positions {item.wanted} are wanted, but only {held} are kept")
        if item.kind == "reused" or item.reuse is None:
            return
        reuse, times = item.reuse, sequence.stored.get(_store_key(item.reuse), Counter())
        rows = range(item.offset, item.offset + len(item.token_ids))
        needed = 2 if reuse.order and reuse.ahead else 1
        if (reuse.read or reuse.decide) and any(times[row] < needed for row in rows):
            often = "stored" if needed == 1 else "stored twice"
            raise ValueError(f"block rows {rows} are read from layers {reuse.layers} before all of them were {often}")

    def _is_drawn(self, forward: Forward) -> bool:
        """Whether its tokens are sampled. The first token of a block is greedy at any temperature."""
        return self.temperature > 0 and FORWARD_KINDS[forward.kind].step

    def _groups(self, active: dict[int, _Sequence]) -> list[list[_Sequence]]:
        """Sequences that can share a forward now. Which rows are read, and whether it commits, may differ.

        A short prefill joins a forward of whole blocks that runs anyway, block by block; others run by themselves.
        """
        groups: dict[tuple, list[_Sequence]] = {}
        prefills: list[_Sequence] = []
        for sequence in active.values():
            sequence.runs = forward = sequence.asked()
            if forward.kind == "prefill":
                prefills.append(sequence)
                continue
            if forward.kind == "reused":
                key: tuple = ("reused", len(forward.wanted))
            else:
                key = ("block", len(forward.token_ids), forward.reuse and _store_key(forward.reuse))
            groups.setdefault(key, []).append(sequence)
        size = self.options.block_size
        whole_blocks = ("block", size, None)
        others_run_one = whole_blocks in groups
        apart: list[_Sequence] = []
        for sequence in prefills:
            is_short = len(sequence.asked().token_ids) <= JOINING_BLOCKS * size
            if sequence.is_prefilling or (others_run_one and is_short):
                sequence.runs = sequence.next_block(size)
                groups.setdefault(whole_blocks, []).append(sequence)
            else:
                apart.append(sequence)
        parts = [part for group in groups.values() for part in self._parts(group)]
        return [*parts, *_of_like_length(apart)]

    def _parts(self, group: list[_Sequence]) -> list[list[_Sequence]]:
        """A group as it runs: on a CPU those of one length by themselves, as far as that leaves whole forwards."""
        lengths, width = self._cache.lengths, len(group[0].running().token_ids)
        pays_by_row = self.model.device.type == "cpu" and self._arena is None  # an arena's forwards are a GPU's
        if not pays_by_row or len(group) * width <= ROWS_OF_ONE_LENGTH:
            return [group]
        parts: list[list[_Sequence]] = []
        for sequence in sorted(group, key=lambda each: lengths[each.slot]):
            last = parts[-1] if parts else []
            is_enough = len(last) * width >= ROWS_OF_ONE_LENGTH
            if not last or (is_enough and lengths[last[-1].slot] != lengths[sequence.slot]):
                parts.append([])
            parts[-1].append(sequence)
        return [sorted(part, key=lambda each: each.slot) for part in parts]

    @torch.inference_mode()
    def _forward(self, group: list[_Sequence]) -> list[Prediction | None]:
        """Run one group's forward; each sequence's prediction, None for one whose prefill goes on."""
        forwards = [sequence.running() for sequence in group]
        kind, slots = forwards[0].kind, [sequence.slot for sequence in group]
        reads = [False] * len(group)
        if kind == "prefill":
            ids = [forward.token_ids for forward in forwards]
            read_last = any(forward.wanted for forward in forwards)
            logits = self.model.prefill(self._cache, slots, ids, read_last=read_last)
            if logits is None:
                return [self._result(each, forward, [], []) for each, forward in zip(group, forwards, strict=True)]
            logits = logits.unsqueeze(1)
        elif kind == "reused":
            logits = torch.stack([_kept_logits(sequence, sequence.running().wanted) for sequence in group])
        else:
            logits, reads = self._run_block(group, forwards, slots)
            for sequence, forward in zip(group, forwards, strict=True):
                if forward.kind == "commit":
                    self.model.commit(self._cache, sequence.slot)
                    sequence.kept, sequence.stored = range(0), {}  # they were the finished block's
        predicted = self._predict(group, forwards, logits)
        return [
            None if sequence.is_prefilling else self._result(sequence, sequence.asked(), *found, read=read)
            for sequence, found, read in zip(group, predicted, reads, strict=True)
        ]

    def _run_block(
        self, group: list[_Sequence], forwards: list[Forward], slots: list[int]
    ) -> tuple[Tensor, list[bool]]:
        """Logits (B, R, V) of a group's block rows, and for which sequences stored values stood in for layers."""
        heads = [forward.rows_of(forward.held) for forward in forwards]
        most = max(map(len, heads))
        read = [rows + [rows[-1] if rows else 0] * (most - len(rows)) for rows in heads]
        store, reads = None, [False] * len(group)
        reuse = forwards[0].reuse
        if reuse is not None:
            store = self._store(reuse)
            if reuse.order:
                ahead = [forward.reuse.ahead if forward.reuse else 0.0 for forward in forwards]
                device, dtype = store.ahead.device, store.ahead.dtype
                store.ahead[_index(slots, store.ahead)] = torch.tensor(ahead, dtype=dtype).to(device, non_blocking=True)

        def choose(entering: Tensor, cache_rows: Tensor, block_rows: Tensor) -> list[bool]:
            asks = [forward.reuse for forward in forwards if forward.reuse is not None]
            reads[:] = [ask.read for ask in asks]
            if store is not None and any(ask.decide for ask in asks):
                drifts = store.drift(entering, cache_rows, block_rows, self._wanted_rows(forwards, entering.device))
                reads[:] = [
                    ask.decide(drift) if ask.decide else ask.read
                    for ask, drift in zip(asks, drifts.tolist(), strict=True)  # the decision's own transfer
                ]
            return reads

        ids, offsets = [forward.token_ids for forward in forwards], [forward.offset for forward in forwards]
        if self._arena is not None:
            logits = self._arena.run_block(slots, ids, offsets, read, store=store, choose=choose)
        else:
            logits = self.model.run_block(self._cache, slots, ids, offsets, read, store=store, choose=choose)
        if reuse is not None:
            for sequence, forward, was_read in zip(group, forwards, reads, strict=True):
                if not was_read:
                    rows = range(forward.offset, forward.offset + len(forward.token_ids))
                    sequence.stored.setdefault(_store_key(reuse), Counter()).update(rows)
        return logits, reads

    def _wanted_rows(self, forwards: list[Forward], device: torch.device) -> Tensor:
        """(B, R) rows of the window that the predictions wanted are read at: what the drift is measured over."""
        widths = {len(forward.wanted) for forward in forwards}
        if len(widths) > 1:
            raise ValueError(f"forwards that decide together want equally many positions, not {sorted(widths)}")
        rows = [forward.rows_of(forward.wanted) for forward in forwards]
        return torch.tensor(rows).to(device, non_blocking=True)

    def _store(self, reuse: Reuse) -> LayerStore:
        key = _store_key(reuse)
        if key not in self._stores:
            if not 0 <= reuse.layers.start < reuse.layers.stop <= self.num_layers:
                raise ValueError(f"layers {reuse.layers} are not within the model's {self.num_layers}")
            like = self.model.model.hidden_like()
            rows, size = self._cache.batch_size, self.options.block_size
            self._stores[key] = LayerStore(reuse.layers, reuse.part, rows, size, like, reuse.order)
        return self._stores[key]

    def _predict(
        self, group: list[_Sequence], forwards: list[Forward], logits: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Logits (B, R, V) to what each sequence's wanted positions predict, in one device-to-host transfer.

        What is kept for later steps stays with the sequence: greedy predictions of all positions that are kept, or,
        where tokens are drawn, their logits.
        """
        flat = logits.flatten(0, 1)  # (B * R, V)
        greedy: list[int] = []  # rows of `flat`, in the sequences' order
        drawn: list[int] = []
        uniforms: list[Tensor] = []
        for index, (sequence, forward) in enumerate(zip(group, forwards, strict=True)):
            held = forward.held
            begin = index * logits.shape[1]
            if self._is_drawn(forward):
                start = begin + forward.wanted.start - held.start
                drawn += range(start, start + len(forward.wanted))
                uniforms.append(torch.rand(len(forward.wanted), generator=sequence.generator))
                if forward.kind != "reused":
                    # a copy: a graph writes its logits to the same place each time
                    sequence.kept, sequence.kept_logits = held, logits[index, : len(held)].clone()
            else:
                greedy += range(begin, begin + len(held))
        if self._arena is not None and not drawn and forwards[0].kind != "prefill":
            found = self._arena.greedy(self.options.mask_id)
        else:
            found = torch.zeros(3, len(flat), dtype=torch.float64, device=flat.device)
            for rows, settings in (
                (greedy, (0.0, 1.0, None)),
                (drawn, (self.temperature, self.top_p, torch.cat(uniforms) if drawn else None)),
            ):
                if rows:
                    picked = _index(rows, flat)
                    found[:2, picked] = self._candidates(flat[picked], *settings)
            found[2] = is_finite(flat)
        tokens, confidences, finite = found.tolist()  # the forward's one transfer
        if not all(finite):
            raise non_finite(f"a {forwards[0].kind} forward", flat.dtype)
        results = []
        for index, (sequence, forward) in enumerate(zip(group, forwards, strict=True)):
            held = forward.held
            begin = index * logits.shape[1]
            known = [int(token) for token in tokens[begin : begin + len(held)]], confidences[begin : begin + len(held)]
            if held and held.start == forward.offset and forward.kind not in ("reused", "prefill"):
                # nothing stands before a window's first position, so nothing predicts it; see Answer.fill
                known[0][0], known[1][0] = self.options.mask_id, -1.0
            if forward.keep and not self._is_drawn(forward):
                sequence.kept, sequence.kept_predictions = held, known
            of_step = _within(forward.wanted, held)
            results.append((known[0][of_step], known[1][of_step]))
        return results

    def _candidates(self, logits: Tensor, temperature: float, top_p: float, uniforms: Tensor | None) -> Tensor:
        """Logits (R, V) to candidate tokens and their confidences, (2, R) in float64, which holds every token id."""
        if uniforms is not None:
            uniforms = uniforms.to(logits.device, non_blocking=True)
        return torch.stack(
            [each.double() for each in predict(logits, self.options.mask_id, temperature, top_p, uniforms)]
        )

    def _result(
        self, sequence: _Sequence, forward: Forward, tokens: list[int], confidences: list[float], read: bool = False
    ) -> Prediction:
        """The prediction, and its forward added to the answer's cost. A re-read has none, `Answer.fill` counts it."""
        kind, at_rest = forward.kind, range(0)
        if kind == "reused":
            return Prediction(kind, tokens, confidences, range(self.num_layers))
        if read and forward.reuse is not None:
            kind, at_rest = "partial", forward.reuse.layers
        at_mlp = forward.reuse is not None and forward.reuse.part == "mlp"
        layers = self.num_layers - len(at_rest) * (self._mlp_share if at_mlp else 1.0)
        sequence.answer.count(kind, layers, layers * len(forward.token_ids))
        return Prediction(kind, tokens, confidences, at_rest)

    @cached_property
    def _mlp_share(self) -> float:
        """How much of a layer its MLP is, by its weights."""
        layer = self.model.model.layers[0]
        assert isinstance(layer, DecoderLayer), "ModuleList does not say what it holds"
        weights = [sum(parameter.numel() for parameter in part.parameters()) for part in (layer.mlp, layer)]
        return weights[0] / weights[1]


def _of_like_length(prefills: list[_Sequence]) -> list[list[_Sequence]]:
    """Prefills that run together: none is more than `PADDED_TOKENS` shorter than the longest of its group, whose length
    they are padded to."""
    groups: list[list[_Sequence]] = []
    longest = 0
    for sequence in sorted(prefills, key=lambda each: -len(each.asked().token_ids)):
        length = len(sequence.asked().token_ids)
        if not groups or longest - length > PADDED_TOKENS:
            groups.append([])
            longest = length
        groups[-1].append(sequence)
    return groups


def _store_key(reuse: Reuse) -> Store:
    return reuse.layers, reuse.part, reuse.order


def _within(positions: range, held: range) -> slice:
    """Where `positions` stand in a list over the positions `held`."""
    return slice(positions.start - held.start, positions.stop - held.start)


def _kept_logits(sequence: _Sequence, positions: range) -> Tensor:
    """(positions, V) of the logits that an earlier step kept."""
    assert sequence.kept_logits is not None, "a step that reads again was checked against what is kept"
    return sequence.kept_logits[_within(positions, sequence.kept)]


def _index(rows: list[int], like: Tensor) -> Tensor | slice:
    """An index of rows of `like`: without a copy where it is all of them."""
    if rows == list(range(len(like))):
        return slice(None)
    return torch.tensor(rows).to(like.device, non_blocking=True)


def row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int, temperature: float
) -> Sequence[torch.Generator | None]:
    """One CPU random stream for each of a call's prompts, or None where nothing is drawn.

    A single `generator` (default: torch's) gives each row the same seed, drawn once per call, so a row gets what it
    would get alone; a sequence of generators, one a prompt, makes equal prompts differ. Raises ValueError for a wrong
    number of them.
    """
    if temperature == 0:
        return [None] * num_rows
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        return [torch.Generator().manual_seed(seed) for _ in range(num_rows)]
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} prompts")
    return list(generator)
