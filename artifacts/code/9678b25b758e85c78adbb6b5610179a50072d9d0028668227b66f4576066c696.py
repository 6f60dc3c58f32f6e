"""Re-reading by confidence: the last logits are read again while the model is sure of them, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. `00_baseline` reads the last logits again on every k-th step, whatever they say;
here a step reads them again only where some masked row is more confident than a bar, and else the block is run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.sampling import rows_to_unmask


@dataclass(frozen=True)
class Options(decoding.Options):
    """reread_above: a probability; a step goes on from the last forward's logits while the best masked row of its
    sub-block is more confident than this, and unmasks every row that is (1: never, which is plain decoding). reuse_k:
    how many steps may share one forward (None: no cap, 1: never re-read)."""

    reread_above: float = 1.0
    reuse_k: int | None = None

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        if not 0 <= self.reread_above <= 1:
            raise ValueError(f"reread_above must be a probability from 0 to 1, not {self.reread_above:g}")
        if self.reuse_k is not None and (isinstance(self.reuse_k, bool) or self.reuse_k not in range(1, 1000)):
            raise ValueError(f"reuse_k must be None (no cap) or a whole number of at least 1, not {self.reuse_k!r}")


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    A forward runs the whole block and its predictions are kept to the block's end, so re-reading may go on from one
    sub-block into the next, left to right.
    """
    size, sub_size, bar = options.block_size, options.small_block_size, options.reread_above
    most_shared = 1 if bar == 1 else options.reuse_k or size  # steps from one forward; each unmasks at least one row
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
        shared = most_shared  # steps that the last forward of this block has served; this many: none is left to serve
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                masked = [answer.is_masked(block_start + row) for row in rows]
                chosen: list[int] = []
                if shared < most_shared:
                    prediction = yield Forward("reused", wanted=rows)
                    confident = [confidence > bar for confidence in prediction.confidences]
                    chosen = [index for index in range(sub_size) if masked[index] and confident[index]]
                    shared += 1
                if not chosen:
                    # a step goes at most one sub-block further: these are all the rows that re-reading can reach
                    keep = range(start, min(start + most_shared * sub_size, size))
                    block = answer.tokens[block_start : block_start + size]
                    prediction = yield Forward("full", block, wanted=rows, keep=keep)
                    chosen = rows_to_unmask(prediction.confidences, masked, options.threshold)
                    shared = 1
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
