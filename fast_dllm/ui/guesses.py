"""The guesses that ran beside an answer's forwards, for the layer view: their tokens, and which of them were used.

An event of decoding says only how many guesses ran. So a second coroutine around the policy watches its forwards and
passes everything on as it is.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.decoding import FORWARD_KINDS, GUESSED_KINDS, Answer, DecodeOne, Forward, Options, Policy, Prediction

WORDS = {"step": "next step", "commit": "finished block", "opening": "next block"}  # by decoding.GUESSES


@dataclass(frozen=True)
class Guess:
    """A state that ran as a guess. kind: one of decoding.GUESSES. text: the tokens that its forward did not have."""

    kind: str
    text: str


class GuessWatcher:
    """Sees the forwards of one answer. decode: token ids -> text.

    guesses: those of the last forward that ran layers. used: which of them, counted from 0, answered the last forward
    that the policy asked for; None where this forward ran.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.guesses: tuple[Guess, ...] = ()
        self.used: int | None = None
        self._decode = decode
        self._states: tuple[Forward, ...] = ()  # the guesses as forwards

    def watch(self, decode_one: DecodeOne) -> DecodeOne:
        """The policy, whose forwards this object sees."""

        def decode_and_watch(answer: Answer, options: Options) -> Policy:
            policy = decode_one(answer, options)
            prediction: Any = None
            while True:
                try:
                    item = next(policy) if prediction is None else policy.send(prediction)
                except StopIteration:
                    return
                prediction = yield item
                if isinstance(item, Forward):
                    self._see(item, prediction, options.mask_id)

        return decode_and_watch

    def _see(self, forward: Forward, prediction: Prediction, mask_id: int) -> None:
        self.used = None
        if prediction.kind in GUESSED_KINDS.values():
            asked = forward.kind, forward.token_ids
            self.used = [(state.kind, state.token_ids) for state in self._states].index(asked)
        elif FORWARD_KINDS[prediction.kind].runs_layers:
            self._states = forward.guesses
            self.guesses = tuple(
                Guess(state.guess_kind, self._decode(_new_tokens(state, forward, mask_id))) for state in forward.guesses
            )


def _new_tokens(guess: Forward, forward: Forward, mask_id: int) -> list[int]:
    """The tokens of a guess where the forward that it ran in has masks; of a next block, all tokens."""
    is_next_block = guess.continues is not None
    return [
        token
        for token, before in zip(guess.token_ids, forward.token_ids, strict=True)
        if token != mask_id and (is_next_block or before == mask_id)
    ]


def guesses_html(number: int, guesses: Sequence[Guess], used: Sequence[int], shown: int | None, is_known: bool) -> str:
    """One line for each guess that ran in the forward of this number; empty without guesses.

    used: places of those that were used. shown: the one that answered the step on show. is_known: whether decoding
    has gone past this forward, so that a guess that was not used will not be.
    """
    lines = []
    for place, guess in enumerate(guesses):
        result = "used" if place in used else "not used" if is_known else "not known yet"
        here = ", in this step" if place == shown else ""
        text = html.escape(guess.text.replace("\n", "⏎")) or "no new token"
        lines.append(
            f"<div class='guess' data-result='{result}'>{WORDS[guess.kind]}: <span class='c'>{text}</span> "
            f"{result}{here}</div>"
        )
    return f"<div class='guesses'>Guesses that ran in forward {number}:{''.join(lines)}</div>" if lines else ""
