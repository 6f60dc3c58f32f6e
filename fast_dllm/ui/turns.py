"""Whose answer is at work, so that a visitor can end it, and who waits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator

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

    LOOK_SECONDS = 0.2  # between two looks at one's place in the queue
    WAIT_SECONDS = 30.0  # for the forward at work; longer than any on a machine that can run the page

    def __init__(self) -> None:
        self._turns: dict[str | None, Turn] = {}  # by visitor

    def begin(self, request: gr.Request) -> None:
        """Take the visitor's turn. gr.Error, which the page shows, while the visitor has one already."""
        if request.session_hash in self._turns:
            told = "the answer before is still being written: wait for it or press Stop"
            raise gr.Error(told, title="One at a time", print_exception=False)
        self._turns[request.session_hash] = Turn()

    async def places(self, request: gr.Request) -> AsyncIterator[int]:
        """How many of others come before the visitor, anew whenever that changes, until it is the visitor's turn."""
        told = 0
        while before := self._before(request.session_hash):
            if before != told:
                yield (told := before)
            await asyncio.sleep(self.LOOK_SECONDS)

    def _before(self, visitor: str | None) -> int:
        turns = list(self._turns.items())  # in the order in which they were taken
        mine = next((number for number, (each, _) in enumerate(turns) if each == visitor), None)
        return 0 if mine is None or turns[mine][1].began or turns[mine][1].stop.is_set() else mine

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
