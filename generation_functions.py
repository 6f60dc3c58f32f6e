"""Block-diffusion decoding with layer reuse, as the lab's baseline does it: the policy under development, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. The kinds of forwards are in fast_dllm.decoding.FORWARD_KINDS.

`decode_one` is the algorithm for one sequence, written as a coroutine: it yields the forwards it wants and is sent what
they predict. fast_dllm.engine runs many of them side by side, and none learns of its neighbours.

An experiment is a frozen copy of this file with its idea edited in: experiments/<name>/generation_functions.py. Its
knobs are the fields of its `Options`; everything that takes model arguments takes them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.layer_reuse import check_names, layer_range
from fast_dllm.sampling import rows_to_unmask

REUSE_KS = (1, 2, 3)
LAYER_SUBSETS = ("first", "middle", "last")
REFRESHES = ("block", "rows")


@dataclass(frozen=True)
class Options(decoding.Options):
    """reuse_k: a step is computed when its counter, 0 at the start of each block, is a multiple of it. layer_subset:
    first, middle, last, or a range of layers such as 8-19. refresh: what a computing step runs, `block` (all rows: the
    lab's published table) or `rows` (the paper's block cache: the sub-block's rows where they suffice)."""

    reuse_k: int = 1
    layer_subset: str | None = None
    refresh: str = "block"

    CHOICES = MappingProxyType({"reuse_k": REUSE_KS, "layer_subset": (None, *LAYER_SUBSETS), "refresh": REFRESHES})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("reuse_k", self.reuse_k, REUSE_KS)
        check_names("refresh", self.refresh, REFRESHES)
        if self.reuse_k > 1 and self.layer_subset is None:
            raise ValueError(f"reuse_k {self.reuse_k} needs a layer_subset: one of {', '.join(LAYER_SUBSETS)}")
        if self.reuse_k > 1 and not self.use_block_cache:
            raise ValueError(f"reuse_k {self.reuse_k} needs the block cache: without it every step is computed")
        if self.layer_subset is not None:
            subset_layers(self.layer_subset, num_layers or 1000)  # the names are checked before a model is loaded


def subset_layers(layer_subset: str, num_layers: int) -> range:
    """The contiguous layers that `layer_subset` names. Raises ValueError for an unknown name or too few layers.

    first: layers 1..11 (layer 0 always runs); middle: 12 layers from num_layers // 2 - 6; last: the last 12.
    """
    if "-" in layer_subset:
        return layer_range(layer_subset, num_layers)
    check_names("layer_subset", layer_subset, LAYER_SUBSETS)
    if num_layers < 13:
        raise ValueError(f"layer_subset {layer_subset!r} needs at least 13 layers, the model has {num_layers}")
    start = {"first": 1, "middle": num_layers // 2 - 6, "last": num_layers - 12}[layer_subset]
    return range(start, 12 if layer_subset == "first" else start + 12)


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    Why a reuse step needs no forward, and no layer_subset: on it, the layers of the subset would return what they
    returned on the last computed step. Everything above that contiguous range then receives what it received on that
    step, so the logits are that step's logits, whichever range it is: first, middle and last give the same tokens
    (docs/design.md). With `block` every computed step predicts the whole block, so the steps until the next one read
    it again wherever they are, also where they open a sub-block.
    """
    size, sub_size, reuse_k = options.block_size, options.small_block_size, options.reuse_k
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
        counter = 0  # denoising steps in this block
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                block = answer.tokens[block_start : block_start + size]
                opens = counter == 0 or answer.is_masked(block_start + start)
                if options.refresh == "block" and counter % reuse_k == 0:
                    # a step goes at most one sub-block further: these are all the rows that re-reading can reach
                    keep = range(start, min(start + reuse_k * sub_size, size))
                    forward = Forward("full", block, wanted=rows, keep=keep)
                elif options.refresh == "rows" and (opens or not options.use_block_cache):
                    forward = Forward("full", block, wanted=rows, keep=rows)
                elif counter % reuse_k:
                    forward = Forward("reused", wanted=rows)
                else:
                    forward = Forward("sub", block[start : start + sub_size], start, wanted=rows, keep=rows)
                prediction = yield forward
                counter += 1
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
