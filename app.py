"""A page to watch block diffusion think: python app.py, then http://localhost:10086

Conversation on the left, the answer's tokens as they are unmasked on the right, with the layers that each forward runs;
replay of every forward; two configurations side by side. Runs on the embedded model where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import html
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fast_dllm.guard import one_line

# isort: split
import gradio as gr
from starlette.middleware import Middleware

from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.ui.cells import LEGEND, cells_html, error_html
from fast_dllm.ui.chat import Chatbot, Conversation, Frame, load_experiment, parse_model_args, with_defaults
from fast_dllm.ui.comparison import PAIRS, PROMPT, comparison_html, first_difference
from fast_dllm.ui.controls import control_values, controls, in_words, read_settings
from fast_dllm.ui.gate import Gate
from fast_dllm.ui.layers import layers_html
from fast_dllm.ui.style import (
    CHOOSE_STEP,
    COPY_AGAIN,
    COPY_ANSWER,
    FORGET_MESSAGES,
    KEEP_MESSAGES,
    RECALL_MESSAGES,
    SHOW_TOKENS,
    STYLE,
    WALK_TOKENS,
)
from fast_dllm.ui.turns import Turn

GRADIO_TUNNEL = ".gradio.live"  # names that gradio gives to pages started with --share
REFRESH_SECONDS = 0.05  # a page cannot show more than this; steps in between are in the replay
LAYERS_SECONDS = 0.25  # the layer view grows with every forward, so that it is sent less often
MAX_WAITING = 32  # events in the queue, of all visitors; a visitor's next one is refused with a word
MAX_SESSIONS = 200  # whose replay is kept; the one not used for longest loses it
SPEEDS = (1, 2, 4, 8, 16)  # forwards a second of the replay
# what the examples carry: name -> the settings that differ from those at the start
PRESETS: dict[str, dict[str, object]] = {
    "plain": {"experiment_name": "00_baseline", "reuse_k": 1},
    "k = 3, middle": {"experiment_name": "02_residual_reuse", "reuse_k": 3, "layer_subset": "middle"},
    "re-read while sure": {"experiment_name": "01_adaptive_skip", "reuse_k": None, "reread_above": 0.9},
}
CARDS = (
    "Ann buys 8 boxes of 8 cards each. She makes 23 more. Next she drops 11. How many cards does Ann have in the end?"
)
EXAMPLES = [
    ("plain", "Tom has 12 apples. He buys 7 more. How many apples does he have now?"),
    ("k = 3, middle", PROMPT),
    ("re-read while sure", "Rosa has 35 marbles. Max has 7 more than Rosa. How many marbles do they have together?"),
    ("k = 3, middle", CARDS),
]
OTHER_EXAMPLES = [
    ("plain", "Explain in two sentences why the sky is blue."),
    ("k = 3, middle", "Write a haiku about a tensor."),
]
SKIP: Any = gr.skip()
QUEUE_FULL = "<div class='note'>Not sent: too many messages wait already. Send it again in a moment.</div>"
SINGLE = "<div class='note'>This model answers single questions: it does not see the messages before this one.</div>"
NOT_SENT = "<div class='note'>Not sent: the answer before is still being written. Wait for it or press Stop.</div>"


class Shown(NamedTuple):
    """What an answer changes on the page, in the order of its outputs."""

    told: Any = SKIP  # errors and notes, beside the input
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
                yield Shown(told="")  # stopped while it waited: the page stays as it is
            else:
                yield from self._answer(text, checked_messages(messages), turn, *controls)

    def _answer(self, text: str, messages: list[dict], turn: Turn, *controls) -> Iterator[Shown]:
        try:
            conversation = Conversation(self.chatbot, read_settings(*controls), list(messages))
            frames, dropped = conversation.ask(text)
        except Exception as error:  # an experiment's code may raise anything; the page goes on
            yield Shown(told=error_html(error))
            return
        if dropped:
            gr.Info(f"{dropped} oldest messages no longer fit the context and were left out")
        asked = [*messages, {"role": "user", "content": text}]
        seen: list[Frame] = []
        # the box is emptied once, as the answer begins: what a visitor types while it is written stays
        told, box, drawn = SINGLE if messages and self.chatbot.model.config.single_turn else "", "", 0.0
        try:
            for frame in throttled(frames, seen, turn):
                messages = [*asked, {"role": "assistant", "content": frame.text}]
                cells = cells_html(frame, stopped=turn.stop)
                last, layers = frame.done or turn.stop, SKIP
                if last or time.monotonic() - drawn >= LAYERS_SECONDS:
                    layers, drawn = layers_html(seen), time.monotonic()
                yield Shown(told, box, shown_messages(messages), cells, layers, seen, replay_slider(seen), messages)
                told = box = SKIP
        except Exception as error:
            yield Shown(told=error_html(error), frames=seen, slider=replay_slider(seen), messages=messages)
        finally:
            frames.close()

    def compare(self, text: str, changed_a: str, changed_b: str, turn: Turn, *controls) -> Iterator[tuple]:
        """(told, cells A, cells B, table): the same prompt with the page's settings, changed in two ways."""
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
        shown, layers, last = ["", ""], ["", ""], list[Frame]()
        for side, (settings, messages) in enumerate(zip(both, fitting, strict=True)):
            if turn.stop:
                return
            table: Any = SKIP
            seen: list[Frame] = []
            try:
                with contextlib.closing(self.chatbot.stream(messages, settings)) as frames:
                    for frame in throttled(frames, seen, turn):
                        last[side:] = [frame]
                        differs = first_difference(last[0], frame)
                        layers[side] = layers_html(seen, linked=False) if frame.done or turn.stop else ""
                        shown[side] = cells_html(frame, titles[side], turn.stop, differs) + layers[side]
                        if differs is not None:
                            shown[0] = cells_html(last[0], titles[0], differs=differs) + layers[0]
                        table = comparison_html(last[0], frame if side else None)
                        yield "", *shown, table
            except Exception as error:
                yield error_html(error), *shown, table
                return


