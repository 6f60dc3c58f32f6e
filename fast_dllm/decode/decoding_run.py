"""One run of the engine: admits prompts to cache rows, runs their forwards in groups, and sends each its prediction.

A run holds all state, so that two runs of one engine can go on side by side. Each forward costs one device-to-host
transfer, and one more where a policy decides in mid-forward whether layers run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fast_dllm.decode.grouping import Group, PendingForward, group_forwards
from fast_dllm.decode.sequences import RunGuess, SequenceState, slice_of
from fast_dllm.decoding import (
    FORWARD_KINDS,
    GUESSED_KINDS,
    MOST_STATES,
    Answer,
    DenoisingEvent,
    Forward,
    Options,
    Policy,
    Prediction,
)
from fast_dllm.errors import non_finite
from fast_dllm.layer_reuse import LayerStore
from fast_dllm.network.executor import Choice, Executor
from fast_dllm.network.packing import BlockRows, Candidate
from fast_dllm.sampling import MEASURES, measures, predict

DecodeOne = Callable[[Answer, Options], Policy]
Predicted = tuple[list[int], list[float], list[float]]  # tokens, confidences, and what `Forward.measure` asked for


@dataclass(frozen=True)
class Prompt:
    """Token ids to be answered, and the random stream that the answer is drawn from where tokens are sampled."""

    token_ids: list[int]
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class RunSettings:
    """What all sequences of a run have in common.

    temperature: 0 is greedy; else tokens are drawn from the `top_p` nucleus. mlp_share: the share of a layer's weights
    that its MLP has; so much of a layer is saved where only its MLP does not run.
    """

    decode_one: DecodeOne
    options: Options
    temperature: float
    top_p: float
    num_layers: int
    mlp_share: float


class DecodingRun:
    """Answers prompts over one executor, as many side by side as its cache was asked for (`num_rows`)."""

    def __init__(self, executor: Executor, settings: RunSettings, prompts: Sequence[Prompt], num_rows: int):
        self._executor, self._settings, self._options = executor, settings, settings.options
        self._queue = deque(enumerate(prompts))
        self._free_rows = list(range(num_rows))
        self._active: dict[int, SequenceState] = {}  # by cache row

    def events(self) -> Iterator[DenoisingEvent]:
        """The events of all answers as they happen."""
        while self._queue or self._active:
            while self._free_rows and self._queue:
                sequence = self._admit(*self._queue.popleft())
                yield from self._advance(sequence, None)
            for group in self._groups():
                for member, prediction in zip(group, self._run_group(group), strict=True):
                    if prediction is not None:
                        yield from self._advance(self._active[member.cache_row], prediction)

    def _admit(self, index: int, prompt: Prompt) -> SequenceState:
        """Start the next prompt in a free row of the cache."""
        cache_row = self._free_rows.pop(0)
        self._executor.cache.lengths[cache_row] = 0
        answer = Answer(index, prompt.token_ids, self._options, self._settings.num_layers)
        policy = self._settings.decode_one(answer, self._options)
        sequence = self._active[cache_row] = SequenceState(answer, policy, prompt.generator, cache_row)
        return sequence

    def _advance(self, sequence: SequenceState, prediction: Prediction | None) -> Iterator[DenoisingEvent]:
        """Send a sequence its prediction and pass on its events, until it waits for a forward or has ended.

        Greedy predictions that were kept are read again right here, and so are those of a guess: that costs nothing.
        """
        sequence.waiting = None
        while True:
            try:
                item = next(sequence.policy) if prediction is None else sequence.policy.send(prediction)
            except StopIteration:
                self._free_rows.append(self._active.pop(sequence.cache_row).cache_row)
                return
            prediction = None
            if isinstance(item, DenoisingEvent):
                yield item
                continue
            forward = sequence.check(item)
            guess = sequence.run_guess(forward, self._executor.cache.lengths[sequence.cache_row])
            if guess is not None:
                forward = self._accept(sequence, guess, forward)
            elif FORWARD_KINDS[forward.kind].runs_layers:
                sequence.guesses = []  # they were of the forward before
            if FORWARD_KINDS[forward.kind].runs_layers or self._is_drawn(forward):
                sequence.waiting = forward
                return
            prediction = self._prediction(sequence, forward, (*sequence.reread(forward.wanted), []))

    @torch.inference_mode()
    def _accept(self, sequence: SequenceState, guess: RunGuess, forward: Forward) -> Forward:
        """Use a guess in place of the forward that the policy asks for. Returns the step that reads its predictions."""
        sequence.keep(guess)
        sequence.answer.count_guesses(accepted=[guess.forward])
        read_again = Forward(GUESSED_KINDS[forward.kind], wanted=forward.wanted)
        if forward.kind == "commit":
            self._executor.commit(sequence.cache_row, guess.slot)
        return read_again

    def _is_drawn(self, forward: Forward) -> bool:
        """Whether tokens of this forward are sampled. The first token of a block is greedy at any temperature."""
        return self._settings.temperature > 0 and FORWARD_KINDS[forward.kind].step

    def _groups(self) -> list[Group]:
        lengths = self._executor.cache.lengths
        pending = [
            PendingForward(cache_row, sequence.pending(), lengths[cache_row], sequence.num_prefilled)
            for cache_row, sequence in self._active.items()
        ]
        return group_forwards(pending, self._options.block_size, pays_by_row=self._executor.pays_by_row)

    @torch.inference_mode()
    def _run_group(self, group: Group) -> list[Prediction | None]:
        """Run one group's forward. Returns each member's prediction, None for one whose prefill has blocks left."""
        sequences = [self._active[member.cache_row] for member in group]
        forwards = [member.forward for member in group]
        states = [state for forward in forwards for state in forward.states]
        state_sequences = [each for each, forward in zip(sequences, forwards, strict=True) for _ in forward.states]
        starts = [self._executor.cache.lengths[member.cache_row] for member in group]  # of their blocks
        reads = [False] * len(group)
        if forwards[0].kind == "prefill":
            read_last = any(forward.wanted for forward in forwards)
            token_ids = [forward.token_ids for forward in forwards]
            logits = self._executor.prefill([member.cache_row for member in group], token_ids, read_last=read_last)
            if logits is None:
                return [self._prediction(*each, ([], [], [])) for each in zip(sequences, forwards, strict=True)]
            logits = logits.unsqueeze(1)
        elif not FORWARD_KINDS[forwards[0].kind].runs_layers:
            logits = torch.stack([each.reread_logits(each.pending().wanted) for each in sequences])
        else:
            logits, reads = self._run_block(group, sequences)
        own = _own_states(forwards)
        predicted = self._predict(state_sequences, states, own, logits)
        predictions: list[Prediction | None] = []
        for member, sequence, first, read, start in zip(group, sequences, own, reads, starts, strict=True):
            past = first + len(member.forward.states)
            if FORWARD_KINDS[member.forward.kind].runs_layers:
                guessed = slice(first + 1, past)
                self._keep_guesses(sequence, member.forward, start, predicted[guessed], logits[guessed])
            if member.is_prefill_block:
                sequence.num_prefilled += len(member.forward.token_ids)
                if sequence.num_prefilled < len(sequence.pending().token_ids):
                    predictions.append(None)
                    continue
                sequence.num_prefilled = 0
            predictions.append(self._prediction(sequence, sequence.pending(), *predicted[first:past], read=read))
        return predictions

    def _keep_guesses(
        self, sequence: SequenceState, forward: Forward, start: int, predicted: list[Predicted], logits: Tensor
    ) -> None:
        """Keep the predictions of a forward's guesses. start: first position of its block. logits (guesses, R, V)."""
        size = self._options.block_size
        sequence.guesses = []
        for number, (guess, one) in enumerate(zip(forward.guesses, predicted, strict=True), 1):
            before, guess_start = None, start
            if guess.continues is not None:
                before, guess_start = forward.states[guess.continues].token_ids, start + size
            # A copy, because an executor may write its logits to the same place each time.
            kept_logits = logits[number - 1, : len(guess.held)].clone() if self._is_drawn(guess) else None
            slot = _slot(sequence, number)
            sequence.guesses.append(RunGuess(guess, guess_start, before, slot, one[:2], kept_logits))

    def _run_block(self, group: Group, sequences: list[SequenceState]) -> tuple[Tensor, list[bool]]:
        """Logits (B, R, V) of a group's block rows, and for which sequences a store stood in for its layers."""
        forwards, cache_rows = [member.forward for member in group], [member.cache_row for member in group]
        block = _block_rows(forwards, sequences)
        in_scratch = block.candidates is not None
        reads = [False] * len(group)
        reuse = forwards[0].reuse
        if reuse is None:
            logits = self._executor.run_block(block)
        else:
            store = self._executor.store(*reuse.store_key)
            if reuse.order:
                _set_ahead(store, forwards, cache_rows)
            logits = self._executor.run_block(block, store=store, choose=_choice(store, forwards, reads))
            for sequence, forward, read in zip(sequences, forwards, reads, strict=True):
                if not read:
                    sequence.count_stored(forward)
        for sequence, forward in zip(sequences, forwards, strict=True):
            slot = _slot(sequence, 0) if in_scratch else None
            sequence.is_block_cached = not forward.guesses
            if forward.kind == "commit":
                self._executor.commit(sequence.cache_row, slot)
                sequence.forget_block()
            elif slot is not None and sequence.is_block_cached:  # it asked for no guesses; its neighbours did
                self._executor.cache.append_scratch(sequence.cache_row, slot)
        return logits, reads

    def _predict(
        self, sequences: list[SequenceState], forwards: list[Forward], own: list[int], logits: Tensor
    ) -> list[Predicted]:
        """Logits (B, R, V) -> predictions for all positions that each forward holds, in one device-to-host transfer.

        own: which of the forwards their sequences asked for; the others are guesses. Tokens are drawn for the wanted
        positions of the former only. What later steps may read again is kept with the sequence: greedy predictions of
        all positions that are kept or, where tokens are drawn, their logits. Raises NonFiniteError.
        """
        num_read = logits.shape[1]
        flat = logits.flatten(0, 1)  # (B * R, V)
        on_device = self._executor.greedy(flat, self._options.mask_id)
        is_own = set(own)
        drawn: list[int] = []  # rows of `flat`, in the sequences' order
        uniforms: list[Tensor] = []
        for index, (sequence, forward) in enumerate(zip(sequences, forwards, strict=True)):
            if index not in is_own or not self._is_drawn(forward):
                continue
            held, wanted = forward.held, forward.wanted
            first = index * num_read + wanted.start - held.start
            drawn += range(first, first + len(wanted))
            uniforms.append(torch.rand(len(wanted), generator=sequence.generator))
            if FORWARD_KINDS[forward.kind].runs_layers:
                # A copy, because an executor may write its logits to the same place each time.
                sequence.kept, sequence.kept_logits = held, logits[index, : len(held)].clone()
        if drawn:
            on_device = self._with_drawn(on_device, flat, drawn, torch.cat(uniforms))
        if any(forward.measure for forward in forwards):
            on_device = torch.cat((on_device, measures(flat, self._options.mask_id)))
        tokens, confidences, finite, *measured = on_device.tolist()  # the forward's one transfer
        if not all(finite):
            raise non_finite(f"a {forwards[0].kind} forward", flat.dtype)
        predicted = []
        for index, (sequence, forward) in enumerate(zip(sequences, forwards, strict=True)):
            held, first = forward.held, index * num_read
            known = [int(token) for token in tokens[first : first + len(held)]], confidences[first : first + len(held)]
            is_window = FORWARD_KINDS[forward.kind].runs_layers and forward.kind != "prefill"
            if held and held.start == forward.offset and is_window:
                # No row predicts a window's first position; see Answer.fill.
                known[0][0], known[1][0] = self._options.mask_id, -1.0
            if index in is_own and forward.keep and not self._is_drawn(forward):
                sequence.kept, sequence.kept_predictions = held, known
            numbers: list[float] = []
            if forward.measure:
                numbers = measured[MEASURES.index(forward.measure)][first : first + len(held)]
            predicted.append((*known, numbers))
        return predicted

    def _with_drawn(self, predictions: Tensor, logits: Tensor, rows: list[int], uniforms: Tensor) -> Tensor:
        """`predictions` (3, N) of logits (N, V), with the tokens of `rows` drawn by `uniforms` (len(rows),)."""
        picked = _index(rows, logits)
        uniforms = uniforms.to(logits.device, non_blocking=True)
        settings = self._settings
        tokens, confidences = predict(
            logits[picked], self._options.mask_id, settings.temperature, settings.top_p, uniforms
        )
        predictions = predictions.clone()
        predictions[0, picked], predictions[1, picked] = tokens.double(), confidences.double()
        return predictions

    def _prediction(
        self, sequence: SequenceState, forward: Forward, *predicted: Predicted, read: bool = False
    ) -> Prediction:
        """What the policy is sent. The forward is added to the answer's cost; `Answer.fill` counts a step that reads
        again. predicted: for all that the forward holds, then for its guesses. read: a store stood in for its layers.
        """
        kind, at_rest, num_layers = forward.kind, range(0), self._settings.num_layers
        tokens, confidences, numbers = predicted[0]
        picked = slice_of(forward.wanted, forward.held)
        if not FORWARD_KINDS[kind].runs_layers:
            return Prediction(kind, tokens, confidences, range(num_layers))
        if read and forward.reuse is not None:
            kind, at_rest = "partial", forward.reuse.layers
        saves_mlps_only = forward.reuse is not None and forward.reuse.part == "mlp"
        layers = num_layers - len(at_rest) * (self._settings.mlp_share if saves_mlps_only else 1.0)
        num_rows = sum(len(state.token_ids) for state in forward.states)
        sequence.answer.count(kind, layers, layers * num_rows)
        sequence.answer.count_guesses(offered=forward.guesses)
        states = tuple(Prediction(state.kind, *one[:2]) for state, one in zip(forward.states, predicted, strict=True))
        return Prediction(kind, tokens[picked], confidences[picked], at_rest, numbers[picked], states)


