"""What to run to score a continuation, and what to read in it. Knows the model, not lm_eval.

Two modes (docs/design.md, "Scoring"). *reference* masks the first continuation token and leaves the rest visible; it is
what the published numbers were measured with, and exact for continuations of one token. *chain* is the chain rule: each
token in turn is masked together with all that follow.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from fast_dllm.errors import UsageError


class MaskedInput(NamedTuple):
    """Token ids with masks, and the row (one before the masked token) whose logits tell about it."""

    row: int
    ids: tuple[int, ...]


def masked_inputs(
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    chain: bool,
    mask_id: int,
    stop_token: int | None,
    block_size: int,
    max_length: int,
) -> list[tuple[MaskedInput, int]]:
    """(input, target token) for each token that counts: the first one, or with `chain` every one.

    `stop_token` stands behind the continuation (None: nothing does), masks fill the block. A context that is too long
    loses its head. Raises UsageError for a continuation that cannot fit at all.
    """
    if not continuation:
        return []
    keep = max_length - len(continuation) - 1
    if keep < 1:
        raise UsageError(f"a continuation of {len(continuation)} tokens does not fit {max_length} positions")
    context = context[-keep:]
    tail = [] if stop_token is None else [stop_token]
    inputs = []
    for index in range(len(continuation) if chain else 1):
        visible = [] if chain else continuation[index + 1 :]
        hidden = [mask_id] * (len(continuation) - index - len(visible))
        position = len(context) + index
        ids = [*context, *continuation[:index], *hidden, *visible, *tail]
        ids += [mask_id] * (-len(ids) % block_size)
        # The prediction is read one row before the masked token; no row behind that row's block can change it.
        ids = ids[: ((position - 1) // block_size + 1) * block_size]
        inputs.append((MaskedInput(position - 1, tuple(ids)), continuation[index]))
    return inputs


@torch.inference_mode()
def target_scores(
    model, batch: Sequence[MaskedInput], targets: Sequence[Collection[int]], *, block_size: int, pad_id: int
) -> list[list[tuple[float, bool]]]:
    """One forward for the batch; (log-probability, is it the argmax) of every target of each input."""
    longest = max(len(ids) for _, ids in batch)
    # Blocks never see later blocks, so padding at the end changes nothing.
    ids = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for _, ids in batch], device=model.device)
    rows = torch.tensor([[row] for row, _ in batch], device=model.device)
    log_probs = model(ids, block_size=block_size, rows=rows).logits[:, 0].float().log_softmax(dim=-1)
    best = log_probs.argmax(dim=-1).tolist()
    scores = []
    for place, wanted in enumerate(map(list, targets)):
        values = log_probs[place, wanted].tolist()
        scores.append([(value, best[place] == target) for target, value in zip(wanted, values, strict=True)])
    return scores
