"""Residual reuse: on the steps between, a third of the layers rests and what it added before is added again; one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. `00_baseline` lets layers give their old outputs, and then nothing new is
computed; here the layers around the resting ones run on today's tokens, so which layers rest makes a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy, Reuse
from fast_dllm.layer_reuse import check_names, layer_range
from fast_dllm.sampling import rows_to_unmask

REUSE_KS, ORDERS = (1, 2, 3), (0, 1)
LAYER_SUBSETS = ("first", "middle", "last")
PARTS = MappingProxyType({"both": "residual", "mlp": "mlp"})  # what rests -> what is stored


@dataclass(frozen=True)
class Options(decoding.Options):
    """reuse_k: every layer runs on a step whose counter, 0 at the start of each block, is a multiple of it.

    layer_subset: what rests on the other steps, first, middle, last, or a range such as 8-19. part: `both`, or
    `mlp` (attention always runs). order: 0, what was stored is added as it is; 1, a straight line through the last two
    stores of the block. tolerance: None, the beat above; else a sequence's layers rest where the input of the subset
    has drifted less than this, at most reuse_k - 1 steps in a row.
    """

    reuse_k: int = 1
    layer_subset: str | None = None
    part: str = "both"
    order: int = 0
    tolerance: float | None = None

    CHOICES = MappingProxyType(
        {"reuse_k": REUSE_KS, "layer_subset": (None, *LAYER_SUBSETS), "part": tuple(PARTS), "order": ORDERS}
    )

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("reuse_k", self.reuse_k, REUSE_KS)
        check_names("part", self.part, PARTS)
        check_names("order", self.order, ORDERS)
        if self.reuse_k > 1 and self.layer_subset is None:
            raise ValueError(f"reuse_k {self.reuse_k} needs a layer_subset: one of {', '.join(LAYER_SUBSETS)}")
        # the names are checked before a model is loaded
        layers = range(0) if self.layer_subset is None else subset_layers(self.layer_subset, num_layers or 1000)
        if self.tolerance is not None:
            if isinstance(self.tolerance, (bool, str)) or self.tolerance < 0:
                raise ValueError(f"tolerance must be None (a fixed beat) or a number from 0, not {self.tolerance!r}")
            if layers and not layers.start:
                raise ValueError(f"tolerance needs a layer before the subset, as a probe; {self.layer_subset} has none")


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


def what_rests(answer: Answer, options: Options, counter: int, stored_at: list[int]) -> Reuse | None:
    """What step `counter` of a block does with the subset, which ran and was stored on the steps `stored_at`."""
    if options.reuse_k == 1 or options.layer_subset is None:
        return None
    layers, part = subset_layers(options.layer_subset, answer.num_layers), PARTS[options.part]
    if not stored_at or counter - stored_at[-1] >= options.reuse_k:
        return Reuse(layers, part, order=options.order)
    # a line needs two points: until the second store of the block, the first stands in as it is
    between = counter - stored_at[-1], stored_at[-1] - stored_at[-2] if len(stored_at) > 1 else 0
    ahead = between[0] / between[1] if options.order and between[1] else 0.0
    if options.tolerance is None:
        return Reuse(layers, part, read=True, order=options.order, ahead=ahead)
    tolerance = options.tolerance
    return Reuse(layers, part, decide=lambda drift: drift < tolerance, order=options.order, ahead=ahead)


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to.

    Every step runs all rows of the block, so the store is of all of them and at most reuse_k - 1 steps old. Layers that
    rest keep the keys and values that they last computed; nothing reads those before the layers run again.
    """
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
        counter = 0  # denoising steps in this block
        stored_at: list[int] = []  # those of them on which every layer ran
        for start in range(0, size, sub_size):
            rows = range(start, start + sub_size)  # of the block
            while any(answer.is_masked(block_start + row) for row in rows):
                block = answer.tokens[block_start : block_start + size]
                reuse = what_rests(answer, options, counter, stored_at)
                prediction = yield Forward("full", block, wanted=rows, reuse=reuse)
                if prediction.kind == "full":
                    stored_at.append(counter)
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
