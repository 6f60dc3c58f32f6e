"""Carried rows: a window of the block runs every row that is out of date, so that no full forward is forced; one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. With the paper's block cache a step runs the sub-block's rows alone, but for two
reasons most steps run the whole block: the prediction for a sub-block's first row is read one row before it, and the
keys of rows that were unmasked since they last ran are still those of masks. Here those rows run along.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.layer_reuse import check_names
from fast_dllm.sampling import rows_to_unmask

REFRESHES = ("rows", "block")


@dataclass(frozen=True)
class Options(decoding.Options):
    """refresh: what a step runs, `rows` (a window where it suffices: the paper's block cache) or `block` (all rows).

    carry: under `rows`, a window begins with the previous sub-block, and earlier if a row before that has changed since
    it last ran; only a block's first forward is full (False: a sub-block opens with a full forward, as in the paper).
    reread_above: a probability; a step goes on from the last forward's logits while the best masked row of its
    sub-block is more confident than this, and unmasks every row that is (1: never). Below 1 a window runs the next
    sub-block along, for the re-reads.
    """

    refresh: str = "rows"
    carry: bool = False
    reread_above: float = 1.0

    CHOICES = MappingProxyType({"refresh": REFRESHES})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("refresh", self.refresh, REFRESHES)
        if self.carry and (self.refresh != "rows" or not self.use_block_cache):
            raise ValueError("carry needs refresh rows and the block cache: else every step runs the whole block")
        if not 0 <= self.reread_above <= 1:
            raise ValueError(f"reread_above must be a probability from 0 to 1, not {self.reread_above:g}")


def window_of(options: Options, changed: set[int], start: int, is_masked: bool) -> range:
    """The block rows that a forward for the sub-block at row `start` runs, all whole sub-blocks.

    changed: rows whose token is another than when they last ran. is_masked: whether row `start` is a mask, so that the
    row before it has to run too.
    """
    size, sub_size = options.block_size, options.small_block_size
    if options.refresh == "block" or not options.use_block_cache or (is_masked and not options.carry):
        return range(size)
    begin = start - sub_size if is_masked else start
    if options.carry:
        begin = min([begin, *(row // sub_size * sub_size for row in changed)])
    num_ahead = 1 if options.reread_above < 1 else 0
    return range(begin, min(start + (1 + num_ahead) * sub_size, size))


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    Rows in the window that stay masks run along; rows outside it keep keys and values of an earlier step, when they
    saw fewer tokens. That is the block cache's approximation, and the commit ends it.
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

    for block_start in range(first_start, answer.limit, size):
        answer.open_block(block_start + size)
        changed: set[int] | None = None  # rows whose token is another than when they last ran; None: no row has run
        kept = range(0)  # rows whose predictions can be read again
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                masked = [answer.is_masked(block_start + row) for row in rows]
                chosen: list[int] = []
                if bar < 1 and rows.stop <= kept.stop:
                    prediction = yield Forward("reused", wanted=rows)
                    confident = [confidence > bar for confidence in prediction.confidences]
                    chosen = [index for index in range(sub_size) if masked[index] and confident[index]]
                if not chosen:
                    window = range(size) if changed is None else window_of(options, changed, start, masked[0])
                    kept = range(start, window.stop if bar < 1 else rows.stop)
                    kind = "full" if len(window) == size else "sub"
                    block = answer.tokens[block_start : block_start + size]
                    prediction = yield Forward(kind, block[window.start : window.stop], window.start, rows, kept)
                    changed = (changed or set()) - set(window)
                    chosen = rows_to_unmask(prediction.confidences, masked, options.threshold)
                filled = {block_start + start + index: index for index in chosen}
                changed = (changed or set()) | {start + index for index in chosen}
                yield answer.fill(prediction, block_start + start, block_start + start + sub_size, filled)
                if answer.generation:
                    return
        prediction = yield Forward(
            "commit", answer.tokens[block_start : block_start + size], wanted=range(size, size + 1)
        )
        yield answer.fill(prediction, block_start, block_start + size, {block_start + size: 0})
        if answer.generation:
            return
