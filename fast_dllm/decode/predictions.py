"""What comes out of a group's forward: the tokens and confidences of its states, in one device-to-host transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from fast_dllm.decode.forwards import Batch, index_of
from fast_dllm.decode.sequences import RunSettings, StatePrediction
from fast_dllm.decoding import FORWARD_KINDS, Forward
from fast_dllm.errors import non_finite
from fast_dllm.network.executor import Executor
from fast_dllm.sampling import MEASURES, measures, predict


def predict_states(batch: Batch, logits: Tensor, executor: Executor, settings: RunSettings) -> list[StatePrediction]:
    """Logits (B, R, V) -> the prediction of each entry, for all its predicted positions, in one transfer to the host.

    Tokens are drawn for wanted positions only, and for no guess; all other tokens are the most likely ones. Raises
    NonFiniteError.
    """
    num_read, mask_id = logits.shape[1], settings.options.mask_id
    flat = logits.flatten(0, 1)  # (B * R, V)
    numbers = executor.greedy(flat, mask_id)  # (3, B * R)
    if settings.temperature > 0:
        numbers = _with_drawn_tokens(numbers, batch, logits, settings)
    if any(entry.forward.measure for entry in batch):
        numbers = torch.cat((numbers, measures(flat, mask_id)))
    tokens, confidences, finite, *measured = numbers.tolist()  # the forward's one transfer
    if not all(finite):
        raise non_finite(f"a {batch[0].forward.kind} forward", flat.dtype)
    predictions = []
    for index, entry in enumerate(batch):
        forward = entry.forward
        count = len(forward.predicted_positions)
        keeps_logits = settings.is_drawn(forward) and FORWARD_KINDS[forward.kind].runs_layers
        read = slice(index * num_read, index * num_read + count)
        state_tokens, state_confidences = [int(token) for token in tokens[read]], confidences[read]
        if _starts_window(forward):
            # No row predicts a window's first position; see Answer.fill.
            state_tokens[0], state_confidences[0] = mask_id, -1.0
        predictions.append(
            StatePrediction(
                forward.predicted_positions,
                state_tokens,
                state_confidences,
                measured[MEASURES.index(forward.measure)][read] if forward.measure else [],
                # A copy, because an executor may write its logits to the same place each time.
                logits[index, :count].clone() if keeps_logits else None,
            )
        )
    return predictions


def _starts_window(forward: Forward) -> bool:
    """Whether the first predicted position is the first row of the block rows that the forward runs."""
    runs_block_rows = FORWARD_KINDS[forward.kind].runs_layers and forward.kind != "prefill"
    positions = forward.predicted_positions
    return runs_block_rows and bool(positions) and positions.start == forward.offset


def _with_drawn_tokens(numbers: Tensor, batch: Batch, logits: Tensor, settings: RunSettings) -> Tensor:
    """The greedy predictions (3, B * R) of logits (B, R, V), with drawn tokens and their confidences where they are
    wanted. Each sequence draws from its random stream, in the order of the batch."""
    num_read = logits.shape[1]
    rows: list[int] = []
    uniforms: list[Tensor] = []
    for index, entry in enumerate(batch):
        if not entry.is_guess and settings.is_drawn(entry.forward):
            wanted = entry.forward.wanted
            first = index * num_read + wanted.start - entry.forward.predicted_positions.start
            rows += range(first, first + len(wanted))
            uniforms.append(torch.rand(len(wanted), generator=entry.sequence.generator))
    if not rows:
        return numbers
    flat = logits.flatten(0, 1)
    picked = index_of(rows, flat)
    drawn_uniforms = torch.cat(uniforms).to(logits.device, non_blocking=True)
    tokens, confidences = predict(
        flat[picked], settings.options.mask_id, settings.temperature, settings.top_p, drawn_uniforms
    )
    numbers = numbers.clone()
    numbers[0, picked], numbers[1, picked] = tokens.double(), confidences.double()
    return numbers
