"""Two bars: a low one for the rows next to what is known, a high one for the rows out of order, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. One threshold serves every row there. Here a row whose left neighbours are all
known, or accepted by the same step, needs less confidence than one that is unmasked out of order.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.sampling import rows_to_unmask


@dataclass(frozen=True)
class Options(decoding.Options):
    """prefix_above: a probability; a step also follows its predictions from the first masked row on, to the end of the
    block, while each is more confident than this (1: plain decoding). `threshold` is the bar of the sub-block's other
    rows."""

    prefix_above: float = 1.0

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        if not 0 <= self.prefix_above <= 1:
            raise ValueError(f"prefix_above must be a probability from 0 to 1, not {self.prefix_above:g}")


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to. A step runs the whole block."""
    size, sub_size, bar = options.block_size, options.small_block_size, options.prefix_above
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
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                wanted = range(start, size) if bar < 1 else rows  # what is read beyond the sub-block is the prefix's
                block = answer.tokens[block_start : block_start + size]
                prediction = yield Forward("full", block, wanted=wanted)
                masked = [answer.is_masked(block_start + row) for row in wanted]
                in_order = [index for index in range(len(wanted)) if masked[index]]
                sure = [prediction.confidences[index] > bar for index in in_order]
                prefix = in_order[: [*sure, False].index(False)]
                chosen = rows_to_unmask(prediction.confidences[:sub_size], masked[:sub_size], options.threshold)
                if prefix and prediction.confidences[chosen[0]] <= options.threshold:
                    chosen = []  # that one was only taken so that something is
                filled = {block_start + start + index: index for index in sorted({*chosen, *prefix})}
                yield answer.fill(prediction, block_start + start, block_start + wanted.stop, filled)
                if answer.generation:
                    return
        prediction = yield Forward(
            "commit", answer.tokens[block_start : block_start + size], wanted=range(size, size + 1)
        )
        yield answer.fill(prediction, block_start, block_start + size, {block_start + size: 0})
        if answer.generation:
            return
