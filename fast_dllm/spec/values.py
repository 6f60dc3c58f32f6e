"""From text to values: the one place that converts what a user types into a model argument.

`--model_args`, matrix.json, the chat's /set and the page's controls all use `check_arguments` or `check_value`.
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec.defaults import CHOICES

NO_VALUE_WORDS = ("", "none", "null")
TRUE_WORDS = ("true", "on", "yes")
FALSE_WORDS = ("false", "off", "no")
LARGEST = 10**15  # of whole numbers: far above every sensible setting, and exact as an int and as a float
LONGEST_SHOWN = 60  # characters of a wrong value in a message

_SAFE = re.compile(r"[A-Za-z0-9._-]+")
# The kind of an argument whose default is None. The Options' own check decides about the others.
_KIND_WITHOUT_DEFAULT = {"bd_size": int, "layer_subset": str}


def parse_value(text: str) -> object:
    """The value that a text stands for: None, True or False, a number, or the text itself."""
    text = text.strip()
    if text.lower() in NO_VALUE_WORDS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_arguments(text: str, option: str = "--model_args") -> dict[str, object]:
    """`NAME=VALUE[,NAME=VALUE]`, as the command line's `option` gives it. Raises UsageError."""
    arguments: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name or not value:
            raise UsageError(f"{option} takes NAME=VALUE[,NAME=VALUE], not {part!r}")
        if name in arguments:
            raise UsageError(f"{option} gives {name} twice")
        arguments[name] = parse_value(value)
    return arguments


def check_arguments(
    arguments: Mapping[str, object], defaults: Mapping[str, object], where: str = ""
) -> dict[str, object]:
    """The arguments, each converted to the kind of its default. `where` begins every message.

    Raises UsageError for a name that has no default, and as `check_value` does.
    """
    for name in arguments:
        if name not in defaults:
            raise UsageError(f"{where}unknown model argument {name!r}; valid ones: {', '.join(defaults)}")
    return {name: check_value(name, value, defaults[name], where) for name, value in arguments.items()}


def check_value(name: str, value: object, default: object, where: str = "") -> object:
    """One argument, converted to the kind of its default. `value` may be a text.

    Raises UsageError for another kind of value, a number out of range, or a word that is not one of the CHOICES. What
    else is out of range, the experiment's Options check.
    """
    kind = _KIND_WITHOUT_DEFAULT.get(name, type(default))
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise UsageError(f"{where}{name} must be one of {', '.join(CHOICES[name])}, not {_shown(value)}")
        return value
    if isinstance(value, str):
        value = _truth_value(value) if kind is bool else parse_value(value)
    if value is None and default is not None:
        raise UsageError(f"{where}{name} needs a value, such as {canonical(default)}")
    if value is None:
        return None
    if not isinstance(value, (bool, int, float, str)):
        raise UsageError(f"{where}{name} must be a single value, not {_shown(value)}")
    if kind is bool and not isinstance(value, bool):
        raise UsageError(f"{where}{name} must be True or False, not {_shown(value)}")
    if kind is int:
        return whole_number(name, value, minimum=_least(default), where=where)
    if kind is float or (isinstance(value, float) and not math.isfinite(value)):
        return _number(name, value, where)
    if kind is str and not isinstance(value, str):
        example = f"such as {default!r}" if default is not None else "or none"
        raise UsageError(f"{where}{name} must be a word, {example}, not {_shown(value)}")
    if isinstance(value, str) and not _SAFE.fullmatch(value):
        raise UsageError(f"{where}{name}: {value!r} cannot stand in a folder's name; letters, digits, '_', '.' and '-'")
    return value


def whole_number(name: str, value: Any, minimum: int | None, where: str = "", also: str = "") -> int:
    """The value, or the number that it is the text of. `also` names what else the argument takes, for the message.

    Raises UsageError for anything that is no whole number of at least `minimum`.
    """
    if isinstance(value, str):
        value = parse_value(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) <= LARGEST and value == int(value) and (minimum is None or value >= minimum):
        return int(value)
    least = "" if minimum is None else f" of at least {minimum}"
    raise UsageError(f"{where}{name} must be a whole number{least}{also}, not {_shown(value)}")


def _least(default: object) -> int | None:
    """The smallest valid whole number. A default of 1 or more, or none, counts something, so that 0 is senseless."""
    if isinstance(default, int) and default <= 0:
        return 0 if default == 0 else None
    return 1


def _number(name: str, value: object, where: str) -> float:
    between = " from 0 to 1" if name == "threshold" else ""
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int of more than 308 digits
            number = float(value)
    if not math.isfinite(number) or (between and not 0 <= number <= 1):
        raise UsageError(f"{where}{name} must be a number{between}, not {_shown(value)}")
    return number


def _truth_value(text: str) -> object:
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    return parse_value(text)


def _shown(value: object) -> str:
    text = canonical(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def canonical(value: object) -> str:
    """One way to write each value: 0.80 and .8 are 0.8, 1.0 is 1."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() and abs(value) < 1e15 else value
        return repr(value).replace("+", "")
    return str(value)
