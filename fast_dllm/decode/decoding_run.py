"""One run of the engine: admits prompts to cache rows, runs their forwards in groups, and sends each its prediction.

A run holds all state, so that two runs of one engine can go on side by side. Each forward costs one device-to-host
transfer, and one more where a policy decides in mid-forward whether layers run. forwards.py says what goes into a
forward, predictions.py what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from fast_dllm.decode.checks import check_forward
from fast_dllm.decode.forwards import Batch, batch_of, block_rows, choose_store, set_extrapolation
from fast_dllm.decode.grouping import Group, GroupMember, PendingForward, group_forwards
from fast_dllm.decode.predictions import predict_states
from fast_dllm.decode.sequences import RunGuess, RunSettings, SequenceState, StatePrediction
from fast_dllm.decoding import FORWARD_KINDS, GUESSED_KINDS, Answer, DenoisingEvent, Forward, Prediction
from fast_dllm.network.executor import Executor


@dataclass(frozen=True)
class Prompt:
    """Token ids to be answered, and the random stream that the answer is drawn from where tokens are sampled."""

    token_ids: list[int]
    generator: torch.Generator | None = None


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

        Greedy predictions are read again right here, and so are those of a guess, because that costs nothing.
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
            forward = check_forward(sequence, item)
            guess = sequence.matching_guess(forward, self._executor.cache.lengths[sequence.cache_row])
            if guess is not None:
                forward = self._accept(sequence, guess, forward)
            elif FORWARD_KINDS[forward.kind].runs_layers:
                sequence.guesses = []  # they were of the forward before
            if FORWARD_KINDS[forward.kind].runs_layers or self._settings.is_drawn(forward):
                sequence.waiting = forward
                return
            prediction = self._prediction(sequence, forward, [sequence.readable])

    @torch.inference_mode()
    def _accept(self, sequence: SequenceState, guess: RunGuess, forward: Forward) -> Forward:
        """Use a guess in place of the forward that the policy asks for. Returns the step that reads its predictions."""
        sequence.answer.count_guesses(accepted=[guess.forward])
        sequence.is_block_cached = False  # a guess runs in scratch room
        if forward.kind == "commit":
            self._executor.commit(sequence.cache_row, guess.slot)
            sequence.forget_block()
        sequence.readable = guess.prediction
        return Forward(GUESSED_KINDS[forward.kind], wanted=forward.wanted)

    def _groups(self) -> list[Group]:
        lengths = self._executor.cache.lengths
        pending = [
            PendingForward(cache_row, sequence.pending(), lengths[cache_row], sequence.num_prefilled)
            for cache_row, sequence in self._active.items()
        ]
        return group_forwards(pending, self._options.block_size, pays_by_row=self._executor.pays_by_row)

    # -- one group ---------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def _run_group(self, group: Group) -> list[Prediction | None]:
        """Run one group's forward. Returns each member's prediction, None for one whose prefill has blocks left."""
        sequences = [self._active[member.cache_row] for member in group]
        batch = batch_of(sequences, [member.forward for member in group])
        kind = batch[0].forward.kind
        reads_store = [False] * len(group)
        logits: Tensor | None
        if kind == "prefill":
            logits = self._run_prefill(batch)
        elif FORWARD_KINDS[kind].runs_layers:
            logits, reads_store = self._run_block(batch)
        else:
            logits = _readable_logits(batch)
        if logits is None:
            states = [StatePrediction()] * len(batch)
        else:
            states = predict_states(batch, logits, self._executor, self._settings)
        remaining, predictions = iter(states), []
        for member, sequence, reads in zip(group, sequences, reads_store, strict=True):
            states_of_member = list(islice(remaining, len(member.forward.states)))
            predictions.append(self._finish(sequence, member, states_of_member, reads))
        return predictions

    def _run_prefill(self, batch: Batch) -> Tensor | None:
        """Logits (B, 1, V) of each prompt's last token, None if no sequence wants them."""
        cache_rows = [entry.sequence.cache_row for entry in batch]
        token_ids = [entry.forward.token_ids for entry in batch]
        is_wanted = any(entry.forward.wanted for entry in batch)
        logits = self._executor.prefill(
            cache_rows, token_ids, read=[len(ids) - 1 for ids in token_ids] if is_wanted else None
        )
        return None if logits is None else logits.unsqueeze(1)

    def _run_block(self, batch: Batch) -> tuple[Tensor, list[bool]]:
        """Logits (B, R, V) of block rows, and for each sequence whether its layers were replaced by a store."""
        block = block_rows(batch)
        asked = [entry for entry in batch if not entry.is_guess]
        reads_store = [False] * len(asked)
        reuse = batch[0].forward.reuse  # forwards of one group have the same store or none
        if reuse is None:
            logits = self._executor.run_block(block)
        else:
            store = self._executor.store(*reuse.store_key)
            if reuse.order:
                set_extrapolation(store, batch)

            def choose(entering: Tensor, cache_rows: Tensor, rows: Tensor) -> list[bool]:
                reads_store[:] = choose_store(store, batch, entering, cache_rows, rows)
                return reads_store

            logits = self._executor.run_block(block, store=store, choose=choose)
            for entry, reads in zip(asked, reads_store, strict=True):
                if not reads:
                    entry.sequence.count_stored(entry.forward)
        for entry in asked:
            self._update_cache(entry.sequence, entry.forward, is_in_scratch=block.candidates is not None)
        return logits, reads_store

    def _update_cache(self, sequence: SequenceState, forward: Forward, is_in_scratch: bool) -> None:
        """Commit the block that a forward has run, or copy it to the block cache.

        is_in_scratch: the keys and values were written to scratch room, because a sequence of the group has guesses.
        """
        slot = sequence.slot(0) if is_in_scratch else None
        sequence.is_block_cached = not forward.guesses
        if forward.kind == "commit":
            self._executor.commit(sequence.cache_row, slot)
            sequence.forget_block()
        elif slot is not None and sequence.is_block_cached:
            self._executor.cache.copy_slot_to_block(sequence.cache_row, slot)

    def _finish(
        self, sequence: SequenceState, member: GroupMember, states: list[StatePrediction], reads_store: bool
    ) -> Prediction | None:
        """Keep what a sequence may read again. Returns its prediction, None if its prefill has blocks left.

        states: the predictions of the member's forward and of its guesses.
        """
        forward = member.forward
        if FORWARD_KINDS[forward.kind].runs_layers:
            if forward.keep or self._settings.is_drawn(forward):
                sequence.readable = states[0]
            sequence.guesses = self._guesses(sequence, forward, member.length, states[1:])
        pending = sequence.pending()
        if member.is_prefill_block:
            sequence.num_prefilled += len(forward.token_ids)
            if sequence.num_prefilled < len(pending.token_ids):
                return None
            sequence.num_prefilled = 0
            states = [replace(states[0], positions=pending.wanted)]
        return self._prediction(sequence, pending, states, reads_store)

    def _guesses(
        self, sequence: SequenceState, forward: Forward, start: int, predictions: list[StatePrediction]
    ) -> list[RunGuess]:
        """The guesses that ran beside a forward. start: first position of its block."""
        guesses = []
        for number, (guess, prediction) in enumerate(zip(forward.guesses, predictions, strict=True), 1):
            previous_block, guess_start = None, start
            if guess.continues is not None:
                previous_block = forward.states[guess.continues].token_ids
                guess_start += self._options.block_size
            guesses.append(RunGuess(guess, guess_start, previous_block, sequence.slot(number), prediction))
        return guesses

    def _prediction(
        self, sequence: SequenceState, forward: Forward, states: list[StatePrediction], reads_store: bool = False
    ) -> Prediction:
        """What the policy is sent. A forward that runs layers is added to the answer's cost; `Answer.fill` counts the
        other steps. states: the predictions of the forward and of its guesses."""
        wanted = states[0].at(forward.wanted)
        num_layers = self._settings.num_layers
        if not FORWARD_KINDS[forward.kind].runs_layers:
            return Prediction(forward.kind, wanted.tokens, wanted.confidences, range(num_layers))
        kind, layers_at_rest, num_layers_run = forward.kind, range(0), float(num_layers)
        if reads_store and forward.reuse is not None:
            kind, layers_at_rest = "partial", forward.reuse.layers
            saved = self._settings.mlp_share if forward.reuse.part == "mlp" else 1.0
            num_layers_run -= len(layers_at_rest) * saved
        num_rows = sum(len(state.token_ids) for state in forward.states)
        sequence.answer.count(kind, num_layers_run, num_layers_run * num_rows)
        sequence.answer.count_guesses(offered=forward.guesses)
        state_predictions = tuple(
            Prediction(state.kind, predicted.tokens, predicted.confidences)
            for state, predicted in zip(forward.states, states, strict=True)
        )
        return Prediction(kind, wanted.tokens, wanted.confidences, layers_at_rest, wanted.measures, state_predictions)


def _readable_logits(batch: Batch) -> Tensor:
    """(B, R, V) of the logits that these sequences read again, to draw other tokens from them."""
    logits = []
    for entry in batch:
        readable = entry.sequence.readable.at(entry.forward.wanted)
        assert readable.logits is not None, "`check_forward` compared the step with what can be read"
        logits.append(readable.logits)
    return torch.stack(logits)
