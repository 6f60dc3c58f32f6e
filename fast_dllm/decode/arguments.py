"""The model arguments that eval.py, the web page and the chat share, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fast_dllm.decode import experiments
from fast_dllm.decode.batching import AUTO
from fast_dllm.errors import UsageError
from fast_dllm.spec.defaults import DEFAULT_MODEL, GRAPH_MODES
from fast_dllm.spec.matrix import canonical, defaults_of, effective_arguments, folder_name, matrix_of, parse_value
from fast_dllm.spec.request import resolve_model

DTYPES = ("auto", "float32", "float16", "bfloat16")
LOGLIKELIHOOD_MODES = ("reference", "chain")
BLOCK_SIZE = 32  # where neither bd_size nor a model that is loaded says otherwise: the published checkpoint's
NO_VALUE = (None, "None", "none")


class HasKnobs:
    """Something whose `knobs`, the decoding options by name, read like its own fields."""

    knobs: Mapping[str, object]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "knobs" or name not in self.knobs:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return self.knobs[name]

    def whole(self, name: str) -> int:
        """A knob that counts something."""
        value = self.knobs[name]
        assert isinstance(value, int), f"{name} was checked to be a whole number"
        return value


@dataclass(frozen=True)
class ModelArguments(HasKnobs):
    """How a model is loaded and decodes. `ModelArguments.parse` checks; the defaults are the documented ones.

    knobs: every option of the experiment's decoding (its Options, but for what the model and the tokenizer give).
    """

    model_path: str = DEFAULT_MODEL
    experiment_name: str | None = None
    bd_size: int | None = None
    loglikelihood_mode: str = "reference"
    batch_size: int | str = 1  # or AUTO
    dtype: str = "auto"
    device: str = "auto"
    graphs: str = "auto"
    seed: int = 0
    show_speed: bool = False
    knobs: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def parse(cls, **given: object) -> ModelArguments:
        """Build from keyword arguments as a command line gives them. Raises UsageError naming fault and choices."""
        name = given.get("experiment_name")
        experiment = experiments.load(None if name in NO_VALUE else str(name))
        knobs = knob_defaults(experiment)
        shared = [each.name for each in fields(cls) if each.name != "knobs"]
        for name in given:
            if name not in shared and name not in knobs:
                raise UsageError(f"unknown model argument {name!r}; valid ones: {', '.join([*shared, *knobs])}")
        values = {name: value for name, value in given.items() if name in shared and value not in NO_VALUE}
        for name in ("batch_size", "bd_size"):
            if name in values and (name, values[name]) != ("batch_size", AUTO):
                also = f", or {AUTO}" if name == "batch_size" else ""
                values[name] = whole_number(name, values[name], minimum=1, also=also)
        if given.get("model_path") is not None:
            resolve_model(str(given["model_path"]), Path.cwd(), "model_path")
        if "seed" in values:
            values["seed"] = whole_number("seed", values["seed"], minimum=0)
        if not isinstance(values.get("show_speed", False), bool):
            raise UsageError(f"show_speed must be True or False, not {values['show_speed']!r}")
        for name in ("model_path", "experiment_name", "dtype", "device", "graphs", "loglikelihood_mode"):
            if name in values:
                values[name] = str(values[name])
        for name, default in knobs.items():
            if name in given:
                knobs[name] = of_kind(name, given[name], default)
        valid = (("dtype", DTYPES), ("loglikelihood_mode", LOGLIKELIHOOD_MODES), ("graphs", GRAPH_MODES))
        for name, choices in valid:
            if values.get(name, choices[0]) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {values[name]!r}")
        arguments = cls(**values, knobs=MappingProxyType(knobs))  # type: ignore[arg-type]  # each was checked above
        block_size = arguments.bd_size or BLOCK_SIZE
        # fewer new tokens than a block are a whole block
        num_tokens = max(block_size, whole_number("max_new_tokens", knobs["max_new_tokens"], minimum=1))
        experiment.check({**knobs, "block_size": block_size, "max_new_tokens": num_tokens})
        return arguments

    @property
    def config_name(self) -> str:
        """The name results are stored under: the configuration that differs least, and in what (runner.matrix)."""
        root = experiments.EXPERIMENTS.parent
        matrix, defaults = matrix_of(self.experiment_name, root), defaults_of(self.experiment_name, root)
        own = {name: value for name, value in self.as_dict().items() if name in defaults}
        names = [*matrix.names, "plain"]
        if own.get("layer_subset") is not None:
            names.append(f"k{own['reuse_k']}_{own['layer_subset']}")

        def differences(name: str) -> int:
            expected = effective_arguments(matrix, name, {}, defaults)
            return sum(canonical(own[key]) != canonical(expected[key]) for key in own)

        name = min(names, key=differences)
        if differences(name) and own.get("layer_subset", "") is None:
            name = "plain"  # without a range of layers it is no configuration of layer reuse, however near one may be
        return folder_name(matrix, name, own, defaults)

    def as_dict(self) -> dict[str, object]:
        """Every argument by name, the knobs among them."""
        shared = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "knobs"}
        return shared | dict(self.knobs)


def knob_defaults(experiment: experiments.Experiment) -> dict[str, object]:
    """The experiment's decoding options with their defaults; the block's size is the model argument bd_size."""
    return {name: value for name, value in experiment.knobs.items() if name != "block_size"}


def of_kind(name: str, value: object, default: object) -> object:
    """A knob's value, of the kind of its default, from a command line's text or a number. Raises UsageError."""
    if isinstance(value, str):
        value = parse_value(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{name} must be True or False, not {value!r}")
    elif isinstance(default, int):
        return whole_number(name, value, minimum=0 if default == 0 else 1)
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            low_high = " from 0 to 1" if name == "threshold" else ""
            raise UsageError(f"{name} must be a number{low_high}, not {value!r}")
        return float(value)
    elif default is not None and not isinstance(value, str):
        raise UsageError(f"{name} must be a word such as {default!r}, not {value!r}")
    return value


def whole_number(name: str, value: object, minimum: int, also: str = "") -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < minimum:  # type: ignore[operator]  # it is a number here
        raise UsageError(f"{name} must be a whole number of at least {minimum}{also}, not {value!r}")
    return int(value)  # type: ignore[call-overload]
