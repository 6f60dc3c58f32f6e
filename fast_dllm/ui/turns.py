"""Whether a visitor's answer waits or is being written, so that it can be stopped and no second one is asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

WAIT_SECONDS = 30.0  # for the forward at work; longer than any on a machine that can run the page


@dataclass
class Turn:
    """One visitor's answer. It is kept in the visitor's own session; the order of visitors is that of gradio's queue.

    asked: the answer waits in the queue or is being written. running: it is being written. stop: it is to end.

    Gradio's own `cancels` ends a generator within a forward, and the page may then show "Error" for what a visitor
    asked for. Here Stop sets a flag, which the answer reads after each frame, and waits until the answer has ended.
    """

    asked: bool = False
    running: bool = False
    stop: bool = False

    def begin(self) -> bool:
        """An answer is asked for. Returns whether it can be: False while an earlier one has not ended."""
        if self.asked:
            return False
        self.asked, self.stop = True, False
        return True

    def end(self) -> None:
        """No answer is asked for any more: it has ended, or the queue was full."""
        self.asked = False

    def end_answer(self) -> None:
        """Stop the answer, also one that waits in the queue. Returns once nothing more of it can arrive."""
        self.stop = True
        end = time.monotonic() + WAIT_SECONDS
        while self.running and time.monotonic() < end:
            time.sleep(0.02)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While an answer is being written."""
        self.running = True
        try:
            yield
        finally:
            self.running = self.asked = False
