"""Records what a policy sees and does, step by step, without a change to the policy or to the engine.

A policy is a coroutine, so a second coroutine around it sees everything that goes in and out: the forwards that it asks
for, the predictions that it is sent, and its events. It passes them on as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fast_dllm.decoding import FORWARD_KINDS, Answer, DecodeOne, DenoisingEvent, Forward, Options, Policy, Prediction
from fast_dllm.record.traces import MOST_ANSWER_BYTES

DIGITS = 6  # of a confidence, after the point
STEP_BYTES, CANDIDATE_BYTES = 150, 24  # of a step and of one of its candidates as JSON, about

Finished = Callable[[int, dict[str, Any]], None]


def traced(decode_one: DecodeOne, finished: Finished) -> DecodeOne:
    """Wrap a policy so that it calls finished(row, trace) just before the last event of each answer.

    row: the prompt's index. trace: num_prompt, steps, and whether steps were left out (docs/traces.md).
    """

    def decode_and_trace(answer: Answer, options: Options) -> Policy:
        recorder = StepRecorder(answer, options)
        policy = decode_one(answer, options)
        prediction: Any = None
        while True:
            try:
                item = next(policy) if prediction is None else policy.send(prediction)
            except StopIteration:
                return
            if isinstance(item, DenoisingEvent):
                recorder.record(item)
                if item.generation is not None:
                    finished(answer.row, recorder.trace())
                prediction = yield item
            else:
                prediction = yield item
                recorder.see(item, prediction)

    return decode_and_trace


class StepRecorder:
    """The steps of one answer, at most about MOST_ANSWER_BYTES of them as JSON."""

    def __init__(self, answer: Answer, options: Options):
        self._answer, self._options = answer, options
        self._steps: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._is_cut = False
        self._step: dict[str, Any] | None = None  # what was predicted last, until an event says what was unmasked
        self._step_start = time.perf_counter()

    def see(self, forward: Forward, prediction: Prediction) -> None:
        """Note a forward and what it predicts for the positions that are masked now.

        A forward that no event follows becomes a step of its own if it ran layers, and is dropped if it ran none.
        """
        if self._step is not None and FORWARD_KINDS[self._step["kind"]].runs_layers:
            self._add(self._step)
        answer, mask_id, start = self._answer, self._options.mask_id, self._start_of_rows(forward)
        positions, tokens, confidences = [], [], []
        for row, token, confidence in zip(forward.wanted, prediction.tokens, prediction.confidences, strict=True):
            position = start + row  # behind the end: the first position of a block that is not open yet
            is_open = position >= len(answer.tokens) or answer.is_masked(position)
            # The mask's token is never a candidate: no row predicts a window's first position.
            if is_open and token != mask_id:
                positions.append(position)
                tokens.append(token)
                confidences.append(round(confidence, DIGITS))
        num_rows = len(forward.token_ids) if FORWARD_KINDS[prediction.kind].runs_layers else 0
        now = time.perf_counter()
        self._step = {
            "kind": prediction.kind,
            "ms": round(1000 * (now - self._step_start), 3),
            "rows": [forward.offset, forward.offset + num_rows] if num_rows else None,
            "rest": _ends(prediction.layers_at_rest),
            "seen": [{"positions": positions, "tokens": tokens, "confidences": confidences}],
        }
        self._step_start = now

    def record(self, event: DenoisingEvent) -> None:
        """Add the step that an event ends."""
        nothing = {"kind": event.kind, "ms": 0.0, "rows": None, "rest": _ends(event.layers_at_rest), "seen": []}
        step, self._step = self._step or nothing, None
        filled = {"positions": event.positions, "tokens": event.tokens}
        self._add({**step, "window": [event.start, event.end], "filled": filled})

    def trace(self) -> dict[str, Any]:
        return {"num_prompt": self._answer.num_prompt, "is_cut": self._is_cut, "steps": self._steps}

    def _add(self, step: dict[str, Any]) -> None:
        self._num_bytes += STEP_BYTES + CANDIDATE_BYTES * sum(len(state["positions"]) for state in step["seen"])
        self._is_cut = self._is_cut or self._num_bytes > MOST_ANSWER_BYTES
        if not self._is_cut:
            self._steps.append(step)

    def _start_of_rows(self, forward: Forward) -> int:
        """Absolute position of a forward's row 0. The open block is the last one of the answer."""
        size = self._options.block_size
        return 0 if forward.kind == "prefill" else (len(self._answer.tokens) - 1) // size * size


def _ends(layers: range) -> list[int]:
    return [layers.start, layers.stop] if layers else []
