"""Plain block-diffusion decoding: the control that every other experiment is held against, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. Nothing is reused: the threshold and the size of the sub-block are the only ways
to unmask more per forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.layer_reuse import check_names
from fast_dllm.sampling import rows_to_unmask

REFRESHES = ("block", "rows")


@dataclass(frozen=True)
class Options(decoding.Options):
    """refresh: what a step runs, `block` (all rows) or `rows` (the paper's block cache: the sub-block's rows where they
    suffice)."""

    refresh: str = "block"

    CHOICES = MappingProxyType({"refresh": REFRESHES})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("refresh", self.refresh, REFRESHES)


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to."""
    size, sub_size = options.block_size, options.small_block_size
    first_start = answer.num_prompt // size * size
    if first_start:
        starts_block = answer.num_prompt == first_start  # then the prefill gives the block's first token
        wanted = range(first_start, first_start + starts_block)
        prediction = yield Forward("prefill", answer.tokens[:first_start], wanted=wanted)
        yield answer.fill(prediction, 0, first_start, dict.fromkeys(wanted, 0))
        if answer.generation:
            return

    for block_start in range(first_start, answer.limit, size):
        answer.open_block(block_start + size)
        is_cached = False  # whether every row of this block has been run
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                block = answer.tokens[block_start : block_start + size]
                opens = not is_cached or answer.is_masked(block_start + start)
                if options.refresh == "block" or opens or not options.use_block_cache:
                    forward = Forward("full", block, wanted=rows)
                else:
                    forward = Forward("sub", block[start : start + sub_size], start, wanted=rows)
                prediction = yield forward
                is_cached = True
                masked = [answer.is_masked(block_start + row) for row in rows]
                chosen = rows_to_unmask(prediction.confidences, masked, options.threshold)
                filled = {block_start + start + index: index for index in chosen}
                yield answer.fill(prediction, block_start + start, block_start + start + sub_size, filled)
                if answer.generation:
                    return
        prediction = yield Forward(
            "commit", answer.tokens[block_start : block_start + size], wanted=range(size, size + 1)
        )
        yield answer.fill(prediction, block_start, block_start + size, {block_start + size: 0})
        if answer.generation:
            return
