"""Fast-dLLM v2: block-diffusion decoding with layer reuse, and the experiments on it.

from fast_dllm import experiments, load_model

model = load_model("tiny")
answers = experiments.load("00_baseline").generate(model, ["Tom has 3 pens. He buys 4 more. How many has he now?"])
print(model.decode(answers[0].tokens))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fast_dllm.decode import experiments
    from fast_dllm.decode.loaded import LoadedModel

    load_model = LoadedModel.load

__version__ = "0.1.0"
__all__ = ("experiments", "load_model")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import fast_dllm` itself needs neither torch nor a venv."""
    if name == "experiments":
        return import_module("fast_dllm.decode.experiments")
    if name == "load_model":
        return import_module("fast_dllm.decode.loaded").LoadedModel.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
