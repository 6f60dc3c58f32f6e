"""Lossless lookahead: the states that the next steps may reach run in the same forward, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. Here each forward also runs guesses of the forwards that follow it. The engine
uses a guess only where decoding then asks for exactly this forward, so that the tokens do not depend on the guesses.
Spiffy (arXiv 2509.18085) does this for LLaDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy, Prediction
from fast_dllm.layer_reuse import check_names
from fast_dllm.sampling import rows_to_unmask

STATES = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Options(decoding.Options):
    """states: how many states one forward of a sequence runs, its own and its guesses (1: no guess). guess_above: a
    probability; a guessed step unmasks every row that was last predicted with more confidence. reread_above: as in
    01_adaptive_skip, whose tokens these are (1: plain decoding)."""

    states: int = 1
    guess_above: float = 0.7
    reread_above: float = 1.0

    CHOICES = MappingProxyType({"states": STATES})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("states", self.states, STATES)
        for name in ("guess_above", "reread_above"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, not {getattr(self, name):g}")


@dataclass(frozen=True)
class Known:
    """What a state of a block predicted: a token and a confidence for each row, and for the next block's first one.

    Rows before the sub-block that it was in were not predicted: their confidence is -1.
    """

    block: list[int]
    tokens: list[int]
    confidences: list[float]


def known_from(forward: Forward, prediction: Prediction, size: int) -> list[Known]:
    """What the states of a forward predicted, rejected guesses included. A commit predicts no row of its block."""
    known = []
    for state, predicted in zip(forward.states, prediction.states, strict=True):
        missing = size + 1 - len(predicted.tokens)
        tokens, confidences = [0] * missing + predicted.tokens, [-1.0] * missing + predicted.confidences
        if state.kind == "full":
            known.append(Known(state.token_ids, tokens, confidences))
    return known


def nearest(known: Sequence[Known], block: list[int], mask_id: int) -> Known | None:
    """The state with the most tokens of this block, and the fewest that it does not have (first of equals)."""

    def likeness(state: Known) -> int:
        set_rows = [(token, now) for token, now in zip(state.block, block, strict=True) if token != mask_id]
        return sum(1 if token == now else -1 if now == mask_id else -4 for token, now in set_rows)

    return max((state for state in known if likeness(state) > 0), key=likeness, default=None)


def plain_forward(block: list[int], options: Options, continues: int | None = None) -> Forward:
    """What decoding runs when the block has come to this state."""
    size, sub_size = options.block_size, options.small_block_size
    if options.mask_id not in block:
        return Forward("commit", block, wanted=range(size, size + 1))
    start = block.index(options.mask_id) // sub_size * sub_size
    keep = range(start, size + 1 if options.states > 1 else size)
    return Forward("full", block, wanted=range(start, start + sub_size), keep=keep, continues=continues)


def guessed_step(block: list[int], known: Known, options: Options) -> list[int] | None:
    """The next state of the block, if its forward predicts what is known already; None where too little is known."""
    first = block.index(options.mask_id) // options.small_block_size * options.small_block_size
    bar = 1.0 if options.threshold == 1 else options.guess_above
    block = list(block)
    for start in range(first, options.block_size, options.small_block_size):
        rows = range(start, start + options.small_block_size)
        masked = [block[row] == options.mask_id for row in rows]
        if not any(masked):
            continue
        confidences = [known.confidences[row] for row in rows]
        if start == first:
            if confidences[masked.index(True)] < 0:
                return None
            chosen = rows_to_unmask(confidences, masked, bar)
        elif options.reread_above == 1:
            break
        else:  # reading again goes on into the next sub-block
            chosen = [index for index, confidence in enumerate(confidences) if masked[index] and confidence > bar]
        for index in chosen:
            row = start + index
            block[row] = known.tokens[row] if known.block[row] == options.mask_id else known.block[row]
        if len(chosen) < sum(masked):
            break
    return block


def with_guesses(forward: Forward, known: Sequence[Known], options: Options, is_last: bool) -> Forward:
    """The forward with a chain of guesses: further steps, the finished block, and the next block's first state."""
    base = nearest(known, forward.token_ids, options.mask_id) if options.states > 1 else None
    if base is None:
        return forward
    guesses: list[Forward] = []
    state = forward
    while len(guesses) < options.states - 1:
        if state.kind == "full":
            block = guessed_step(state.token_ids, base, options)
            if block is None:
                break
            state = plain_forward(block, options, state.continues)
        elif is_last or base.confidences[-1] < 0:
            break
        else:
            opening = [base.tokens[-1]] + [options.mask_id] * (options.block_size - 1)
            guesses.append(plain_forward(opening, options, continues=len(guesses)))
            break
        guesses.append(state)
    return replace(forward, guesses=tuple(guesses))


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    This is 01_adaptive_skip's loop (plain decoding at its defaults). Only the guesses are new.
    """
    size, sub_size, bar = options.block_size, options.small_block_size, options.reread_above
    first_start = answer.num_prompt // size * size
    if first_start:
        starts_block = answer.num_prompt == first_start  # then the prefill gives the block's first token
        wanted = range(first_start, first_start + starts_block)
        prediction = yield Forward("prefill", answer.tokens[:first_start], wanted=wanted)
        yield answer.fill(prediction, 0, first_start, dict.fromkeys(wanted, 0))
        if answer.generation:
            return

    known: list[Known] = []
    for block_start in range(first_start, answer.limit, size):
        answer.open_block(block_start + size)
        is_last = block_start + size == answer.limit
        may_reread = False  # whether a forward of this block has predicted what is still masked
        while True:
            forward = plain_forward(answer.tokens[block_start : block_start + size], options)
            start, chosen = block_start + forward.wanted.start, []
            masked = [answer.is_masked(block_start + row) for row in forward.wanted if row < size]
            if any(masked) and may_reread:
                prediction = yield Forward("reused", wanted=forward.wanted)
                confident = [confidence > bar for confidence in prediction.confidences]
                chosen = [index for index in range(sub_size) if masked[index] and confident[index]]
            if not chosen:
                forward = with_guesses(forward, known, options, is_last)
                prediction = yield forward
                if prediction.states:  # else a guess was used, and what it predicts is known already
                    known = known_from(forward, prediction, size)
                if forward.kind == "commit":
                    break
                chosen = rows_to_unmask(prediction.confidences, masked, options.threshold)
                may_reread = bar < 1
            yield answer.fill(prediction, start, start + sub_size, {start + index: index for index in chosen})
            if answer.generation:
                return
        yield answer.fill(prediction, block_start, block_start + size, {block_start + size: 0})
        if answer.generation:
            return
