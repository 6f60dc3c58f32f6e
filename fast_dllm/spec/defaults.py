"""The shared model arguments that a token depends on, with their defaults: one place for scripts and Python."""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping, Sequence

PUBLISHED_MODELS = (
    "Efficient-Large-Model/Fast_dLLM_v2_7B",
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B",
)  # the 1.5B's embeddings are tied
DEFAULT_MODEL = PUBLISHED_MODELS[0]
DEFAULT_EXPERIMENT = "00_baseline"
AUTO = "auto"  # given to an option of the scripts: choose the value from what is known

# model_path stays out: a result's folder is not named after its model (--status compares it). So do device, batch_size,
# graphs and show_speed, which change no token.
DEFAULTS: Mapping[str, object] = MappingProxyType(
    {
        "reuse_k": 1,
        "layer_subset": None,
        "threshold": 0.9,
        "use_block_cache": True,
        "small_block_size": 8,
        "bd_size": None,
        "max_new_tokens": 2048,
        "loglikelihood_mode": "reference",
        "dtype": "auto",
        "seed": 0,
    }
)
# How the model runs. It changes no token and is no part of a folder's name; the scripts' --model_args takes it too.
GRAPH_MODES = ("auto", "off", "compiled")
# The valid words of the arguments that take only some.
CHOICES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "loglikelihood_mode": ("reference", "chain"),
        "dtype": ("auto", "float32", "float16", "bfloat16"),
        "graphs": GRAPH_MODES,
    }
)
# Policy: an experiment whose Options declare knobs takes these two only where they are among them.
REUSE_ARGUMENTS = ("reuse_k", "layer_subset")