def throttled(frames: Iterator[Frame], seen: list[Frame], turn: Turn) -> Iterator[Frame]:
    """Collect every frame in `seen`; pass on those that a page can show in time, and the last one, which is also the
    one at which the visitor's stop was seen."""
    shown = 0.0
    last = None
    for last in frames:
        seen.append(last)
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


def replay_slider(seen: list[Frame]):
    last = max(len(seen), 1)
    return gr.Slider(minimum=1, maximum=max(last, 2), value=last, step=1, interactive=len(seen) > 1)


def replay(step: int, seen: list[Frame]) -> tuple[int, str, str]:
    """(place, cells, layers) at one forward of the last answer."""
    step = min(int(step), len(seen))
    return step, cells_html(seen[step - 1] if seen else None), layers_html(seen, step)


def choose_step(seen: list[Frame], event: gr.EventData) -> tuple:
    """(slider, place, cells, layers) for a column of the layer view."""
    step = int(event.step)
    return step, *replay(step, seen)


def play(playing: bool, step: int, seen: list[Frame], speed: int) -> tuple:
    """(timer, button, whether it plays, slider, place) after the play button: from here on, or anew from the start."""
    if playing or len(seen) < 2:
        return *still(), SKIP
    step = 1 if step >= len(seen) else int(step)
    return gr.Timer(1 / speed, active=True), gr.Button("⏸ Pause"), True, step, step


def still() -> tuple:
    return gr.Timer(active=False), gr.Button("▶ Play"), False, SKIP


def tick(playing: bool, step: int, seen: list[Frame]) -> tuple:
    """(timer, button, whether it plays, slider, place, cells, layers) one forward later.

    It goes by the place that the server keeps: a slider's may be of an answer that Clear has taken away while the tick
    was on its way, and beyond the slider's end is an error that the page would show.
    """
    if not playing or step >= len(seen):
        return *still(), SKIP, SKIP, SKIP
    step += 1
    timer, button, goes_on, _ = (SKIP,) * 4 if step < len(seen) else still()
    return timer, button, goes_on, step, *replay(step, seen)


