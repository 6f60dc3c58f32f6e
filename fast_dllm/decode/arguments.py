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

BLOCK_SIZE = 32  # the published checkpoint's; used if neither bd_size nor a loaded model gives another
NO_VALUE = (None, "None", "none")
TEXTS = ("model_path", "experiment_name", "device")  # stay text even if they look like numbers


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The arguments that say how a model is loaded and decodes. Build it with `parse`, which checks them.

    experiment: the loaded policy that `experiment_name` names. knobs: the value of every option of that policy, except
    those that the model and the tokenizer set.
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
    def parse(cls, experiment: Experiment | None = None, /, **arguments: Any) -> ModelArguments:
        """Build the arguments from keywords with the values that a command line has.

        experiment: the policy, if the caller has loaded it already; by default it is loaded by its name. Raises
        UsageError, which names the fault and the valid choices.
        """
        defaults = {each.name: each.default for each in fields(cls) if each.default is not MISSING}
        arguments = {name: value for name, value in arguments.items() if not (name in defaults and value in NO_VALUE)}
        values: dict[str, Any] = {name: str(arguments.pop(name)) for name in TEXTS if name in arguments}
        name = values.get("experiment_name")
        if experiment is None or experiment.name != name:
            experiment = experiments.load(name)
        if "batch_size" in arguments:
            values["batch_size"] = batch_size_of(arguments.pop("batch_size"))
        checked = check_arguments(arguments, {**defaults, **experiment.model_arguments})
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
        """The name of the results' folder: a configuration of the experiment, and the arguments that differ from it."""
        root = experiments.EXPERIMENTS.parent
        return folder_of(matrix_of(self.experiment_name, root), self.as_dict(), defaults_of(self.experiment_name, root))

    def as_dict(self) -> dict[str, Any]:
        """Every argument by name, the knobs among them."""
        shared = {each.name: getattr(self, each.name) for each in fields(self) if each.default is not MISSING}
        return shared | dict(self.knobs)


def batch_size_of(value: object) -> int | str:
    """A batch size from a text or a number: AUTO, or a whole number of at least 1. Raises UsageError."""
    return AUTO if value == AUTO else whole_number("batch_size", value, minimum=1, also=f", or {AUTO}")
