"""Talk to a Fast-dLLM v2 model in the terminal and watch the masks fill in.

python run_chatbot.py                              # the 7B where there is a GPU, else the embedded model
python run_chatbot.py --model tiny --once "Tom has 3 pens. He buys 4 more. How many pens has he?"
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback

from fast_dllm.guard import one_line

# isort: split
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fast_dllm.chat import Chatbot, Conversation, Frame, parse_model_args, with_defaults
from fast_dllm.errors import OneLineParser, UsageError

HELP = """\
/set NAME VALUE   change a setting, e.g. /set threshold 0.8
/settings         the settings in force
/help             this text
clear             forget the conversation
exit              leave (also Ctrl-D); Ctrl-C stops an answer"""


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="tiny, a folder or a hub id")
    parser.add_argument("--model_args", default="", help="name=value,... as eval.py takes them")
    parser.add_argument("--once", metavar="PROMPT", help="answer this and leave; only the answer goes to stdout")
    return parser.parse_args()


def render(frame: Frame) -> Text:
    """The answer with its masks in place; what this step unmasked stands out, unsure tokens more than sure ones."""
    text = Text()
    for cell in frame.cells:
        if cell.text is None:
            inside = frame.sub_block[0] <= cell.position < frame.sub_block[1]
            text.append("▒" if inside else "░", style="cyan" if inside else "dim")
        elif frame.is_new(cell):
            text.append(cell.text, style="bold black on green" if cell.confidence > 0.9 else "bold black on yellow")
        else:
            text.append(cell.text)
    text.append(f"\n{frame.statistics()}", style="dim")
    return text


def answer_live(console: Console, frames) -> None:
    """Masks filling in place on a terminal; ends with the plain answer."""
    last = None
    try:
        with Live(console=console, refresh_per_second=20, transient=True, vertical_overflow="visible") as live:
            for frame in frames:
                last = frame
                live.update(render(frame))
    except KeyboardInterrupt:
        console.print("(stopped)", style="yellow")
    finally:
        frames.close()
    if last is not None:
        console.print(Text(last.text))
        console.print(Text(last.statistics(), style="dim"))


def answer_plain(frames) -> None:
    """Without a terminal: the answer as it becomes certain, from left to right."""
    written = 0
    try:
        for frame in frames:
            # A character still incomplete in its bytes is held back until its last byte is there.
            certain = frame.text if frame.done else frame.text.rstrip("\ufffd")
            print(certain[written:], end="", flush=True)
            written = max(written, len(certain))
    except KeyboardInterrupt:
        pass
    finally:
        frames.close()
    print(flush=True)


def respond(console: Console, conversation: Conversation, text: str) -> None:
    frames, dropped = conversation.ask(text)
    if dropped:
        note = f"({dropped} oldest messages no longer fit the context and were left out)"
        print(note, file=sys.stderr, flush=True)
    if console.is_terminal:
        answer_live(console, frames)
    else:
        answer_plain(frames)


def command(console: Console, conversation: Conversation, line: str) -> None:
    """A line that starts with a slash."""
    name, *rest = line[1:].split(maxsplit=2)
    if name == "help":
        console.print(HELP, markup=False)
    elif name == "settings":
        for setting, value in conversation.settings.as_dict().items():
            console.print(f"{setting} = {value}", markup=False)
    elif name == "set" and len(rest) == 2:
        conversation.set(rest[0], rest[1])
        console.print(f"{rest[0]} = {conversation.settings.as_dict()[rest[0]]}", markup=False)
    elif name == "set":
        raise UsageError("/set takes a name and a value, e.g. /set threshold 0.8")
    else:
        raise UsageError(f"unknown command /{name}; there are /set, /settings, /help, clear and exit")


def talk(console: Console, conversation: Conversation) -> None:
    """The prompt, until exit or the end of the input."""
    if console.is_terminal:
        console.print(f"{conversation.chatbot.arguments.model_path}. /help tells what can be typed here.", markup=False)
    while True:
        try:
            line = input("> " if console.is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line in ("exit", "quit"):
                return
            if line == "clear":
                conversation.clear()
                console.print("(forgotten)", style="dim")
            elif line.startswith("/") and len(line) > 1:
                command(console, conversation, line)
            elif line:
                respond(console, conversation, line)
        except Exception as error:  # out of memory, a CUDA fault, an experiment's own error: the talk goes on
            if not isinstance(error, UsageError):
                traceback.print_exception(error)
            print(f"error: {error}", file=sys.stderr, flush=True)


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    console = Console(highlight=False)
    given = parse_model_args(arguments.model_args)
    if arguments.model is not None:
        given["model_path"] = arguments.model
    chatbot = Chatbot(with_defaults(given))
    conversation = Conversation(chatbot, chatbot.default_settings())
    if arguments.once is not None:
        answer_plain(conversation.ask(arguments.once)[0])
        return
    talk(console, conversation)


if __name__ == "__main__":
    with one_line():
        main()