def build(chatbot: Chatbot) -> gr.Blocks:
    """The page. Every event that runs the model shares one queue: visitors wait for each other."""
    page = Page(chatbot)
    with gr.Blocks(title="Fast-dLLM v2: watch it think") as blocks:
        gr.Markdown(
            "### Watch block diffusion think\n"
            "The model writes an answer in blocks of masks and unmasks first what it is sure of; here you see every "
            "step, and which layers it runs.\n\n"
            f"`{chatbot.arguments.model_path}` on `{chatbot.model.device}`: {chatbot.describe()}",
            elem_id="intro",
        )
        with gr.Accordion("Settings", open=False):
            settings = controls(chatbot)
        turn = gr.State(Turn())
        with gr.Tab("Chat"):
            messages, talk = build_chat(page, turn, settings)
        with gr.Tab("Side by side"):
            build_comparison(page, turn, settings)
        # a conversation is kept by its own tab, so that a reload shows it again and two tabs have one each
        blocks.load(restore, messages, [messages, talk], js=RECALL_MESSAGES, **AT_ONCE)
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=8)


# One queue for all that runs the model. The progress stands in a corner of one element and covers no text.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "full"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
# What draws a replay and what clears it, in turn: a tick that began before Clear must not be shown after it, and one
# that found the replay at its end must not still the one that has been begun anew meanwhile.
IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "replay", "show_progress": "hidden"}


def examples_of(chatbot: Chatbot) -> tuple[list[list], list[str]]:
    """(values of the message box and of every control, label) of the examples, without presets that this checkout or
    this model cannot run."""
    offered = EXAMPLES if chatbot.model.config.single_turn else [*EXAMPLES, *OTHER_EXAMPLES]
    rows, labels = [], []
    for preset, question in offered:
        try:
            settings = chatbot.default_settings().changed(**PRESETS[preset])
            load_experiment(settings.experiment_name).subset(settings.knobs, chatbot.model.config.num_hidden_layers)
        except ValueError:
            continue
        rows.append([question, *control_values(settings)])
        labels.append(f"{preset}: {question}")
    return rows, labels


def build_chat(page: Page, turn: gr.State, settings: list) -> tuple[gr.JSON, gr.Chatbot]:
    """The chat's tab; what holds the conversation, and what shows it."""
    chatbot = page.chatbot
    frames, playing, place = gr.State([]), gr.State(False), gr.State(1)
    messages = gr.JSON([], visible=False)
    timer = gr.Timer(1 / SPEEDS[1], active=False)
    with gr.Row(elem_id="talking"):
        with gr.Column(elem_id="left"):
            talk = gr.Chatbot(
                label="conversation",
                show_label=False,  # it would lie over the first message on a phone
                height=340,
                render_markdown=False,
                buttons=[],
                feedback_options=None,
                elem_id="talk",
            )
            text = gr.Textbox(
                label="message (Enter sends, Shift+Enter breaks the line)",
                placeholder="Ask something",
                lines=1,
                max_lines=8,
                elem_id="message",
            )
            told = gr.HTML(elem_id="told")
            with gr.Row(elem_id="buttons"):
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=60)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=60)
                clear = gr.Button("Clear", elem_id="clear", min_width=60)
                copy = gr.Button("Copy", elem_id="copy", min_width=60)
            examples, labels = examples_of(chatbot)
            gr.Examples(
                examples,
                [text, *settings],
                label="examples: a question, and settings for it",
                example_labels=labels,
                elem_id="examples",
            )
        with gr.Column(elem_id="right"):
            with gr.Row(elem_id="replaying"):  # above the tokens, whose height changes while it plays
                play_button = gr.Button("▶ Play", elem_id="play", min_width=60, scale=1)
                speed = gr.Dropdown(
                    list(SPEEDS), value=SPEEDS[1], label="a second", elem_id="speed", min_width=90, scale=1
                )
                step = gr.Slider(1, 2, value=1, step=1, label="replay", interactive=False, elem_id="replay", scale=4)
            cells = gr.HTML(cells_html(None), elem_id="cells", js_on_load=WALK_TOKENS)
            layers = gr.HTML(layers_html([]), elem_id="layers", js_on_load=CHOOSE_STEP)
            gr.HTML(LEGEND, elem_id="legend")

    outputs = Shown(told, text, talk, cells, layers, frames, step, messages)
    stilled = [timer, play_button, playing, step]
    begun = gr.on([send.click, text.submit], begin, turn, [stop, told], **AT_ONCE)
    begun = begun.success(still, None, stilled, **AT_ONCE)
    begun.success(None, None, None, js=SHOW_TOKENS)
    answered = begun.success(
        page.answer, [text, messages, turn, *settings], list(outputs), show_progress_on=cells, **ONE_AT_A_TIME
    )
    answered.failure(refuse, turn, told, **AT_ONCE).then(stop_button, turn, stop, **AT_ONCE)
    answered.then(stop_button, turn, stop, **AT_ONCE)
    stop.click(Turn.end_answer, turn, None, **AT_ONCE)
    stopped = clear.click(Turn.end_answer, turn, None, **AT_ONCE)
    emptied = stopped.then(
        lambda: Shown("", SKIP, [], cells_html(None), layers_html([]), [], replay_slider([]), []),
        None,
        list(outputs),
        **IN_TURN,
    )
    emptied.then(still, None, stilled, **AT_ONCE).then(None, None, None, js=FORGET_MESSAGES)
    copy.click(None, messages, copy, js=COPY_ANSWER).then(None, None, copy, js=COPY_AGAIN)
    shown = [place, cells, layers]
    step.input(replay, [step, frames], shown, **IN_TURN)
    layers.click(choose_step, frames, [step, *shown], **IN_TURN)
    play_button.click(play, [playing, step, frames, speed], [*stilled, place], **IN_TURN)
    timer.tick(tick, [playing, place, frames], [*stilled, *shown], **IN_TURN)
    speed.input(lambda speed: gr.Timer(1 / speed), speed, timer, show_progress="hidden")
    messages.change(None, messages, None, js=KEEP_MESSAGES)
    return messages, talk


