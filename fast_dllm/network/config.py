"""The checkpoint's configuration, under the `model_type` it was published with."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from fast_dllm.errors import UsageError
from fast_dllm.spec.checkpoint import (
    CHECKED,
    CONFIG_FILE,
    MODEL_TYPE,
    ROPE_FIELDS,
    WITHOUT_EFFECT,
    config_fault,
    missing_fields,
    read_object,
)

logger = logging.getLogger(__name__)


class FastDLLMConfig(PreTrainedConfig):
    """Sizes and constants of a Fast-dLLM v2 network (arXiv 2509.26328; Qwen2.5 with block-causal attention).

    The field names are the published `config.json`'s. bd_size: the block length that the model was trained with, in
    tokens. single_turn (an addition of this project): interfaces send only the last question, without earlier turns.
    rope_theta is also read from `rope_parameters`, where transformers 5 writes it.

    Raises UsageError for a network that is not supported, see fast_dllm.spec.checkpoint.
    """

    model_type = MODEL_TYPE

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = None  # type: ignore[assignment]  # not given: that of rope_parameters, or 1e6
    tie_word_embeddings: bool = False
    bd_size: int = 32
    single_turn: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        names = [field.name for field in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names if name in FastDLLMConfig.__annotations__} | kwargs
        if self.dtype is not None:
            values["dtype"] = self.dtype if isinstance(self.dtype, str) else str(self.dtype).removeprefix("torch.")
        if values["rope_theta"] is None:
            del values["rope_theta"]
        if fault := config_fault(values):
            raise UsageError(fault)
        # removed from what transformers sees: it warns about the names and does not use the values
        tables = [kwargs.pop(name, None) or {} for name in ROPE_FIELDS]
        kwargs.pop("head_dim", None)
        if self.rope_theta is None:
            self.rope_theta = next((table["rope_theta"] for table in tables if "rope_theta" in table), 1e6)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads


def read_fields(source: str) -> dict[str, Any]:
    """Read the fields of a checkpoint's config.json. source: a folder or a hub id.

    Raises UsageError if the file is damaged, lacks a field or describes a network that is not supported, and OSError
    if the file does not exist.
    """
    path = cached_file(source, CONFIG_FILE)
    assert path is not None, "an absent file is an OSError"
    fields = read_object(Path(path))
    fault = config_fault(fields)
    if not fault and (missing := missing_fields(fields)):
        fault = f"it lacks {missing[0]}"
    if fault:
        raise UsageError(f"{CONFIG_FILE}: {fault}")
    return fields


def read_config(source: str) -> FastDLLMConfig:
    """The configuration in a checkpoint's config.json. Warns of fields that have no effect. Raises as `read_fields`."""
    fields = read_fields(source)
    known = {field.name for field in dataclasses.fields(FastDLLMConfig)} | CHECKED | WITHOUT_EFFECT
    if unknown := sorted(set(fields) - known):
        _warn_once(f"{CONFIG_FILE} of {source}: unknown fields have no effect: {', '.join(unknown)}")
    parameters = (CHECKED | FastDLLMConfig.__annotations__.keys()) - {"model_type"}
    return FastDLLMConfig(**{name: value for name, value in fields.items() if name in parameters})


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning, but only once, because the tokenizer and the model read the same file."""
    logger.warning(text)
