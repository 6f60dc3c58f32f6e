"""Experiment name -> the module with its generation code. A name that is not there is an error, never a fallback."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from fast_dllm.errors import UsageError
from fast_dllm.runner.matrix import NAME

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
GENERATION_FILE = "generation_functions.py"

# What every generate() and denoise() takes; further parameters need defaults.
CONTRACT = (
    "model",
    "prompts",
    "mask_id",
    "stop_token",
    "max_new_tokens",
    "block_size",
    "small_block_size",
    "threshold",
    "use_block_cache",
    "temperature",
    "top_p",
    "reuse_k",
    "layer_subset",
    "generator",
)


def available() -> list[str]:
    """Names under experiments/ that have generation code."""
    names = (path.parent.name for path in EXPERIMENTS.glob(f"*/{GENERATION_FILE}"))
    return sorted(name for name in names if NAME.fullmatch(name))


def generation_file(name: str | None) -> Path:
    """The file of an experiment, or the active top-level one for None. Raises UsageError listing those that exist."""
    if name is None:
        return ROOT / GENERATION_FILE
    choices = ", ".join(available()) or "none"
    if not NAME.fullmatch(str(name)) or not (EXPERIMENTS / str(name)).is_dir():
        raise UsageError(f"unknown experiment {name!r}; there are: {choices}")
    path = EXPERIMENTS / name / GENERATION_FILE
    if not path.is_file():
        raise UsageError(f"experiment {name!r} has no {GENERATION_FILE}; experiments that have: {choices}")
    return path


def load(name: str | None) -> ModuleType:
    """Import experiments/<name>/generation_functions.py (None: the active file) and check that it keeps the contract.

    Raises UsageError for an unknown name, a missing file, or a generate()/denoise() whose parameters are missing
    or misnamed. An exception of the code itself passes through.
    """
    path = generation_file(name)
    module_name = "fast_dllm_generation_" + ("active" if name is None else re.sub(r"\W", "_", name))
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    for function_name in ("generate", "denoise"):
        _check_contract(path, function_name, getattr(module, function_name, None))
    return module


def _check_contract(path: Path, name: str, function: object) -> None:
    where = f"{path.parent.name}/{path.name}"
    if not callable(function):
        raise UsageError(f"{where} has no function {name}(); it takes: {', '.join(CONTRACT)}")
    parameters = inspect.signature(function).parameters
    missing = [parameter for parameter in CONTRACT if parameter not in parameters]
    unknown = [
        key for key, parameter in parameters.items() if key not in CONTRACT and parameter.default is parameter.empty
    ]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"requires {', '.join(unknown)}"] * bool(unknown)
        raise UsageError(f"{name}() in {where} {' and '.join(faults)}; it takes: {', '.join(CONTRACT)}")