def _slot(sequence: SequenceState, number: int) -> int:
    """The scratch slot of a state of the sequence's forward. number: 0 for the forward, n for its n-th guess."""
    return sequence.cache_row * MOST_STATES + number


def _own_states(forwards: list[Forward]) -> list[int]:
    """The index of each forward's own state among all states that a group runs."""
    return list(accumulate((len(forward.states) for forward in forwards[:-1]), initial=0))


def _block_rows(forwards: list[Forward], sequences: list[SequenceState]) -> BlockRows:
    """All states of a group's forwards. They are candidates if one of the forwards has guesses."""
    states = [state for forward in forwards for state in forward.states]
    candidates: list[Candidate] = []
    for first, forward, sequence in zip(_own_states(forwards), forwards, sequences, strict=True):
        for number, state in enumerate(forward.states):
            continues = None if state.continues is None else first + state.continues
            candidates.append(Candidate(_slot(sequence, number), continues))
    return BlockRows(
        [sequence.cache_row for sequence, forward in zip(sequences, forwards, strict=True) for _ in forward.states],
        [state.token_ids for state in states],
        [state.offset for state in states],
        _padded([state.rows_of(state.held) for state in states]),
        candidates if len(states) > len(forwards) else None,
    )


def _padded(rows: list[list[int]]) -> list[list[int]]:
    """Lists of one length: the last number of each (0 of an empty one) is repeated."""
    longest = max(map(len, rows))
    return [each + [each[-1] if each else 0] * (longest - len(each)) for each in rows]


