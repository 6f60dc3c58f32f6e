"""The checkpoint's tokenizer and the three special ids that decoding needs, read from it and never hard-coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fast_dllm.errors import UsageError, line_of
from fast_dllm.network.chat_template import check_chat_template, require_chat_template
from fast_dllm.network.config import read_config
from fast_dllm.network.loading import loading_error, model_source

MASK_TOKEN = "|<MASK>|"  # Fast-dLLM v2's name for it; a tokenizer with a mask_token of its own need not have it


@dataclass(frozen=True)
class SpecialIds:
    """Token ids: what masked positions hold, what ends an answer, what pads."""

    mask: int
    stop: int
    pad: int


def load_tokenizer(path_or_hub_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub id or `tiny`.

    Raises UsageError where there is none, where the model's config.json cannot be used, and for an endless chat
    template; DataError where the hub does not answer. A tokenizer without a chat template is accepted, see
    `require_chat_template`.
    """
    source = model_source(path_or_hub_id)
    try:
        config = read_config(source)
    except (OSError, ValueError) as error:
        raise loading_error("model", path_or_hub_id, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    except Exception as error:  # a damaged file gives errors of many kinds, some of them Rust's
        raise loading_error("the tokenizer of", path_or_hub_id, error) from error
    check_chat_template(tokenizer)
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """The special ids of a tokenizer. Raises UsageError for one without a mask or an end-of-turn token."""
    mask = tokenizer.mask_token_id
    if mask is None:
        mask = tokenizer.get_vocab().get(MASK_TOKEN)
    if mask is None:
        raise UsageError(f"the tokenizer of {tokenizer.name_or_path!r} has no mask token ({MASK_TOKEN})")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return SpecialIds(mask=mask, stop=tokenizer.eos_token_id, pad=pad)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Write a conversation as text by the chat template.

    add_generation_prompt: the text ends where the model's answer begins; else the last message can be continued. Raises
    UsageError if the tokenizer has no template, or if the template refuses the conversation.
    """
    require_chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
    except TemplateError as error:
        raise UsageError(f"the chat template of {tokenizer.name_or_path!r} fails: {line_of(error)}") from error
    assert isinstance(text, str), "one conversation, not tokenized"
    return text


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of one sequence of tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str), "one sequence"
    return text
