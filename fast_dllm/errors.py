"""What goes wrong with a message for people: `UsageError` becomes one line and exit code 2 in every program."""

import argparse
import sys
from typing import NoReturn


class UsageError(ValueError):
    """Something the caller asked for cannot be had; the message is one line naming the fault and the valid choices."""


class NonFiniteError(RuntimeError):
    """The model's logits are infinite or not a number: its weights or its precision are at fault, and no answer is."""


def non_finite(where: str, dtype: object) -> NonFiniteError:
    """The error for logits that are no numbers in `where` (a kind of forward); dtype: torch's, of the logits."""
    message = f"the model's logits are not finite in {where}"
    if str(dtype) == "torch.float16":
        message += (
            "; float16 has no numbers above 65504: try the model argument dtype=bfloat16, which is slower on older GPUs"
        )
    return NonFiniteError(message)


class DataError(RuntimeError):
    """A model or a data set cannot be had: the hub does not answer, refuses it, or it is not in the cache."""


class TakenOverError(RuntimeError):
    """Another process took this one for dead and evaluates the run now; this one must write nothing more."""


def line_of(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def show_any_character() -> None:
    """Let stdout and stderr take any text. A character that the terminal's encoding lacks is shown as an escape, such
    as `\\u2713`; without this, printing it would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what stands in for a stream in a notebook or a test may lack it
            stream.reconfigure(errors="backslashreplace")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UsageErrors, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
