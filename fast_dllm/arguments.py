"""The model arguments that eval.py, the web page and the chat share, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from fast_dllm.errors import UsageError
from fast_dllm.experiments import generation_file
from fast_dllm.layer_reuse import LAYER_SUBSETS, REUSE_KS, check_reuse
from fast_dllm.results import config_name

DEFAULT_MODEL = "Efficient-Large-Model/Fast_dLLM_v2_7B"
DTYPES = ("auto", "float32", "float16", "bfloat16")
LOGLIKELIHOOD_MODES = ("reference", "chain")
# The experiment's matrix, in the order of every table: k rows, subsets first/middle/last.
CONFIGURATIONS = {
    config_name(k, subset): {"reuse_k": k, "layer_subset": subset} for k in REUSE_KS for subset in LAYER_SUBSETS
}


@dataclass(frozen=True)
class ModelArguments:
    """How a model is loaded and decodes. `ModelArguments.parse` checks; the defaults are the documented ones."""

    model_path: str = DEFAULT_MODEL
    experiment_name: str | None = None
    reuse_k: int = 1
    layer_subset: str | None = None
    threshold: float = 0.9
    use_block_cache: bool = True
    small_block_size: int = 8
    bd_size: int | None = None
    max_new_tokens: int = 2048
    loglikelihood_mode: str = "reference"
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    show_speed: bool = False

    @classmethod
    def parse(cls, **given: object) -> ModelArguments:
        """Build from keyword arguments as a command line gives them. Raises UsageError naming fault and choices."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise UsageError(f"unknown model argument {name!r}; valid ones: {', '.join(names)}")
        values = {name: value for name, value in given.items() if value not in (None, "None", "none")}
        for name in ("batch_size", "max_new_tokens", "small_block_size", "bd_size", "reuse_k"):
            if name in values:
                values[name] = _integer(name, values[name], minimum=1)
        if "seed" in values:
            values["seed"] = _integer("seed", values["seed"], minimum=0)
        for name in ("use_block_cache", "show_speed"):
            if name in values and not isinstance(values[name], bool):
                raise UsageError(f"{name} must be True or False, not {values[name]!r}")
        for name in ("model_path", "experiment_name", "layer_subset", "dtype", "device", "loglikelihood_mode"):
            if name in values:
                values[name] = str(values[name])
        arguments = cls(**values)
        arguments._check()
        return arguments

    def _check(self) -> None:
        try:
            check_reuse(self.reuse_k, self.layer_subset)
        except ValueError as error:
            raise UsageError(str(error)) from None
        threshold = self.threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise UsageError(f"threshold must be a number from 0 to 1, not {threshold!r}")
        if (self.bd_size or 32) % self.small_block_size:
            raise UsageError(
                f"small_block_size must divide the block of {self.bd_size or 32}, not {self.small_block_size}"
            )
        for name, choices in (("dtype", DTYPES), ("loglikelihood_mode", LOGLIKELIHOOD_MODES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        generation_file(self.experiment_name)

    @property
    def config_name(self) -> str:
        """The name results are stored under (fast_dllm.results.config_name)."""
        return config_name(self.reuse_k, self.layer_subset)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _integer(name: str, value: object, minimum: int) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, int) or whole) or value < minimum:
        raise UsageError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
    return int(value)
