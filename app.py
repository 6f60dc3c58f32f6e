"""A page to watch block diffusion think: python app.py, then http://localhost:10086

Conversation on the left, the answer's tokens as they are unmasked on the right, with the layers that each forward runs;
replay of every forward; two configurations side by side. Runs on the embedded model where there is no GPU.
"""

from __future__ import annotations

import argparse
import errno
import socket
from collections.abc import Sequence
from typing import Any

from fast_dllm.guard import one_line

# isort: split
import gradio as gr
from starlette.middleware import Middleware

from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.ui.cells import LEGEND, cells_html
from fast_dllm.ui.chat import Chatbot, parse_model_args, with_defaults
from fast_dllm.ui.comparison import PAIRS, PROMPT
from fast_dllm.ui.controls import controls
from fast_dllm.ui.examples import examples_of
from fast_dllm.ui.gate import Gate
from fast_dllm.ui.layer_view import layers_html
from fast_dllm.ui.page_events import Page, Shown, begin, empty_page, refuse, restore, stop_button
from fast_dllm.ui.replay import choose_step, play, replay, still, tick
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
MAX_WAITING = 32  # events in the queue, of all visitors; a visitor's next one is refused with a word
MAX_SESSIONS = 200  # whose replay is kept; the one not used for longest loses it
SPEEDS = (1, 2, 4, 8, 16)  # forwards per second of the replay


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


# One queue for everything that runs the model. A visitor's place in it is shown over the tokens.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "full"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
# Events that draw or clear a replay run one after another: a tick that began before Clear must not be shown after it,
# and a tick at the replay's end must not stop a replay that was started again meanwhile.
IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "replay", "show_progress": "hidden"}


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
            note = gr.HTML(elem_id="note")
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

    outputs = Shown(note, text, talk, cells, layers, frames, step, messages)
    stilled = [timer, play_button, playing, step]
    begun = gr.on([send.click, text.submit], begin, turn, [stop, note], **AT_ONCE)
    begun = begun.success(still, None, stilled, **AT_ONCE)
    begun.success(None, None, None, js=SHOW_TOKENS)
    answered = begun.success(
        page.answer, [text, messages, turn, *settings], list(outputs), show_progress_on=cells, **ONE_AT_A_TIME
    )
    answered.failure(refuse, turn, note, **AT_ONCE).then(stop_button, turn, stop, **AT_ONCE)
    answered.then(stop_button, turn, stop, **AT_ONCE)
    stop.click(Turn.end_answer, turn, None, **AT_ONCE)
    stopped = clear.click(Turn.end_answer, turn, None, **AT_ONCE)
    emptied = stopped.then(empty_page, None, list(outputs), **IN_TURN)
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
    note = gr.HTML(elem_id="note-compare")
    table = gr.HTML(elem_id="table")
    with gr.Row(elem_id="sides"):
        side_a, side_b = gr.HTML(elem_id="side-a"), gr.HTML(elem_id="side-b")
    pair.input(lambda picked: PAIRS[picked], pair, [changed_a, changed_b], **AT_ONCE)
    begun = gr.on([compare.click, prompt.submit], begin, turn, [stop, note], **AT_ONCE)
    compared = begun.success(
        page.compare,
        [prompt, changed_a, changed_b, turn, *settings],
        [note, side_a, side_b, table],
        show_progress_on=side_a,
        **ONE_AT_A_TIME,
    )
    compared.failure(refuse, turn, note, **AT_ONCE).then(stop_button, turn, stop, **AT_ONCE)
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
    model_args = parse_model_args(arguments.model_args)
    if arguments.model is not None:
        model_args["model_path"] = arguments.model
    chatbot = Chatbot(with_defaults(model_args))
    names = [arguments.host, *arguments.name, *[GRADIO_TUNNEL] * arguments.share]
    build(chatbot).launch(
        server_name=arguments.host, server_port=arguments.port, share=arguments.share, **launch_options(names)
    )
    raise KeyboardInterrupt  # launch() returns after Ctrl-C, which it takes for itself


if __name__ == "__main__":
    with one_line():
        main()
