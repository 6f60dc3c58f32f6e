"""A page to watch block diffusion think: python app.py, then http://localhost:10086

Conversation on the left, the answer's tokens as they are unmasked on the right; two configurations side by side; replay
of every step. Runs on the embedded model where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import html
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from fast_dllm.guard import one_line

# isort: split
import gradio as gr

from fast_dllm import experiments
from fast_dllm.arguments import knob_defaults
from fast_dllm.chat import Chatbot, Conversation, Frame, Settings, parse_model_args, with_defaults
from fast_dllm.decoding import STEP_KINDS
from fast_dllm.errors import OneLineParser, UsageError

REFRESH_SECONDS = 0.05  # a page cannot show more than this; steps in between are in the replay
ACTIVE = "active file"
NO_VALUE = "none"
# settings with a control of their own kind, whatever the experiment
COMMON = ("threshold", "small_block_size", "max_new_tokens")
EXAMPLES = [
    "Tom has 12 apples. He buys 7 more. How many apples does he have now?",
    "Ann buys 8 boxes of 8 cards each. She makes 23 more. Next she drops 11. How many cards does Ann have in the end?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a tensor.",
]
STYLE = """
.cells{font-family:ui-monospace,monospace;font-size:14px;line-height:2.1;overflow-wrap:anywhere}
.blk{display:inline;border-left:3px solid #4f46e5;padding-left:3px;margin-right:4px}
.sub{display:inline;border-left:1px dotted #94a3b8;padding-left:2px}
.sub.on{background:rgba(79,70,229,.10)}
.c{display:inline-block;min-width:.7em;border-radius:4px;margin:0 1px;padding:0 2px;white-space:pre}
.c{unicode-bidi:isolate}
.m{background:#cbd5e1;color:#475569}
.new{outline:2px solid #111827;font-weight:600;color:#111827}
.stats{font-size:13px;opacity:.8;margin-top:.6em}
.err{color:#b91c1c;font-weight:600}
"""


def confidence_colour(confidence: float) -> str:
    """Red for a guess, green for a certainty."""
    return f"hsl({int(120 * confidence)} 75% 78%)"


def cells_html(frame: Frame | None, title: str = "", stopped: bool = False) -> str:
    """One frame as HTML; `stopped`: the last one of an answer that was ended.

    Every token's text is escaped: what the model or a visitor wrote is shown, never run.
    """
    heading = f"<b>{html.escape(title)}</b>" if title else ""
    if frame is None:
        return f"<div class='cells'>{heading}<div class='stats'>The tokens of the next answer appear here.</div></div>"
    parts: list[str] = []
    opened_block = opened_sub = False
    for cell in frame.cells:
        first = not parts
        new_block, new_sub = cell.position % frame.block_size == 0, cell.position % frame.small_block_size == 0
        if first or new_sub:
            parts.append("</span>" * opened_sub)
            if first or new_block:
                parts.append("</span>" * opened_block + "<span class='blk'>")
                opened_block = True
            start = cell.position // frame.small_block_size * frame.small_block_size
            working = not frame.done and start == frame.sub_block[0] and frame.kind in STEP_KINDS
            parts.append(f"<span class='sub{' on' if working else ''}'>")
            opened_sub = True
        parts.append(cell_html(frame, cell))
    parts.append("</span>" * (opened_sub + opened_block))
    state, statistics = "cells", frame.statistics()
    if frame.done:
        state = "cells done"
    elif stopped:
        state, statistics = "cells stopped", f"stopped · {statistics}"
    return f"<div class='{state}'>{heading}<div>{''.join(parts)}</div><div class='stats'>{statistics}</div></div>"


def cell_html(frame: Frame, cell) -> str:
    if cell.text is None:
        return "<span class='c m'>▒</span>"
    shown = html.escape(cell.text.replace("\n", "⏎")) or "∅"
    if not frame.is_new(cell):
        return f"<span class='c' title='{cell.confidence:.3f}'>{shown}</span>"
    colour = confidence_colour(cell.confidence)
    return f"<span class='c new' style='background:{colour}' title='{cell.confidence:.3f}'>{shown}</span>"


def error_html(error: Exception) -> str:
    """What went wrong, for the page; a fault that is not the visitor's goes to the server's log in full."""
    if not isinstance(error, UsageError):
        traceback.print_exception(error)
    return f"<div class='cells err'>{html.escape(str(error) or type(error).__name__)}</div>"


@functools.cache
def policies() -> list[str]:
    """What the experiment's control offers: what was there when the page was built, for so long its controls fit."""
    return [ACTIVE, *experiments.available()]


@functools.cache
def load_policy(shown: str) -> experiments.Experiment:
    return experiments.load(None if shown == ACTIVE else shown)


def own_knobs(shown: str) -> dict[str, object]:
    """The knobs of a policy that have no control of their own kind, with their defaults."""
    return {name: value for name, value in knob_defaults(load_policy(shown)).items() if name not in COMMON}


def read_settings(experiment, threshold, sub_block, temperature, top_p, budget, *knobs) -> Settings:
    """The page's controls as checked settings; `knobs` are the values of every policy's own (see `knob_controls`)."""
    own = {}
    values = iter(knobs)
    for shown in policies():
        given = {name: next(values) for name in own_knobs(shown)}
        if shown == experiment:
            own = {name: None if value == NO_VALUE else value for name, value in given.items()}
    return Settings.parse(
        experiment_name=None if experiment == ACTIVE else experiment,
        threshold=threshold,
        small_block_size=int(sub_block),
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=int(budget),
        **own,
    )


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

    def begin(self, request: gr.Request) -> None:
        """Take the visitor's turn; gr.Error, which the page shows beside the input, while there is one."""
        if request.session_hash in self._turns:
            told = "the answer before is still being written: wait for it or press Stop"
            raise gr.Error(told, title="One at a time", print_exception=False)
        self._turns[request.session_hash] = Turn()

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


class Page:
    """What the page's buttons do. Of a visitor it holds the turn alone: the rest lives in the visitor's own page."""

    def __init__(self, chatbot: Chatbot):
        self.chatbot = chatbot
        self.turns = Turns()

    def answer(self, text: str, messages: list[dict], request: gr.Request | None, *controls) -> Iterator[tuple]:
        """(message box, conversation, cells, frames, slider, messages) while an answer is written."""
        with self.turns.at_work(request) as stop:
            if stop.is_set():
                yield (gr.skip(),) * 6  # stopped while it waited: the page stays as it is
            else:
                yield from self._answer(text, messages, stop, *controls)

    def _answer(self, text: str, messages: list[dict], stop: threading.Event, *controls) -> Iterator[tuple]:
        try:
            conversation = Conversation(self.chatbot, read_settings(*controls), list(messages))
            frames, dropped = conversation.ask(text)
        except Exception as error:  # an experiment's code may raise anything; the page goes on
            yield gr.skip(), shown_messages(messages), error_html(error), [], gr.skip(), messages
            return
        if dropped:
            gr.Info(f"{dropped} oldest messages no longer fit the context and were left out")
        asked = [*messages, {"role": "user", "content": text}]
        seen: list[Frame] = []
        box = ""  # emptied once, as the answer begins: what a visitor types while it is written stays
        try:
            for frame in throttled(frames, seen, stop):
                messages = [*asked, {"role": "assistant", "content": frame.text}]
                shown = cells_html(frame, stopped=stop.is_set())
                yield box, shown_messages(messages), shown, seen, replay_slider(seen), messages
                box = gr.skip()
        except Exception as error:
            yield gr.skip(), shown_messages(messages), error_html(error), seen, replay_slider(seen), messages
        finally:
            frames.close()

    def compare(self, text: str, changed: str, request: gr.Request | None, *controls) -> Iterator[tuple]:
        """(cells A, cells B): the same prompt with the page's settings, then with some of them changed."""
        with self.turns.at_work(request) as stop:
            if stop.is_set():
                yield (gr.skip(),) * 2
            else:
                yield from self._compare(text, changed, stop, *controls)

    def _compare(self, text: str, changed: str, stop: threading.Event, *controls) -> Iterator[tuple]:
        shown = ["", ""]
        try:
            first = read_settings(*controls)
            second = first.changed(**parse_model_args(changed))
            messages, _ = self.chatbot.fit([{"role": "user", "content": text}], first)
        except UsageError as error:
            yield error_html(error), ""
            return
        for side, settings in enumerate((first, second)):
            if stop.is_set():
                return
            title = f"{'AB'[side]}: {in_words(settings)}"
            try:
                with contextlib.closing(self.chatbot.stream(messages, settings)) as frames:
                    for frame in throttled(frames, [], stop):
                        shown[side] = cells_html(frame, title, stopped=stop.is_set())
                        yield tuple(shown)
            except Exception as error:
                shown[side] = error_html(error)
                yield tuple(shown)


def in_words(settings: Settings) -> str:
    """The settings that make one answer differ from another, on one line."""
    own = {name: settings.knobs[name] for name in own_knobs(settings.experiment_name or ACTIVE)}
    told = {"threshold": settings.knobs["threshold"], **own}
    words = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in told.items())
    return f"{settings.experiment_name or ACTIVE}, {', '.join(words)}"


def throttled(frames: Iterator[Frame], seen: list[Frame], stop: threading.Event) -> Iterator[Frame]:
    """Collect every frame in `seen`; pass on those that a page can show in time, and the last one, which is also the
    one at which `stop` was seen."""
    shown = 0.0
    last = None
    for last in frames:
        seen.append(last)
        stopped = stop.is_set()
        if time.monotonic() - shown >= REFRESH_SECONDS or last.done or stopped:
            shown = time.monotonic()
            yield last
        if stopped:
            return


def shown_messages(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation for the page, where text would be read as HTML: tags in it are shown, never run."""
    return [message | {"content": html.escape(message["content"])} for message in messages]


def replay_slider(seen: list[Frame]):
    last = max(len(seen), 1)
    return gr.Slider(minimum=1, maximum=max(last, 2), value=last, step=1, interactive=len(seen) > 1)


def replay(step: int, seen: list[Frame]) -> str:
    return cells_html(seen[min(int(step), len(seen)) - 1] if seen else None)


def controls(chatbot: Chatbot) -> list:
    """The settings' widgets, in the order of `read_settings`."""
    start = chatbot.default_settings()
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if chatbot.block_size % size == 0]
    with gr.Row():
        experiment = gr.Dropdown(
            policies(), value=start.experiment_name or ACTIVE, label="experiment", elem_id="experiment"
        )
        sub_block = gr.Dropdown(sizes, value=start.small_block_size, label="sub-block size")
    knobs, rows = [], []
    for shown in policies():
        chosen = start if shown == (start.experiment_name or ACTIVE) else None
        with gr.Row(visible=chosen is not None) as row:
            for name, default in own_knobs(shown).items():
                knobs.append(knob_control(shown, name, default if chosen is None else chosen.knobs[name]))
        rows.append(row)
    experiment.change(lambda picked: [gr.Row(visible=shown == picked) for shown in policies()], experiment, rows)
    with gr.Row():
        threshold = gr.Slider(0, 1, value=start.threshold, step=0.01, label="threshold", elem_id="threshold")
        temperature = gr.Slider(0, 2, value=start.temperature, step=0.05, label="temperature")
        top_p = gr.Slider(0.05, 1, value=start.top_p, step=0.05, label="top-p")
        most = chatbot.max_length // 2
        budget = gr.Slider(
            32, most, value=min(start.max_new_tokens, most), step=32, label="new-token budget", elem_id="budget"
        )
    return [experiment, threshold, sub_block, temperature, top_p, budget, *knobs]


def knob_control(shown: str, name: str, value: Any):
    """A control for one knob: its policy's CHOICES where it names some, else by the kind of its value."""
    offered: Sequence[Any] = load_policy(shown).options_type.CHOICES.get(name, ())
    if offered:
        words = [NO_VALUE if choice is None else choice for choice in offered]
        return gr.Dropdown(words, value=NO_VALUE if value is None else value, label=name, allow_custom_value=True)
    if isinstance(value, bool):
        return gr.Checkbox(value, label=name)
    if isinstance(value, (int, float)):
        return gr.Number(value, label=name)
    return gr.Textbox(NO_VALUE if value is None else str(value), label=name)


def build(chatbot: Chatbot) -> gr.Blocks:
    """The page. Every event that runs the model shares one queue: visitors wait for each other."""
    page = Page(chatbot)
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    with gr.Blocks(title="Fast-dLLM v2: watch it think") as blocks:
        gr.Markdown(f"### Watch block diffusion think\n`{chatbot.arguments.model_path}` on `{chatbot.model.device}`")
        frames, messages = gr.State([]), gr.State([])
        with gr.Accordion("Settings", open=False):
            settings = controls(chatbot)
        with gr.Tab("Chat"), gr.Row():
            with gr.Column():
                talk = gr.Chatbot(
                    label="conversation", height=380, render_markdown=False, buttons=[], feedback_options=None
                )
                text = gr.Textbox(label="message", placeholder="Ask something", lines=2, elem_id="message")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                    clear = gr.Button("Clear", elem_id="clear")
                gr.Examples(EXAMPLES, inputs=text)
            with gr.Column():
                cells = gr.HTML(cells_html(None), elem_id="cells")
                step = gr.Slider(
                    1, 2, value=1, step=1, label="replay: step of the last answer", interactive=False, elem_id="replay"
                )
        with gr.Tab("Side by side"):
            prompt = gr.Textbox(label="prompt", lines=2, value=EXAMPLES[1], elem_id="prompt")
            with gr.Row():
                gr.Markdown("**A** uses the settings above. **B** uses them too, but for:")
                changed = gr.Textbox("reuse_k=3,layer_subset=last", label="name=value,…", elem_id="changed")
            with gr.Row():
                compare = gr.Button("Compare", variant="primary", elem_id="compare")
                stop_compare = gr.Button("Stop", variant="stop")
            with gr.Row():
                side_a, side_b = gr.HTML(elem_id="side-a"), gr.HTML(elem_id="side-b")
        outputs = [text, talk, cells, frames, step, messages]
        turns = page.turns
        for trigger in (send.click, text.submit):
            begun = trigger(turns.begin)
            begun.success(page.answer, [text, messages, *settings], outputs, **one_at_a_time)
        stop.click(turns.stop, None, None, queue=False)
        for forget in (clear.click, talk.clear):  # the button, and the conversation's own bin
            stopped = forget(turns.stop, None, None, queue=False)
            stopped.then(lambda: ([], cells_html(None), [], []), None, [talk, cells, frames, messages], queue=False)
        step.input(replay, [step, frames], cells)
        begun = compare.click(turns.begin)
        begun.success(page.compare, [prompt, changed, *settings], [side_a, side_b], **one_at_a_time)
        stop_compare.click(turns.stop, None, None, queue=False)
        blocks.unload(turns.forget)
    return blocks.queue(default_concurrency_limit=8)


def check_address(host: str, port: int) -> None:
    """Raises UsageError where the page cannot listen, before a model is loaded for it."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port must be from 1 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just left is free
            listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is in use; --port takes another one") from None
        hint = "127.0.0.1 is this machine alone, 0.0.0.0 every network"
        raise UsageError(f"cannot listen on --host {host}: {error.strerror}; {hint}") from None


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="tiny, a folder or a hub id")
    parser.add_argument("--model_args", default="", help="name=value,... as eval.py takes them")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=10086)
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers")
    arguments = parser.parse_args()
    check_address(arguments.host, arguments.port)
    given = parse_model_args(arguments.model_args)
    if arguments.model is not None:
        given["model_path"] = arguments.model
    chatbot = Chatbot(with_defaults(given))
    build(chatbot).launch(server_name=arguments.host, server_port=arguments.port, share=arguments.share, css=STYLE)


if __name__ == "__main__":
    with one_line():
        main()
