"""What a run cost, as its summary reports it: counts, seconds, and the speeds that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Mapping

from fast_dllm.decoding import FORWARD_KINDS, STEP_KINDS
from fast_dllm.record.cost import Cost

_BY_KIND = ("forwards", "layer_forwards", "row_layer_forwards", "guesses_offered", "guesses_accepted")
_GENERATION = (
    "requests", "seconds_generating", "new_tokens", "tokens_per_second", "tokens_per_forward", "tokens_per_step",
    "truncated_prompts",
)  # fmt: skip
_SCORING = (
    "scored_requests", "seconds_scoring", "requests_per_second", "scored_tokens", "scored_tokens_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Throughput:
    """The cost of a run: of generation, of scoring, or of both. None: not recorded, or there was none.

    forwards, layer_forwards, row_layer_forwards: by kind of forward (decoding.FORWARD_KINDS, or "score").
    guesses_offered, guesses_accepted: by what was guessed (decoding.GUESSES).
    Seconds are GPU-seconds: summed over the processes and jobs that answered, each on a GPU of its own, so
    `tokens_per_second` is of one GPU. All are without loading the model. `wall_seconds` is the time from the start of
    the first batch to the end of the last one, with all waits between jobs, and `tokens_per_wall_second` is of
    whatever ran side by side meanwhile. `answers_by_batch_size`: batch size -> answers given in such batches.
    """

    forwards: Mapping[str, float] = field(default_factory=dict)
    layer_forwards: Mapping[str, float] = field(default_factory=dict)
    row_layer_forwards: Mapping[str, float] = field(default_factory=dict)
    guesses_offered: Mapping[str, float] = field(default_factory=dict)
    guesses_accepted: Mapping[str, float] = field(default_factory=dict)
    requests: float | None = None
    seconds_generating: float | None = None
    new_tokens: float | None = None
    tokens_per_second: float | None = None
    tokens_per_forward: float | None = None
    tokens_per_step: float | None = None
    truncated_prompts: float | None = None
    scored_requests: float | None = None
    seconds_scoring: float | None = None
    requests_per_second: float | None = None
    scored_tokens: float | None = None
    scored_tokens_per_second: float | None = None
    wall_seconds: float | None = None
    tokens_per_wall_second: float | None = None
    answers_by_batch_size: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """What has no value is left out; a speed without seconds is null."""
        content: dict[str, object] = {"forwards": dict(self.forwards)}
        for name in _BY_KIND[1:]:
            if getattr(self, name):
                content[name] = dict(getattr(self, name))
        for count, names in (("requests", _GENERATION), ("scored_requests", _SCORING)):
            if getattr(self, count):
                content.update((name, getattr(self, name)) for name in names)
        for name in ("wall_seconds", "tokens_per_wall_second"):
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        if self.answers_by_batch_size:
            content["answers_by_batch_size"] = dict(self.answers_by_batch_size)
        return content


NAMES = tuple(each.name for each in fields(Throughput))
MAPPINGS = (*_BY_KIND, "answers_by_batch_size")


def throughput(
    cost: Cost, wall_seconds: float | None = None, batch_sizes: Mapping[int, int] | None = None
) -> Throughput:
    """The Throughput of a run's cost."""
    by_kind = {name: {kind: count for kind, count in getattr(cost, name).items() if count} for name in _BY_KIND}
    values: dict[str, float | None] = {}
    if cost.requests:
        forwards = by_kind["forwards"]
        run = sum(
            count for kind, count in forwards.items() if kind in FORWARD_KINDS and FORWARD_KINDS[kind].runs_layers
        )
        values.update(
            requests=cost.requests,
            seconds_generating=cost.seconds_generating,
            new_tokens=cost.new_tokens,
            tokens_per_second=_ratio(cost.new_tokens, cost.seconds_generating),
            tokens_per_forward=_ratio(cost.new_tokens, run),
            tokens_per_step=_ratio(cost.new_tokens, sum(forwards.get(kind, 0) for kind in STEP_KINDS)),
            truncated_prompts=cost.truncated_prompts,
        )
    if cost.scored_requests:
        values.update(
            scored_requests=cost.scored_requests,
            seconds_scoring=cost.seconds_scoring,
            requests_per_second=_ratio(cost.scored_requests, cost.seconds_scoring),
            scored_tokens=cost.scored_tokens,
            scored_tokens_per_second=_ratio(cost.scored_tokens, cost.seconds_scoring),
        )
    if wall_seconds is not None:
        values["wall_seconds"] = wall_seconds
        if cost.new_tokens:
            values["tokens_per_wall_second"] = _ratio(cost.new_tokens, wall_seconds)
    sizes = {str(size): count for size, count in sorted((batch_sizes or {}).items())}
    return Throughput(**by_kind, **values, answers_by_batch_size=sizes)  # type: ignore[arg-type]


def speed_line(cost: Cost) -> str:
    """Answers, tokens and forwards of a process's own work, for a person who watches."""
    kinds = [f"{kind} {count}" for kind, count in cost.forwards.items() if count]
    return (
        f"{cost.requests} answers, {cost.new_tokens} new tokens in {cost.seconds_generating:.1f} s: "
        f"{cost.new_tokens / cost.seconds_generating:.1f} tokens/s; forwards: {', '.join(kinds)}"
    )


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per else None
