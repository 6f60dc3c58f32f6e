"""Batches for the two training objectives, made as they are needed from a random generator and nothing else.

Autoregressive: one causal sequence a problem. Block diffusion (Fast-dLLM v2): the clean sequence followed by two noisy
copies of the blocks that hold the answer, so the clean rows are computed once for both complementary masks. The last
clean block is left out: nothing attends to it and it predicts nothing.
Everything is token-shifted: the row at position p predicts the token at p + 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.network.cache import block_causal_mask
from tasks.toy.problems import CHOICE_KINDS, LETTERS, choice_prompt, make_choice, make_problem, math_prompt
from training.tokenizer import STOP, chat_prompt

COPIES = 2  # noisy copies a clean one; they share its keys and values
LETTER_WEIGHT = 8.0  # a choice has one token that matters, a worked answer about twenty
AFTER_STOP_WEIGHT = 0.1  # the padding behind the first stop token: decoding never reads it


@dataclass(frozen=True)
class Example:
    """Token ids of one prompt and its answer; the answer ends with one stop token."""

    prompt: list[int]
    answer: list[int]
    is_choice: bool

    def weight(self, index: int) -> float:
        """What the answer's token `index` (past its end: padding) counts in the loss."""
        if index >= len(self.answer):
            return AFTER_STOP_WEIGHT
        return LETTER_WEIGHT if self.is_choice and index == 0 else 1.0


@dataclass(frozen=True)
class Batch:
    """One forward and its loss: ids, position_ids (B, T); mask (T, T); rows, targets, weights (B, R)."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def make_examples(
    tokenizer,
    rng: random.Random,
    count: int,
    choice_share: float,
    num_steps_shares: Sequence[float] | None = None,
    wide_share: float = 0.0,
) -> list[Example]:
    """`count` fresh training examples: toy_math problems and a share of toy_choice questions.

    `num_steps_shares` weighs problems of one, two, ... steps in classic words; None leaves that to the generator.
    `wide_share` of the problems are told in wide words, with as many steps as the generator likes.
    """
    texts = []
    for _ in range(count):
        if rng.random() < choice_share:
            choice = make_choice(rng, rng.choice(CHOICE_KINDS), "train")
            texts.append((choice_prompt(choice), LETTERS[choice.answer], True))
            continue
        if wide_share and rng.random() < wide_share:
            problem = make_problem(rng, "train", wording="wide")
        else:
            steps = range(1, len(num_steps_shares or ()) + 1)
            problem = make_problem(rng, "train", rng.choices(steps, num_steps_shares)[0] if num_steps_shares else None)
        texts.append((math_prompt(problem), problem.answer, False))
    prompts = tokenizer([chat_prompt(prompt) for prompt, _, _ in texts]).input_ids
    answers = tokenizer([answer + STOP for _, answer, _ in texts]).input_ids
    return [Example(*ids, is_choice) for *ids, (_, _, is_choice) in zip(prompts, answers, texts, strict=True)]


def _stack(reads: list[list[tuple[int, int, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(row, target, weight) lists of unequal length -> rows, targets, weights (B, R); padding weighs nothing."""
    longest = max(map(len, reads))
    padded = [read + [(0, 0, 0.0)] * (longest - len(read)) for read in reads]
    rows, targets, weights = zip(*(zip(*read, strict=True) for read in padded), strict=True)
    return torch.tensor(rows), torch.tensor(targets), torch.tensor(weights)


