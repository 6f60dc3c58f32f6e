"""The model arguments that eval.py, the web page and the chat share, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fast_dllm.decode import experiments
from fast_dllm.decode.batching import AUTO
from fast_dllm.decode.experiments import Experiment
from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.matrix import defaults_of, folder_of, matrix_of
from fast_dllm.spec.request import resolve_model
from fast_dllm.spec.values import check_arguments, whole_number

BLOCK_SIZE = 32  # where neither bd_size nor a model that is loaded says otherwise: the published checkpoint's
NO_VALUE = (None, "None", "none")
TEXTS = ("model_path", "experiment_name", "device")  # taken as they are written, also where they look like numbers


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """How a model is loaded and decodes. `ModelArguments.parse` checks; the defaults are the documented ones.

    experiment: the loaded policy, of the name `experiment_name`. knobs: every option of its decoding (its Options,
    but for what the model and the tokenizer give).
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
    experiment: Experiment = field(compare=False, repr=False)
    knobs: Mapping[str, Any]

    @classmethod
    def parse(cls, experiment: Experiment | None = None, /, **given: Any) -> ModelArguments:
        """Build from keyword arguments as a command line gives them.

        experiment: the policy where the caller has loaded it already; by default it is loaded by its name. Raises
        UsageError, which names the fault and the valid choices.
        """
        defaults = {each.name: each.default for each in fields(cls) if each.default is not MISSING}
        given = {name: value for name, value in given.items() if not (name in defaults and value in NO_VALUE)}
        values: dict[str, Any] = {name: str(given.pop(name)) for name in TEXTS if name in given}
        name = values.get("experiment_name")
        if experiment is None or experiment.name != name:
            experiment = experiments.load(name)
        if "batch_size" in given:
            values["batch_size"] = batch_size_of(given.pop("batch_size"))
        checked = check_arguments(given, {**defaults, **experiment.model_arguments})
        if "model_path" in values:
            resolve_model(values["model_path"], Path.cwd(), "model_path")
        values.update((name, value) for name, value in checked.items() if name in defaults)
        knobs = {name: checked.get(name, default) for name, default in experiment.model_arguments.items()}
        block_size = values.get("bd_size", BLOCK_SIZE)
        # fewer new tokens than a block are a whole block
        experiment.check(
            {**knobs, "block_size": block_size, "max_new_tokens": max(block_size, knobs["max_new_tokens"])}
        )
        return cls(**values, experiment=experiment, knobs=MappingProxyType(knobs))

    @property
    def config_name(self) -> str:
        """The name that results are stored under: a configuration of the experiment, and what differs from it."""
        root = experiments.EXPERIMENTS.parent
        return folder_of(matrix_of(self.experiment_name, root), self.as_dict(), defaults_of(self.experiment_name, root))

    def as_dict(self) -> dict[str, Any]:
        """Every argument by name, the knobs among them."""
        shared = {each.name: getattr(self, each.name) for each in fields(self) if each.default is not MISSING}
        return shared | dict(self.knobs)


def batch_size_of(value: object) -> int | str:
    """A batch size from a text or a number: AUTO, or a whole number of at least 1. Raises UsageError."""
    return AUTO if value == AUTO else whole_number("batch_size", value, minimum=1, also=f", or {AUTO}")
