"""The configurations of an experiment, what each sets, and the folder that a result is kept in.

An experiment's matrix is experiments/<name>/matrix.json,

    {"compare_with": "t1.00", "configurations": {"t0.50": {"threshold": 0.5}, "t1.00": {"threshold": 1}}}

or, without that file, the nine of layer reuse. Beside the matrix, `plain` (no reuse, threshold 1) and `k<k>_<a>-<b>` (a
range of layers) can be named. A command line beats the configuration, which beats the defaults, and a result's folder
follows what ran: `k2_middle+threshold=0.8`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping

from fast_dllm.errors import UsageError
from fast_dllm.spec.defaults import DEFAULTS, REUSE_ARGUMENTS
from fast_dllm.spec.files import read_json
from fast_dllm.spec.knobs import read_knobs
from fast_dllm.spec.values import canonical, check_arguments, parse_arguments

MATRIX_FILE = "matrix.json"
GENERATION_FILE = "generation_functions.py"
# Of experiments and configurations. No comma, which squeue takes for a list; no plus, which starts what a run changed.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RANGE = re.compile(r"k([1-9][0-9]*)_([0-9]+)-([0-9]+)")


@dataclass(frozen=True)
class Matrix:
    """configurations: name -> model arguments, in the order of every table. compare_with: the one that the others are
    compared with. is_control: it measures plain decoding, which other experiments have to beat."""

    configurations: Mapping[str, Mapping[str, object]]
    compare_with: str
    is_control: bool = field(default=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.configurations)


NINE = Matrix(
    {
        f"k{k}_{subset}": {"reuse_k": k, "layer_subset": subset}
        for k in (1, 2, 3)
        for subset in ("first", "middle", "last")
    },
    "k1_first",
)


def matrix_of(experiment: str | None, root: Path) -> Matrix:
    """The matrix of an experiment of the project in `root`; None (the active file) has the nine. Raises UsageError."""
    if experiment is None:
        return NINE
    path = Path(root) / "experiments" / experiment / MATRIX_FILE
    content, fault = read_json(path)
    if fault:
        raise UsageError(f"experiments/{experiment}/{MATRIX_FILE}: not valid JSON, {fault}")
    if content is None:
        return NINE
    defaults = defaults_of(experiment, root)  # names the file that is at fault itself
    try:
        return _parse_matrix(content, defaults)
    except ValueError as error:
        raise UsageError(f"experiments/{experiment}/{MATRIX_FILE}: {error}") from None


def _parse_matrix(content: Mapping[str, Any], defaults: Mapping[str, object]) -> Matrix:
    """Raises ValueError."""
    if set(content) - {"control"} != {"compare_with", "configurations"}:
        keys = ", ".join(sorted(content)) or "nothing"
        raise ValueError(f"it must have the keys compare_with and configurations, not {keys}")
    configurations, compare_with = content["configurations"], content["compare_with"]
    if not isinstance(configurations, dict) or not configurations:
        raise ValueError("configurations must name at least one configuration with its model arguments")
    for name, arguments in configurations.items():
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name for a configuration: letters, digits, '_', '.' and '-', the first one a letter "
                "or a digit"
            )
        if not isinstance(arguments, dict):
            raise ValueError(f"configuration {name} must have an object of model arguments, not {arguments!r}")
        configurations[name] = check_arguments(arguments, defaults, f"configuration {name}: ")
        _check_built_in_meaning(name, configurations[name], defaults)
    if not isinstance(compare_with, str) or compare_with not in configurations:
        raise ValueError(f"compare_with must be one of {', '.join(configurations)}, not {compare_with!r}")
    is_control = content.get("control", False)
    if not isinstance(is_control, bool):
        raise ValueError(f"control must be true or false, not {is_control!r}")
    return Matrix(configurations, compare_with, is_control)


def _check_built_in_meaning(name: str, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """`plain` and `k<k>_<a>-<b>` mean the same in every experiment. Raises ValueError for another meaning."""
    built_in = _beside_the_matrix(name, defaults)
    if built_in is None:
        return
    effective, expected = {**defaults, **arguments}, {**defaults, **built_in}
    if any(canonical(effective[key]) != canonical(value) for key, value in expected.items()):
        meaning = ", ".join(f"{key}={canonical(value)}" for key, value in built_in.items())
        raise ValueError(f"the configuration {name!r} is built in ({meaning}); give yours another name")


def defaults_of(experiment: str | None, root: Path) -> dict[str, object]:
    """Every argument that a token of this experiment depends on, with its default: the shared ones and its knobs.

    reuse_k and layer_subset are shared only where no Options declare knobs. Raises UsageError as `read_knobs` does.
    """
    folder = Path(root) / "experiments" / experiment if experiment is not None else Path(root)
    knobs = read_knobs(folder / GENERATION_FILE)
    if knobs is None:
        return dict(DEFAULTS)
    return {**{name: value for name, value in DEFAULTS.items() if name not in REUSE_ARGUMENTS}, **knobs}


# -- one configuration -------------------------------------------------------------------------------------------------
def _beside_the_matrix(name: str, defaults: Mapping[str, object]) -> dict[str, object] | None:
    reuse = set(REUSE_ARGUMENTS) <= set(defaults)
    if name == "plain":
        return {"reuse_k": 1, "layer_subset": None, "threshold": 1} if reuse else {"threshold": 1}
    match = _RANGE.fullmatch(name)
    if match and reuse:
        k, first, last = map(int, match.groups())
        if first <= last and name == f"k{k}_{first}-{last}":
            return {"reuse_k": k, "layer_subset": f"{first}-{last}"}
    return None


def arguments_of(matrix: Matrix, name: str, defaults: Mapping[str, object]) -> dict[str, object]:
    """The model arguments that configuration `name` sets. Raises UsageError listing the valid names."""
    if name in matrix.configurations:
        return dict(matrix.configurations[name])
    arguments = _beside_the_matrix(name, defaults)
    if arguments is None:
        further = ["plain"] + ["k<k>_<a>-<b> for a range of layers"] * (set(REUSE_ARGUMENTS) <= set(defaults))
        raise UsageError(f"no configuration named {name!r}; valid: {' '.join(matrix.names)} {', '.join(further)}")
    return arguments


def check_names(matrix: Matrix, names: Iterable[str], defaults: Mapping[str, object]) -> list[str]:
    """The names, each once. Raises UsageError."""
    for name in names:
        arguments_of(matrix, name, defaults)
    return list(dict.fromkeys(names))


def effective_arguments(
    matrix: Matrix, name: str, arguments_given: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, object]:
    """Every argument that a token depends on, as configuration `name` runs with: command line, matrix, defaults."""
    merged = {**defaults, **arguments_of(matrix, name, defaults)}
    merged.update((key, value) for key, value in arguments_given.items() if key in defaults)
    return merged


def parse_folder(folder: str) -> tuple[str, dict[str, object]]:
    """(configuration, what a run changed of it), of a folder's name: the inverse of `folder_name`."""
    name, *changes = folder.split("+")
    return name, parse_arguments(",".join(changes)) if changes else {}


