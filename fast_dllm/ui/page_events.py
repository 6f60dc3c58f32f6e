"""What the page's buttons do: an answer, a comparison, and the notes beside the message box."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from fast_dllm.errors import UsageError
from fast_dllm.ui.cells import cells_html, error_html
from fast_dllm.ui.chat import AnswerFrame, Chatbot, Conversation, parse_model_args
from fast_dllm.ui.comparison import comparison_html, first_difference
from fast_dllm.ui.controls import in_words, read_settings
from fast_dllm.ui.layer_view import layers_html
from fast_dllm.ui.replay import replay_slider
from fast_dllm.ui.turns import Turn

REFRESH_SECONDS = 0.05  # a page cannot show more than this; steps in between are in the replay
LAYERS_SECONDS = 0.25  # the layer view grows with every forward, so that it is sent less often
SKIP: Any = gr.skip()
QUEUE_FULL = "<div class='note'>Not sent: too many messages wait already. Send it again in a moment.</div>"
SINGLE = "<div class='note'>This model answers single questions: it does not see the messages before this one.</div>"
NOT_SENT = "<div class='note'>Not sent: the answer before is still being written. Wait for it or press Stop.</div>"


class Shown(NamedTuple):
    """What an answer changes on the page, in the order of its outputs."""

    note: Any = SKIP  # errors and notes, beside the input
    box: Any = SKIP  # the message box
    talk: Any = SKIP
    cells: Any = SKIP
    layers: Any = SKIP
    frames: Any = SKIP
    slider: Any = SKIP
    messages: Any = SKIP


class Page:
    """What the page's buttons do. It keeps nothing of a visitor: that is in the visitor's session and browser."""

    def __init__(self, chatbot: Chatbot):
        self.chatbot = chatbot

    def answer(self, text: str, messages: list[dict], turn: Turn, *controls) -> Iterator[Shown]:
        """What the page shows while an answer is written."""
        with turn.at_work():
            if turn.stop:
                yield Shown(note="")  # stopped while it waited: the page stays as it is
            else:
                yield from self._answer(text, checked_messages(messages), turn, *controls)

    def _answer(self, text: str, messages: list[dict], turn: Turn, *controls) -> Iterator[Shown]:
        try:
            conversation = Conversation(self.chatbot, read_settings(*controls), list(messages))
            frames, dropped = conversation.ask(text)
        except Exception as error:  # an experiment's code may raise anything; the page goes on
            yield Shown(note=error_html(error))
            return
        if dropped:
            gr.Info(f"{dropped} oldest messages no longer fit the context and were left out")
        with_question = [*messages, {"role": "user", "content": text}]
        collected: list[AnswerFrame] = []
        # the box is emptied once, as the answer begins: what a visitor types while it is written stays
        note, box, drawn = SINGLE if messages and self.chatbot.model.config.single_turn else "", "", 0.0
        try:
            for frame in throttled(frames, collected, turn):
                messages = [*with_question, {"role": "assistant", "content": frame.text}]
                cells = cells_html(frame, stopped=turn.stop)
                last, layers = frame.done or turn.stop, SKIP
                if last or time.monotonic() - drawn >= LAYERS_SECONDS:
                    layers, drawn = layers_html(collected), time.monotonic()
                yield Shown(
                    note, box, shown_messages(messages), cells, layers, collected, replay_slider(collected), messages
                )
                note = box = SKIP
        except Exception as error:
            yield Shown(note=error_html(error), frames=collected, slider=replay_slider(collected), messages=messages)
        finally:
            frames.close()

    def compare(self, text: str, changed_a: str, changed_b: str, turn: Turn, *controls) -> Iterator[tuple]:
        """(note, cells A, cells B, table): the same prompt with the page's settings, changed in two ways."""
        with turn.at_work():
            if turn.stop:
                yield "", SKIP, SKIP, SKIP
            else:
                yield from self._compare(text, (changed_a, changed_b), turn, *controls)

    def _compare(self, text: str, changed: tuple[str, str], turn: Turn, *controls) -> Iterator[tuple]:
        try:
            base = read_settings(*controls)
            both = [base.changed(**parse_model_args(each)) for each in changed]
            fitting = [self.chatbot.fit([{"role": "user", "content": text}], each)[0] for each in both]
        except UsageError as error:
            yield error_html(error), "", "", ""
            return
        titles = [f"{side}: {in_words(settings)}" for side, settings in zip("AB", both, strict=True)]
        shown, layers, last = ["", ""], ["", ""], list[AnswerFrame]()
        for side, (settings, messages) in enumerate(zip(both, fitting, strict=True)):
            if turn.stop:
                return
            table: Any = SKIP
            collected: list[AnswerFrame] = []
            try:
                with contextlib.closing(self.chatbot.stream(messages, settings)) as frames:
                    for frame in throttled(frames, collected, turn):
                        last[side:] = [frame]
                        differs = first_difference(last[0], frame)
                        layers[side] = layers_html(collected, linked=False) if frame.done or turn.stop else ""
                        shown[side] = cells_html(frame, titles[side], turn.stop, differs) + layers[side]
                        if differs is not None:
                            shown[0] = cells_html(last[0], titles[0], differs=differs) + layers[0]
                        table = comparison_html(last[0], frame if side else None)
                        yield "", *shown, table
            except Exception as error:
                yield error_html(error), *shown, table
                return


def empty_page() -> Shown:
    """The page without a conversation; what is typed in the message box stays."""
    return Shown("", SKIP, [], cells_html(None), layers_html([]), [], replay_slider([]), [])


def begin(turn: Turn) -> tuple[gr.Button, str]:
    """(Stop button, note): an answer is asked for. While an earlier one is being written the page sends no other one,
    and the note says so: gradio sends an event (`answer`, `compare`) once at a time."""
    note = "" if turn.begin() else NOT_SENT
    return gr.Button(interactive=True), note


def refuse(turn: Turn) -> str:
    """The note for a message that the queue did not take."""
    turn.end()
    return QUEUE_FULL


def stop_button(turn: Turn) -> gr.Button:
    """The Stop button after an answer, or after a message that was not sent because an answer is being written."""
    return gr.Button(interactive=turn.asked)


def throttled(frames: Iterator[AnswerFrame], collected: list[AnswerFrame], turn: Turn) -> Iterator[AnswerFrame]:
    """Append every frame to `collected`, and yield those that the page has time to show, and the last one.

    After a visitor's stop, the frame at which it was noticed is the last one.
    """
    shown = 0.0
    last = None
    for last in frames:
        collected.append(last)
        stopped = turn.stop
        if time.monotonic() - shown >= REFRESH_SECONDS or last.done or stopped:
            shown = time.monotonic()
            yield last
        if stopped:
            return


def checked_messages(stored: object) -> list[dict[str, str]]:
    """The conversation that the visitor's browser keeps, or an empty one where what it sent is none."""
    if not isinstance(stored, list):
        return []
    for message in stored:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return []
        if message["role"] not in ("user", "assistant") or not isinstance(message["content"], str):
            return []
    return stored


def restore(stored: object) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(conversation, what is shown of it) for a page that was loaded again."""
    messages = checked_messages(stored)
    return messages, shown_messages(messages)


def shown_messages(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation for the page, where text would be read as HTML: tags in it are shown, never run."""
    return [message | {"content": html.escape(message["content"])} for message in messages]
