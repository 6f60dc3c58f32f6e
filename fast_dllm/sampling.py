"""From logits to candidates, confidences and the rows to unmask. Pure functions.

Axes: B sequences, R predicted rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_p_sample(probs: Tensor, top_p: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the nucleus of each distribution by inverting its cumulative sum.

    probs (B, R, V); uniforms (B, R) in [0, 1). The nucleus is the smallest set of most probable
    tokens that holds `top_p` of the mass (at least one token), renormalised. Returns the tokens (B, R) and their
    renormalised probabilities (B, R).
    """
    sorted_probs, sorted_ids = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = sorted_probs.cumsum(dim=-1) - sorted_probs
    nucleus = sorted_probs.masked_fill(mass_before >= top_p, 0.0)
    nucleus[..., 0] = sorted_probs[..., 0]
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    cumulative = nucleus.cumsum(dim=-1)
    # Scaling by the last sum keeps rounding from picking a token outside the nucleus.
    drawn = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * cumulative[..., -1:], right=True)
    # Where nothing is above 0 the logits are not finite. The caller reports that; an index of -1 would fail first.
    drawn = torch.minimum(drawn, (nucleus > 0).sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    return sorted_ids.gather(-1, drawn).squeeze(-1), nucleus.gather(-1, drawn).squeeze(-1)


def predict(
    logits: Tensor, mask_id: int, temperature: float = 0.0, top_p: float = 1.0, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidate token and confidence for every row: (B, R, V) -> two tensors (B, R).

    temperature 0: the most likely token and its softmax probability. temperature > 0: a token drawn with `uniforms`
    (B, R) from the top-p-truncated, renormalised distribution, and that renormalised probability.
    The mask token is never a candidate; the greedy confidence is still the softmax over the whole vocabulary.
    """
    logits = logits.float()
    allowed = logits.clone()
    allowed[..., mask_id] = float("-inf")
    if temperature > 0:
        assert uniforms is not None, "a token is drawn with a uniform number"
        return top_p_sample((allowed / temperature).softmax(dim=-1), top_p, uniforms)
    candidates = allowed.argmax(dim=-1)
    return candidates, logits.softmax(dim=-1).gather(-1, candidates.unsqueeze(-1)).squeeze(-1)


def greedy_with_check(logits: Tensor, mask_id: int) -> Tensor:
    """Logits (R, V) -> (3, R) in float64, which holds every token id: candidates, confidences, and whether the row's
    logits are finite."""
    tokens, confidences = predict(logits, mask_id)
    return torch.stack((tokens.double(), confidences.double(), is_finite(logits).double()))


MEASURES = ("entropy", "margin")  # what a policy may ask for beside the confidence


def measures(logits: Tensor, mask_id: int) -> Tensor:
    """Logits (R, V) -> (2, R) in float64, in the order of MEASURES, of the distribution without the mask token.

    entropy: -sum p log p, in nats. margin: the probability of the most likely token minus that of the next.
    """
    allowed = logits.float().clone()
    allowed[..., mask_id] = float("-inf")
    probs = allowed.softmax(dim=-1)
    best = probs.topk(2, dim=-1).values
    return torch.stack((torch.special.entr(probs).sum(dim=-1).double(), (best[..., 0] - best[..., 1]).double()))


def is_finite(logits: Tensor) -> Tensor:
    """(R, V) -> (R,) bool: any infinity or NaN of a row shows in its sum."""
    return logits.sum(dim=-1, dtype=torch.float32).isfinite()


def rows_to_unmask(confidences: list[float], masked: list[bool], threshold: float) -> list[int]:
    """Masked rows whose confidence is above `threshold`, and always the most confident one (first of equals)."""
    candidates = [row for row, is_masked in enumerate(masked) if is_masked]
    best = max(candidates, key=lambda row: confidences[row])
    return [row for row in candidates if row == best or confidences[row] > threshold]
