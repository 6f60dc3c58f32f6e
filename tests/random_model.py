"""A model folder with the golden random weights and a byte-level tokenizer: nothing to download, any text encodes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).resolve().parent / "golden"
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "|<MASK>|": 319}
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 3..258 are the bytes, the special tokens stand where the golden models expect them."""
    vocab = dict(SPECIAL)
    vocab |= {char: 3 + index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", mask_token="|<MASK>|"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_random_model(folder: Path, name: str = "tiny36", num_layers: int | None = None) -> Path:
    """Write config, weights and tokenizer of a golden model, or of its first layers, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((GOLDEN / f"{name}.config.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    if num_layers is not None:
        left_out = tuple(f"model.layers.{layer}." for layer in range(num_layers, config["num_hidden_layers"]))
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(left_out)}
        config["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder
