"""A model that is ready to answer: the network on its device, its tokenizer, and the sizes that decoding needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fast_dllm.errors import UsageError
from fast_dllm.network.chat_template import require_chat_template
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import use_graphs
from fast_dllm.network.threads import fit_threads
from fast_dllm.network.tokenizer import SpecialIds, decode, load_tokenizer, render, special_ids


@dataclass
class LoadedModel:
    """A network with its tokenizer and sizes. Make it with `load`.

    block_size: tokens of a block. max_length: the most positions that a prompt with its answer may have, a whole number
    of blocks. num_threads: torch's number of threads.
    """

    network: FastDLLMForCausalLM
    tokenizer: PreTrainedTokenizerBase
    ids: SpecialIds
    block_size: int
    max_length: int
    num_threads: int

    @classmethod
    def load(
        cls,
        path_or_hub_id: str,
        device: str = "auto",
        dtype: str = "auto",
        *,
        graphs: str = "auto",
        block_size: int | None = None,
        several: bool = False,
        chat_template: bool = False,
    ) -> LoadedModel:
        """Load a folder, a hub id, or `tiny` (the embedded model).

        graphs: see `network.modes.use_graphs`. block_size: by default the model's own. several: whether sequences
        will be decoded side by side. chat_template: whether conversations will be written as text, which takes the
        tokenizer's template. Raises UsageError for a checkpoint or a tokenizer that is missing, damaged or not
        supported, and for an unknown device or dtype.
        """
        tokenizer = load_tokenizer(path_or_hub_id)
        ids = special_ids(tokenizer)
        if chat_template:
            require_chat_template(tokenizer)
        network = load_model(path_or_hub_id, device, dtype)
        num_threads = fit_threads(network)
        network = use_graphs(network, graphs, several=several)
        config = network.config
        if max(ids.mask, ids.stop) >= config.vocab_size:
            raise UsageError(f"the tokenizer's special ids {ids} are outside the model's {config.vocab_size} tokens")
        size = block_size or config.bd_size
        return cls(network, tokenizer, ids, size, config.max_position_embeddings // size * size, num_threads)

    @property
    def start_id(self) -> int:
        """Token id that is put before a text without context, so that its first token can be scored."""
        start = self.tokenizer.bos_token_id
        return self.ids.stop if start is None else start

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens or a chat template."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_message(self, message: str) -> list[int]:
        """Token ids of a user's message in the model's chat template, up to where the answer begins."""
        messages = [{"role": "user", "content": message}]
        return self.encode(render(self.tokenizer, messages, add_generation_prompt=True))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without the special ones."""
        return decode(self.tokenizer, token_ids, skip_special_tokens=True)
