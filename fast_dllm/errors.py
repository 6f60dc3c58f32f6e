"""What goes wrong with a message for people: `UsageError` becomes one line and exit code 2 in every program."""

import argparse
from typing import NoReturn


class UsageError(ValueError):
    """Something the caller asked for cannot be had; the message is one line naming the fault and the valid choices."""


class NonFiniteError(RuntimeError):
    """The model's logits are infinite or not a number: its weights or its precision are at fault, and no answer is."""


class DataError(RuntimeError):
    """A task's data set cannot be had: the hub does not answer, refuses it, or it is not in the cache."""


class TakenOverError(RuntimeError):
    """Another process took this one for dead and evaluates the run now; this one must write nothing more."""


def line_of(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are UsageErrors, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
