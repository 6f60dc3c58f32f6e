"""Rules that say how many rows a step unmasks, over fixed sub-blocks or a sliding window: plain decoding, on one page.

Fast-dLLM v2 (arXiv 2509.26328) writes an answer in blocks of 32 positions. A block starts as masks; each denoising step
unmasks the positions it is sure of, sub-block by sub-block from left to right, until the block is committed to the
prefix cache and the next one starts. Nothing is reused here, and every step runs the whole block. Only two things
change: which rows a step reads, and which of them it unmasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fast_dllm import decoding
from fast_dllm.decoding import Answer, Forward, Policy
from fast_dllm.layer_reuse import check_names
from fast_dllm.sampling import rows_to_unmask

RULES = ("threshold", "factor", "profile", "prefix_sum", "local", "credit", "entropy", "margin")
MEASURES = MappingProxyType({"entropy": "entropy", "margin": "margin"})  # rule -> what it needs beside the confidence
CREDIT_DECAY, CREDIT_POWER = 0.7, 0.2  # beta and gamma of CreditDecoding


@dataclass(frozen=True)
class Options(decoding.Options):
    """window: None, a step reads the sub-block of the first mask; else as many rows, from the first mask on.

    rule: which of these rows are unmasked, see `rows_of_rule`. bound: the rule's number; `threshold` has none. radius:
    of `local`, how far a neighbour may be from a sure row.
    """

    window: int | None = None
    rule: str = "threshold"
    bound: float = 0.0
    radius: int = 4

    CHOICES = MappingProxyType({"rule": RULES})

    def check(self, num_layers: int | None = None) -> None:
        super().check(num_layers)
        check_names("rule", self.rule, RULES)
        if self.window is not None and (isinstance(self.window, bool) or self.window not in range(1, 1000)):
            raise ValueError(f"window must be None (sub-blocks) or a whole number of at least 1, not {self.window!r}")
        if self.bound < 0:
            raise ValueError(f"bound must be a number of at least 0, not {self.bound:g}")
        if self.radius < 0:
            raise ValueError(f"radius must be a whole number of at least 0, not {self.radius!r}")


def rows_of_rule(scores: Sequence[float], masked: Sequence[bool], options: Options) -> list[int]:
    """The masked rows to unmask, at least one.

    scores: each row's confidence c; under the rule `entropy` its entropy, under `margin` its margin. c_(n) is the n-th
    largest confidence. Without a row that passes, the best one is unmasked; under `prefix_sum` the first.

    threshold: c > threshold. credit: the same, where c is raised by `with_credit` (CreditDecoding, arXiv 2510.06133).
    factor: the n best, for the largest n with (n + 1)(1 - c_(n)) < bound (Fast-dLLM, arXiv 2505.22618).
    profile: the n best, for the largest n whose sum of 1 - c, plus 1 - c_(n), is < bound (Fast-dLLM++, arXiv
    2606.02955, where bound is 1 - delta).
    prefix_sum: from the first masked row on, while the sum of 1 - c is < bound.
    local: c > threshold, and c > bound within `radius` rows of such a row (LocalLeap, arXiv 2510.07081).
    entropy: the n least uncertain, for the largest n whose sum of entropies, without the largest, is <= bound
    (EB-Sampler, arXiv 2505.24857). margin: the two best tokens' probabilities differ by more than bound.
    """
    rows = [row for row, is_masked in enumerate(masked) if is_masked]
    if options.rule in ("threshold", "credit", "local"):
        sure = rows_to_unmask(list(scores), list(masked), options.threshold)
        if options.rule != "local":
            return sure
        anchors = [row for row in sure if scores[row] > options.threshold]
        return [row for row in rows if row in sure or _is_near(row, scores[row], anchors, options)]
    if options.rule == "margin":
        return rows_to_unmask(list(scores), list(masked), options.bound)
    if options.rule == "prefix_sum":
        order = rows
    elif options.rule == "entropy":
        order = sorted(rows, key=lambda row: scores[row])
    else:
        order = sorted(rows, key=lambda row: -scores[row])
    return sorted(order[: max(1, _num_allowed([scores[row] for row in order], options))])


def _is_near(row: int, confidence: float, anchors: Sequence[int], options: Options) -> bool:
    return confidence > options.bound and any(abs(row - anchor) <= options.radius for anchor in anchors)


def _num_allowed(scores: Sequence[float], options: Options) -> int:
    """How many of these rows, which are in the rule's order, may be unmasked together."""
    total = 0.0
    for index, score in enumerate(scores):
        if options.rule == "entropy":
            within = total <= options.bound  # the entropies before this one, which is the largest
            total += score
        else:
            doubt = 1 - score
            total += doubt
            spent = {"prefix_sum": total, "profile": total + doubt, "factor": (index + 2) * doubt}[options.rule]
            within = spent < options.bound
        if not within:
            return index
    return len(scores)


def with_credit(credit: dict[int, float], token: int, confidence: float, power: float) -> float:
    """The confidence of a row's best token, raised by what the block's earlier steps said of it.

    credit: token -> the row's credit, which this changes: all decay, and the best token's grows. The best token's
    probability is multiplied by (1 + credit) ** power and normalised. Credit of a token that is not the best today is
    kept, but does not enter the norm: its probability today is not known here.
    """
    for other in credit:
        credit[other] *= CREDIT_DECAY
    credit[token] = credit.get(token, 0.0) + max(confidence, 0.0) ** CREDIT_POWER
    gain = (1 + credit[token]) ** power
    return confidence * gain / (1 + confidence * (gain - 1))


def decode_one(answer: Answer, options: Options) -> Policy:
    """Decode one sequence: yields the forwards it needs, and the events they lead to."""
    size, sub_size, measure = options.block_size, options.small_block_size, MEASURES.get(options.rule, "")
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
        credits: list[dict[int, float]] = [{} for _ in range(size)]  # of each row of this block
        for first in range(size):
            while answer.is_masked(block_start + first):  # every row before it is known
                start = first if options.window else first // sub_size * sub_size
                rows = range(start, min(start + (options.window or sub_size), size))
                block = answer.tokens[block_start : block_start + size]
                prediction = yield Forward("full", block, wanted=rows, measure=measure)
                masked = [answer.is_masked(block_start + row) for row in rows]
                scores = prediction.measures if measure else list(prediction.confidences)
                if options.rule == "credit":
                    for index, row in enumerate(rows):
                        if masked[index]:
                            token = prediction.tokens[index]
                            scores[index] = with_credit(credits[row], token, scores[index], options.bound)
                chosen = rows_of_rule(scores, masked, options)
                filled = {block_start + start + index: index for index in chosen}
                yield answer.fill(prediction, block_start + start, block_start + rows.stop, filled)
                if answer.generation:
                    return
        prediction = yield Forward(
            "commit", answer.tokens[block_start : block_start + size], wanted=range(size, size + 1)
        )
        yield answer.fill(prediction, block_start, block_start + size, {block_start + size: 0})
        if answer.generation:
            return
