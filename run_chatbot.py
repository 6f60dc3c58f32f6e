"""Talk to a Fast-dLLM v2 model in the terminal and watch the masks fill in.

python run_chatbot.py                              # the 7B where there is a GPU, else the embedded model
python run_chatbot.py --model tiny --once "Tom has 3 pens. He buys 4 more. How many pens has he?"
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path

from fast_dllm.guard import one_line

# isort: split
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.ui.chat import AnswerFrame, Chatbot, Conversation, check_text, parse_model_args, with_defaults

HELP = """\
/set NAME VALUE   change a setting, e.g. /set threshold 0.8
/settings         the settings in force
/clear            forget the conversation
/help             this text
/exit             leave (also /quit, Ctrl-D); Ctrl-C stops an answer
Up and down call back what was typed before. The words work without the slash too, but for /set, /settings and /help."""
LEAVE = ("exit", "quit", "/exit", "/quit")
FORGET = ("clear", "/clear")
NUM_REMEMBERED = 1000  # typed lines


class Screen(Console):
    """A console that raises BrokenPipeError for a closed pipe, as print() does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="tiny, a folder or a hub id (published: Efficient-Large-Model/Fast_dLLM_v2_7B and _1.5B)"
    )
    parser.add_argument("--model_args", default="", help="name=value,... as eval.py takes them")
    parser.add_argument("--once", metavar="PROMPT", help="answer this and leave; only the answer goes to stdout")
    return parser.parse_args()


def render(frame: AnswerFrame) -> Text:
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


def last_lines(console: Console, text: Text) -> Text:
    """The end of a text, as many lines as the window has: lines that have scrolled out cannot be drawn over."""
    lines = text.wrap(console, console.width)
    return Text("\n").join(lines[-(console.height - 1) :])


def answer_live(console: Console, frames) -> None:
    """Masks filling in place on a terminal; ends with the plain answer."""
    last = None
    try:
        with Live(console=console, refresh_per_second=20, transient=True) as live:
            for frame in frames:
                last = frame
                live.update(last_lines(console, render(frame)))
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
        show_settings(console, conversation)
    elif name == "set" and len(rest) == 2:
        conversation.set(rest[0], rest[1])
        console.print(f"{rest[0]} = {conversation.settings.as_dict()[rest[0]]}", markup=False)
    elif name == "set":
        raise UsageError("/set takes a name and a value, e.g. /set threshold 0.8")
    else:
        raise UsageError(f"unknown command /{name}; there are /set, /settings, /clear, /help and /exit")


def show_settings(console: Console, conversation: Conversation) -> None:
    """Print one line for each setting, and mark those that were changed since the start."""
    now, first = conversation.settings.as_dict(), conversation.chatbot.default_settings().as_dict()
    width = max(map(len, now))
    for name, value in now.items():
        word = "active" if name == "experiment_name" and value is None else "none" if value is None else value
        mark = "" if name in first and first[name] == value else "  (changed)"
        console.print(f"  {name:<{width}}  {word}{mark}", markup=False)
    console.print("Change one with /set NAME VALUE; docs/arguments.md says what they mean.", markup=False)


def edit_lines() -> None:
    """Let the user edit a line at the prompt and call back lines of this and earlier talks."""
    try:
        import readline
    except ImportError:  # a Python built without it
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    history = state / "fast_dllm" / "chat_history"
    with contextlib.suppress(OSError):  # without a place for it, what is typed is remembered for this talk alone
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
        readline.set_history_length(NUM_REMEMBERED)
        atexit.register(_keep_history, readline.write_history_file, history)


def _keep_history(write, history: Path) -> None:
    with contextlib.suppress(OSError):
        write(history)


def talk(console: Console, conversation: Conversation) -> None:
    """The prompt, until exit or the end of the input."""
    if console.is_terminal:
        edit_lines()
        chatbot = conversation.chatbot
        greeting = f"{chatbot.arguments.model_path}: {chatbot.describe()}\n/help tells what can be typed here."
        console.print(greeting, markup=False)
    while True:
        try:
            line = input("> " if console.is_terminal else "").strip()
        except EOFError:
            if console.is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line in LEAVE:
                return
            if line in FORGET:
                conversation.clear()
                console.print("(forgotten)", style="dim")
            elif line.startswith("/") and len(line) > 1:
                command(console, conversation, line)
            elif line:
                respond(console, conversation, line)
        except BrokenPipeError:
            raise
        except Exception as error:  # out of memory, a CUDA fault, an experiment's own error: the talk goes on
            if not isinstance(error, UsageError):
                traceback.print_exception(error)
            print(f"error: {error}", file=sys.stderr, flush=True)


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte is the fault of its message, not the talk's end
    if arguments.once is not None:
        check_text(arguments.once)  # before a model is loaded for it
    console = Screen(highlight=False)
    model_args = parse_model_args(arguments.model_args)
    if arguments.model is not None:
        model_args["model_path"] = arguments.model
    chatbot = Chatbot(with_defaults(model_args))
    conversation = Conversation(chatbot, chatbot.default_settings())
    if arguments.once is not None:
        answer_plain(conversation.ask(arguments.once)[0])
        return
    talk(console, conversation)


if __name__ == "__main__":
    with one_line():
        main()
