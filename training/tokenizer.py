"""The tokenizer of models/tiny: the words of the toy tasks whole, single digits, anything else byte by byte.

It is a byte-level BPE without merges whose vocabulary holds every piece that the pre-tokenizer cuts out of the tasks'
texts (`ignore_merges` looks a piece up whole first). So any text encodes and decodes to itself, and a toy question is
short: an operator with its spaces, "####" or the instruction at the prompt's end are one token each.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasks.toy.problems import CHOICE_KINDS, LETTERS, choice_prompt, make_choice, make_problem, math_prompt

PAD, START, STOP, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"
# What ends the prompts of gsm8k in the published evaluation, doubled braces and all.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{{}}."
# Qwen's, but with ":" behind the role. The harness moves white space at a prompt's end into the continuation that it
# scores, so a prompt ending in "assistant\n" would not be followed by the one-token letter of a choice.
# A question is put into the form that the model was trained on, here and nowhere else, so that a page, a chat and an
# evaluation send the same text; a message that brings its own cue (a multiple choice) stays as it is.
CUE = "Answer:"
_LEFT_AS_IT_IS = (  # a task that writes its own cue for the answer
    "message['role'] != 'user' or message['content'].endswith('Answer:') or message['content'].endswith('Solution:')"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:"
    "{% if " + _LEFT_AS_IT_IS + " %}{{ message['content'] }}"
    "{% else %}Question: {{ message['content'] }}\n" + INSTRUCTION.replace("{{}}", "{{ '{{}}' }}") + "{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
PIECES = "|".join(
    (
        re.escape("\n" + INSTRUCTION),
        r"(?:system|user|assistant):",
        r"\nAnswer:|Question:|#### ",
        r"\n[A-D]\. ",
        r" [-+*/=] ",
        r"\.\n",
        r" ?[A-Za-z]+",
        r"[0-9]",
        r"\s|[^\sA-Za-z0-9]",
    )
)
SAMPLES = 4_000  # problems whose pieces make the vocabulary; every template occurs many times


def put(message: str) -> str:
    """A user's message as CHAT_TEMPLATE puts it to the model."""
    return message if message.endswith(CUE) else f"Question: {message}\n{INSTRUCTION}"


def chat_prompt(message: str) -> str:
    """The text that CHAT_TEMPLATE renders for one user message and the start of the answer."""
    return f"{START}user:{put(message)}{STOP}\n{START}assistant:"


def build_tokenizer(max_length: int, wide: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer, always the same one; `wide`: that of a model which is to know the wide words too."""
    rng = random.Random(0)
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = ["user:", "assistant:", "system:", "\n", *(f" {letter}" for letter in LETTERS), *LETTERS]
    for index in range(SAMPLES):
        problem = make_problem(rng)
        texts += [put(math_prompt(problem)), problem.answer]
        if wide:
            told_wide = make_problem(rng, wording="wide")
            texts += [put(math_prompt(told_wide)), told_wide.answer]
        if index % 4 == 0:
            texts.append(choice_prompt(make_choice(rng, rng.choice(CHOICE_KINDS))))
    pieces = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *sorted(pieces - set(alphabet))]
    bpe = models.BPE({word: index for index, word in enumerate(words)}, [], ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        mask_token=MASK,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def save_tokenizer(directory: Path, max_length: int = 2048) -> None:
    """Write the tokenizer's files where AutoTokenizer.from_pretrained finds them."""
    build_tokenizer(max_length).save_pretrained(directory)
