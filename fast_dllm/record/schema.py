"""Which values the fields of a summary may have. A value of another kind is a fault with a name, never a traceback."""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Mapping

from fast_dllm.record.scores import Score
from fast_dllm.record.throughput import MAPPINGS, NAMES, Throughput
from fast_dllm.spec.files import as_object, is_file_name, printable

MOST_COUNT = 10**15
MOST_TEXT = 1_000_000  # characters; a system instruction may be long
MOST_NAMES = 100_000  # entries of an object
_SHA256 = re.compile(r"[0-9a-f]{8,64}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MOST_COUNT <= value <= MOST_COUNT


def _is_amount(value: object) -> bool:
    return _is_number(value) and value >= 0  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return _is_amount(value) and isinstance(value, int)


def _is_fraction(value: object) -> bool:
    return _is_amount(value) and value <= 1  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT


def _is_name(value: object) -> bool:
    return isinstance(value, str) and is_file_name(value)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or _is_text(value)


def _is_object_of_scalars(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= MOST_NAMES and all(map(_is_scalar, value.values()))


def _is_object_of_lists(value: object) -> bool:
    """Scalars, or lists of them."""
    if not isinstance(value, dict) or len(value) > MOST_NAMES:
        return False
    lists = (item if isinstance(item, list) else [item] for item in value.values())
    return all(_is_scalar(each) for items in lists for each in items)


# What a value must be, in words -> (the check, the fields).
_KINDS: dict[str, tuple[Callable[[object], bool], tuple[str, ...]]] = {
    "a fraction": (_is_fraction, ("accuracy",)),
    "a number of at least 0": (_is_amount, ("limit", "accuracy_stderr", "seconds_loading")),
    "a whole number of at least 0": (
        _is_count,
        (
            "num_samples", "num_samples_expected", "num_fewshot", "num_processes", "num_shares", "num_segments",
            "num_layers", "num_threads", "peak_memory_bytes",
        ),
    ),
    "true or false": (lambda value: isinstance(value, bool), ("chat_template", "fewshot_as_multiturn", "git_dirty")),
    "a name that a file can have": (_is_name, ("experiment", "task", "config")),
    "a SHA-256": (
        lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
        (
            "generation_code_sha256", "decoding_sha256", "results_sha256", "questions_sha256",
            "summary_sha256",
        ),
    ),
    "a text": (
        _is_text,
        (
            "metric", "system_instruction", "model_revision", "dtype", "device", "gpu", "graphs", "git_commit",
            "git_branch", "sandbox", "host", "slurm_job_id", "python", "start_time", "end_time",
        ),
    ),
    "an object of single values": (_is_object_of_scalars, ("model_args", "packages")),
    "an object of values and lists": (_is_object_of_lists, ("gen_kwargs", "samples")),
    "a list of at most 8 numbers": (
        lambda value: isinstance(value, list) and len(value) <= 8 and all(map(_is_scalar, value)),
        ("seeds",),
    ),
}  # fmt: skip


def check_fields(content: Mapping[str, object]) -> dict[str, Any]:
    """The fields of a summary that the content has and that are not null. Raises ValueError, one printable line."""
    values: dict[str, Any] = {}
    for words, (is_sound, names) in _KINDS.items():
        for name in names:
            value = content.get(name)
            if value is None:
                continue
            if not is_sound(value):
                if name == "accuracy":
                    raise ValueError(f"the accuracy is '{_shown(value)}'")
                raise ValueError(f"{name} is {_shown(value)}, not {words}")
            values[name] = value
    return values


def parse_throughput(value: object) -> Throughput:
    """Raises ValueError."""
    content = as_object(value)
    values: dict[str, Any] = {}
    for name in NAMES:
        value = content.get(name)
        if value is None:
            continue
        if name in MAPPINGS:
            if not isinstance(value, dict) or not all(map(_is_amount, value.values())):
                raise ValueError(f"throughput: {name} is {_shown(value)}, not an object of numbers")
        elif not _is_amount(value):
            raise ValueError(f"throughput: {name} is {_shown(value)}, not a number of at least 0")
        values[name] = value
    return Throughput(**values)


def parse_subtasks(value: object) -> dict[str, Score]:
    """Raises ValueError."""
    subtasks = {}
    for name, content in as_object(value).items():
        values = check_fields(as_object(content))
        subtasks[name] = Score(
            accuracy=values.get("accuracy"),
            stderr=values.get("accuracy_stderr"),
            metric=values.get("metric", ""),
            num_samples=values.get("num_samples", 0),
        )
    return subtasks


def _shown(value: object) -> str:
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