def _set_ahead(store: LayerStore, forwards: list[Forward], cache_rows: list[int]) -> None:
    """Write to the store how far each sequence extrapolates beyond its last stored values."""
    values = [forward.reuse.ahead if forward.reuse else 0.0 for forward in forwards]
    device, dtype = store.ahead.device, store.ahead.dtype
    ahead = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    store.ahead[_index(cache_rows, store.ahead)] = ahead


def _choice(store: LayerStore, forwards: list[Forward], reads: list[bool]) -> Choice:
    """A function that decides for each sequence whether the store replaces its layers, and writes this to `reads`."""

    def choose(entering: Tensor, cache_rows: Tensor, block_rows: Tensor) -> list[bool]:
        reuses = [forward.reuse for forward in forwards if forward.reuse is not None]
        reads[:] = [reuse.read for reuse in reuses]
        if any(reuse.decide for reuse in reuses):
            read_rows = _wanted_rows(forwards, entering.device)
            drifts = store.drift(entering, cache_rows, block_rows, read_rows).tolist()  # the decision's own transfer
            reads[:] = [
                reuse.decide(drift) if reuse.decide else reuse.read for reuse, drift in zip(reuses, drifts, strict=True)
            ]
        return reads

    return choose


def _wanted_rows(forwards: list[Forward], device: torch.device) -> Tensor:
    """(B, R) rows of the window that the wanted predictions are read at: the drift is measured over these."""
    counts = {len(forward.wanted) for forward in forwards}
    if len(counts) > 1:
        raise ValueError(f"forwards that decide together want equally many positions, not {sorted(counts)}")
    rows = [forward.rows_of(forward.wanted) for forward in forwards]
    return torch.tensor(rows).to(device, non_blocking=True)


def _index(rows: list[int], like: Tensor) -> Tensor | slice:
    """An index of rows of `like`: a slice, which copies nothing, where it is all of them."""
    if rows == list(range(len(like))):
        return slice(None)
    return torch.tensor(rows).to(like.device, non_blocking=True)