def folder_name(matrix: Matrix, name: str, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The folder of a run of configuration `name` with these arguments, all of them or those of the command line.

    defaults: `defaults_of` the experiment, and where the task's own number of examples is known, `num_fewshot`.
    Arguments that are not among them (the model, the device, the batch) change no token and do not stand in the name.
    """
    usual = {**defaults, **arguments_of(matrix, name, defaults)}
    changed = [
        f"{key}={canonical(arguments[key])}"
        for key in sorted(arguments)
        if key in usual and canonical(arguments[key]) != canonical(usual[key])
    ]
    return "+".join([name, *changed])


def folder_of(matrix: Matrix, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The folder of a run for which no configuration was named, from all of its arguments.

    It is named after the configuration that sets the most arguments, of those of which the run has every one; where
    there is none, after `k<k>_<a>-<b>` if it reuses a range of layers, else after `plain`.
    """
    arguments_given = {name: value for name, value in arguments.items() if name in defaults}
    matching = [
        (len(settings), name)
        for name, settings in matrix.configurations.items()
        if all(canonical(arguments_given[key]) == canonical(value) for key, value in settings.items())
    ]
    if matching:
        most = max(count for count, _ in matching)
        name = next(name for count, name in matching if count == most)
    else:
        name = f"k{arguments_given.get('reuse_k')}_{arguments_given.get('layer_subset')}"
        if _beside_the_matrix(name, defaults) is None:
            name = "plain"
    return folder_name(matrix, name, arguments_given, defaults)