def build_comparison(page: Page, turn: gr.State, settings: list) -> None:
    first, *_ = PAIRS
    prompt = gr.Textbox(label="prompt", lines=1, max_lines=8, value=PROMPT, elem_id="prompt")
    pair = gr.Dropdown(list(PAIRS), value=first, label="what to compare", elem_id="pair")
    with gr.Row():
        but = "the settings above, but"
        changed_a = gr.Textbox(PAIRS[first][0], label=f"A: {but}", elem_id="changed-a")
        changed_b = gr.Textbox(PAIRS[first][1], label=f"B: {but}", elem_id="changed-b")
    with gr.Row():
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop-compare")
    told = gr.HTML(elem_id="told-compare")
    table = gr.HTML(elem_id="table")
    with gr.Row(elem_id="sides"):
        side_a, side_b = gr.HTML(elem_id="side-a"), gr.HTML(elem_id="side-b")
    pair.input(lambda picked: PAIRS[picked], pair, [changed_a, changed_b], **AT_ONCE)
    begun = gr.on([compare.click, prompt.submit], begin, turn, [stop, told], **AT_ONCE)
    compared = begun.success(
        page.compare,
        [prompt, changed_a, changed_b, turn, *settings],
        [told, side_a, side_b, table],
        show_progress_on=side_a,
        **ONE_AT_A_TIME,
    )
    compared.failure(refuse, turn, told, **AT_ONCE).then(stop_button, turn, stop, **AT_ONCE)
    compared.then(stop_button, turn, stop, **AT_ONCE)
    stop.click(Turn.end_answer, turn, None, **AT_ONCE)


def launch_options(names: Sequence[str]) -> dict[str, Any]:
    """Options of gradio's launch(): the page's style, and what it refuses. names: as `Gate` takes them."""
    gate = Middleware(Gate, names=names)
    return {
        "css": STYLE,
        "footer_links": ["gradio"],  # its own Settings link would be a second one of this name
        "app_kwargs": {"middleware": [gate]},
        "state_session_capacity": MAX_SESSIONS,
    }


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
    parser.add_argument(
        "--name", action="append", default=[], help="a host name of a proxy in front of this page (may be repeated)"
    )
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers")
    arguments = parser.parse_args()
    check_address(arguments.host, arguments.port)
    given = parse_model_args(arguments.model_args)
    if arguments.model is not None:
        given["model_path"] = arguments.model
    chatbot = Chatbot(with_defaults(given))
    names = [arguments.host, *arguments.name, *[GRADIO_TUNNEL] * arguments.share]
    build(chatbot).launch(
        server_name=arguments.host, server_port=arguments.port, share=arguments.share, **launch_options(names)
    )


if __name__ == "__main__":
    with one_line():
        main()
