"""Whose answer is at work, so that a visitor can end it, and who waits."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import gradio as gr


@dataclasses.dataclass
class Turn:
    """One visitor's answer, from the click until its last token."""

    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    began: bool = False  # it has left the queue
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)


class Turns:
    """Which visitor has an answer at work, so that it can be ended between two forwards.

    Gradio's own `cancels` tears a generator down in mid-forward, and the page may then show "Error" for what a visitor
    asked for. Here Stop sets a flag that the answer reads after each frame, and waits until it has ended.
    """

    WAIT_SECONDS = 30.0  # for the forward at work; longer than any on a machine that can run the page

    def __init__(self) -> None:
        self._turns: dict[str | None, Turn] = {}  # by visitor

    def begin(self, request: gr.Request) -> int:
        """Take the visitor's turn; how many of others come before it. gr.Error, which the page shows, while the visitor
        has one already."""
        if request.session_hash in self._turns:
            told = "the answer before is still being written: wait for it or press Stop"
            raise gr.Error(told, title="One at a time", print_exception=False)
        before = len(self._turns)
        self._turns[request.session_hash] = Turn()
        return before

    def stop(self, request: gr.Request) -> None:
        """End the visitor's answer, also one that waits in the queue. Returns once nothing more of it can arrive."""
        turn = self._turns.get(request.session_hash)
        if turn is not None:
            turn.stop.set()
            if turn.began:
                turn.ended.wait(self.WAIT_SECONDS)

    def forget(self, request: gr.Request) -> None:
        """The visitor's page was closed."""
        turn = self._turns.pop(request.session_hash, None)
        if turn is not None:
            turn.stop.set()

    @contextlib.contextmanager
    def at_work(self, request: gr.Request | None) -> Iterator[threading.Event]:
        """The flag that the visitor's answer reads; the turn ends with the block."""
        visitor = None if request is None else request.session_hash
        turn = self._turns.setdefault(visitor, Turn())
        turn.began = True
        try:
            yield turn.stop
        finally:
            self._turns.pop(visitor, None)
            turn.ended.set()
