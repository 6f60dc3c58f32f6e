"""The network as a transformers model, for who wants AutoModelForCausalLM: importing this module registers it.

Nothing here does: transformers' base class takes as long to import as all else that an evaluation needs.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PreTrainedModel

from fast_dllm.config import FastDLLMConfig
from fast_dllm.model import FastDLLMForCausalLM


class PreTrainedFastDLLM(FastDLLMForCausalLM, PreTrainedModel):  # type: ignore[misc]  # its config and save_pretrained
    config_class = FastDLLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (declared so by its base, which changes no list)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as above)

    def __init__(self, config: FastDLLMConfig):
        PreTrainedModel.__init__(self, config)
        self.build(config)
        self.post_init()


AutoModelForCausalLM.register(FastDLLMConfig, PreTrainedFastDLLM)