def autoregressive_batches(examples: list[Example], stop_id: int, groups: int = 4) -> Iterator[Batch]:
    """Causal batches of examples of similar length, padded to the longest."""
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.answer))
    size = -(-len(ordered) // groups)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        length = max(len(example.prompt) + len(example.answer) for example in part)
        ids = [(example.prompt + example.answer + [stop_id] * length)[:length] for example in part]
        reads = [
            [(len(e.prompt) - 1 + index, token, e.weight(index)) for index, token in enumerate(e.answer)] for e in part
        ]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        yield Batch(torch.tensor(ids), torch.arange(length), causal, *_stack(reads))


def diffusion_mask(num_blocks: int, first_noisy: int, block_size: int, copies: int = COPIES) -> Tensor:
    """(T, T) bool for rows [clean | noisy 1 | noisy 2 ...], True = may attend.

    Clean rows: block-causal. Noisy rows: their own block of their own copy (block-diagonal) and earlier clean blocks
    (offset-block-causal). The clean rows hold blocks 0 .. num_blocks - 2, a noisy copy first_noisy .. num_blocks - 1.
    """
    clean_rows = (num_blocks - 1) * block_size
    blocks = torch.arange(num_blocks * block_size) // block_size
    clean_blocks, noisy_blocks = blocks[:clean_rows], blocks[first_noisy * block_size :]
    copy_of = torch.arange(copies).repeat_interleave(len(noisy_blocks))
    noisy_blocks = noisy_blocks.repeat(copies)
    own = (noisy_blocks[:, None] == noisy_blocks) & (copy_of[:, None] == copy_of)
    clean = block_causal_mask(clean_rows, clean_rows, block_size, torch.device("cpu"))
    nothing = torch.zeros(clean_rows, len(noisy_blocks), dtype=torch.bool)
    earlier = noisy_blocks[:, None] > clean_blocks
    return torch.cat((torch.cat((clean, nothing), dim=1), torch.cat((earlier, own), dim=1)))


@dataclass(frozen=True)
class MaskPair:
    """Offsets in a block that two noisy copies mask, and from which offset on their masked rows count little."""

    masked: tuple[frozenset[int], frozenset[int]]
    ahead: tuple[int, int]


def draw_masks(
    rng: random.Random, maskable: list[int], num_useful: int, block_size: int, window: int, uniform_share: float
) -> MaskPair:
    """Two masks for one block, over the offsets `maskable`; the first `num_useful` of them hold the answer.

    With probability `uniform_share` the paper's: every row masked with a ratio drawn for the block, and its complement.
    Else what decoding meets: sub-blocks of `window` rows to the left are known, those to the right masked; in the
    current one either a random part is masked (second copy: the complement) or all from some row on.
    """
    if rng.random() < uniform_share:
        ratio = rng.random()
        masked = frozenset(offset for offset in maskable if rng.random() < ratio)
        return MaskPair((masked, frozenset(maskable) - masked), (block_size, block_size))
    if rng.random() < 0.5:
        start, current, ahead = _draw_window(rng, maskable, num_useful, window)
        chosen = frozenset(rng.sample(current, rng.randint(0, len(current))))
        masks = (chosen | ahead, (frozenset(current) - chosen) | ahead)
        return MaskPair(masks, (start + window, start + window))
    masks, starts = [], []
    for _ in range(COPIES):
        start, current, ahead = _draw_window(rng, maskable, num_useful, window)
        masks.append(frozenset(current[rng.randrange(len(current)) :]) | ahead)
        starts.append(start + window)
    return MaskPair(tuple(masks), tuple(starts))


def _draw_window(
    rng: random.Random, maskable: list[int], num_useful: int, window: int
) -> tuple[int, list[int], frozenset[int]]:
    """A sub-block that holds answer: its first offset, its maskable offsets, and the maskable offsets right of it."""
    start = rng.choice(maskable[:num_useful] or maskable) // window * window
    current = [offset for offset in maskable if start <= offset < start + window]
    return start, current, frozenset(offset for offset in maskable if offset >= start + window)


def diffusion_batches(
    examples: list[Example],
    tokenizer,
    rng: random.Random,
    block_size: int,
    window: int,
    uniform_share: float,
    ahead_weight: float,
) -> Iterator[Batch]:
    """Block-diffusion batches: examples with the same blocks go together, so that none is padded past its own.

    ahead_weight: what a masked row right of the current sub-block of `window` rows counts in the loss.
    """
    grouped: dict[tuple[int, int], list[Example]] = {}
    for example in examples:
        num_blocks = -(-(len(example.prompt) + len(example.answer)) // block_size)
        grouped.setdefault((len(example.prompt) // block_size, num_blocks), []).append(example)
    for (first_noisy, num_blocks), part in sorted(grouped.items()):
        length, start = num_blocks * block_size, first_noisy * block_size
        ids, reads = [], []
        for example in part:
            noisy, read = noisy_example(
                example, tokenizer, rng, length, block_size, window, uniform_share, ahead_weight
            )
            ids.append(noisy)
            reads.append(read)
        positions = torch.cat((torch.arange(length - block_size), torch.arange(start, length).repeat(COPIES)))
        mask = diffusion_mask(num_blocks, first_noisy, block_size)
        yield Batch(torch.tensor(ids), positions, mask, *_stack(reads))


def noisy_example(
    example: Example,
    tokenizer,
    rng: random.Random,
    length: int,
    block_size: int,
    window: int,
    uniform_share: float,
    ahead_weight: float,
) -> tuple[list[int], list[tuple[int, int, float]]]:
    """One example, padded to `length`, as [clean | noisy 1 | noisy 2] ids and its (row, target, weight) reads.

    A block's first token is never masked: when decoding, the commit of the block before has already predicted it. So
    it is learnt at the clean copy's last row of that block.
    """
    prompt_rows = len(example.prompt)
    clean = (example.prompt + example.answer + [tokenizer.eos_token_id] * length)[:length]
    start = prompt_rows // block_size * block_size
    copies = [clean[start:] for _ in range(COPIES)]
    reads = []
    for block in range(start, length, block_size):
        if block >= prompt_rows:
            reads.append((block - 1, clean[block], example.weight(block - prompt_rows)))
        maskable = [offset for offset in range(1, block_size) if block + offset >= prompt_rows]
        if not maskable:
            continue
        if example.is_choice:
            # Writing the letter (all masked) and scoring it (a stop token stands behind the masked letter).
            everything, behind = frozenset(maskable), {prompt_rows + 1 - block}
            pair = MaskPair((everything, everything - behind), (maskable[0] + 2, maskable[0] + 2))
        else:
            num_useful = sum(block + offset < prompt_rows + len(example.answer) for offset in maskable)
            pair = draw_masks(rng, maskable, num_useful, block_size, window, uniform_share)
        for copy, (masked, ahead) in enumerate(zip(pair.masked, pair.ahead, strict=True)):
            first_row = length - block_size + copy * (length - start) - start  # + position = row of this copy
            for offset in sorted(masked):
                position = block + offset
                copies[copy][position - start] = tokenizer.mask_token_id
                weight = example.weight(position - prompt_rows) * (ahead_weight if offset >= ahead else 1.0)
                reads.append((first_row + position - 1, clean[position], weight))
    return [*clean[: length - block_size], *copies[0], *copies[1]], reads
