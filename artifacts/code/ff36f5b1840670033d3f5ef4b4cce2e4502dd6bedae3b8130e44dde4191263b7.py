"""Layers rest by the phase of a block: where much, some or little of it is still masked, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. `02_residual_reuse` lets a range of layers rest on every other step. Here they
rest only while the masked share of the block is in an interval; two controls rest as often, on a beat or at random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy, Reuse
from fast_dllm.layer_reuse import check_names, layer_range
from fast_dllm.sampling import rows_to_unmask

LAYER_SUBSETS = ("first", "middle", "last")


@dataclass(frozen=True)
class Options(decoding.Options):
    """layer_subset: what rests, first, middle, last, or a range such as 8-19; what it added when it last ran is added
    again. It never rests on two steps in a row, nor on the first step of a block.

    masked_from, masked_to: it rests only on steps that begin with a masked share of the block above the first and up
    to the second (0 and 0: never). beat: and only on every beat-th step of the block. chance: and only with this
    probability, drawn for each step from the prompt.
    """

    layer_subset: str | None = None
    masked_from: float = 0.0
    masked_to: float = 0.0
    beat: int = 1
    chance: float = 1.0

    CHOICES = MappingProxyType({"layer_subset": (None, *LAYER_SUBSETS)})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        for name in ("masked_from", "masked_to", "chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, not {getattr(self, name):g}")
        if self.beat < 1:
            raise ValueError(f"beat must be a whole number of at least 1, not {self.beat!r}")
        if self.masked_to > 0 and self.layer_subset is None:
            raise ValueError(f"masked_to {self.masked_to:g} needs a layer_subset: one of {', '.join(LAYER_SUBSETS)}")
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


def may_rest(masked_share: float, counter: int, draw: float, options: Options) -> bool:
    """Whether the layers rest on step `counter` of a block, where they ran on the step before.

    masked_share: masked rows at the start of the step / rows of the block. draw: a number from 0 to 1, at random.
    """
    in_phase = options.masked_from < masked_share <= options.masked_to
    return in_phase and counter % options.beat == options.beat - 1 and draw < options.chance


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    Every step runs all rows of the block, so the store is of all of them and one step old.
    """
    size, sub_size = options.block_size, options.small_block_size
    layers = subset_layers(options.layer_subset, answer.num_layers) if options.layer_subset else range(0)
    draws = random.Random(str(answer.tokens))  # of this prompt, whatever else is in the batch
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
        has_run = False  # whether the layers ran on the step before
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                block = answer.tokens[block_start : block_start + size]
                masked_share = sum(answer.is_masked(block_start + row) for row in range(size)) / size
                rests = may_rest(masked_share, counter, draws.random(), options) and has_run
                reuse = Reuse(layers, "residual", read=rests) if layers and options.masked_to > 0 else None
                prediction = yield Forward("full", block, wanted=rows, reuse=reuse)
                has_run = not rests
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
