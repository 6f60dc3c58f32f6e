"""What work cost, as it is counted while answers are given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Mapping

MOST_AMOUNT = 1e15


@dataclass
class Cost:
    """Counts, and seconds without loading the model. forwards, layer_forwards, row_layer_forwards: by kind of forward
    (decoding.FORWARD_KINDS; "score" for one that scores). guesses_offered, guesses_accepted: by what was guessed
    (decoding.GUESSES)."""

    requests: float = 0
    new_tokens: float = 0
    truncated_prompts: float = 0
    seconds_generating: float = 0
    scored_requests: float = 0
    scored_tokens: float = 0
    seconds_scoring: float = 0
    forwards: dict[str, float] = field(default_factory=dict)
    layer_forwards: dict[str, float] = field(default_factory=dict)
    row_layer_forwards: dict[str, float] = field(default_factory=dict)
    guesses_offered: dict[str, float] = field(default_factory=dict)
    guesses_accepted: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.seconds_generating + self.seconds_scoring

    def add(self, other: Cost, factor: float = 1) -> None:
        """Add the other cost, or a part of it."""
        for each in fields(self):
            amount = getattr(other, each.name)
            if isinstance(amount, dict):
                total = getattr(self, each.name)
                for kind, count in amount.items():
                    if count:
                        total[kind] = total.get(kind, 0) + count * factor
            else:
                setattr(self, each.name, getattr(self, each.name) + amount * factor)

    def as_json(self) -> dict[str, float]:
        """What is not 0, by name; forwards of one kind as "forwards.<kind>"."""
        amounts: dict[str, float] = {}
        for each in fields(self):
            amount = getattr(self, each.name)
            if isinstance(amount, dict):
                amounts.update((f"{each.name}.{kind}", count) for kind, count in amount.items() if count)
            elif amount:
                amounts[each.name] = amount
        return amounts

    @classmethod
    def from_json(cls, amounts: Mapping[str, object]) -> Cost:
        """The inverse of `as_json`. Raises ValueError."""
        cost = cls()
        for name, amount in amounts.items():
            if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not 0 <= amount <= MOST_AMOUNT:
                raise ValueError("a cost is no number of at least 0")
            name_of_field, _, kind = name.partition(".")
            if not hasattr(cost, name_of_field) or isinstance(getattr(cost, name_of_field), dict) != bool(kind):
                raise ValueError("a cost of an unknown kind")
            if kind:
                getattr(cost, name_of_field)[kind] = amount
            else:
                setattr(cost, name_of_field, amount)
        return cost
