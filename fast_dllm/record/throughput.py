"""What a run cost, as its summary reports it: counts, seconds, and the speeds that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Mapping

from fast_dllm.decoding import FORWARD_KINDS, STEP_KINDS

_BY_KIND = ("forwards", "layer_forwards", "row_layer_forwards")
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
    Seconds are GPU-seconds: summed over the processes and jobs that answered, each on a GPU of its own, so
    `tokens_per_second` is of one GPU. All are without loading the model. `wall_seconds` is the time from the start of
    the first batch to the end of the last one, with all waits between jobs, and `tokens_per_wall_second` is of
    whatever ran side by side meanwhile. `answers_by_batch_size`: batch size -> answers given in such batches.
    """

    forwards: Mapping[str, float] = field(default_factory=dict)
    layer_forwards: Mapping[str, float] = field(default_factory=dict)
    row_layer_forwards: Mapping[str, float] = field(default_factory=dict)
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
    cost: Mapping[str, float], wall_seconds: float | None = None, batch_sizes: Mapping[int, int] | None = None
) -> Throughput:
    """The Throughput of a run's cost. `cost` counts requests, new_tokens, truncated_prompts, seconds_generating,
    scored_requests, scored_tokens, seconds_scoring, and by kind of forward forwards.<kind>, layer_forwards.<kind> and
    row_layer_forwards.<kind>."""
    by_kind: dict[str, dict[str, float]] = {name: {} for name in _BY_KIND}
    for name, count in cost.items():
        what, dot, kind = name.partition(".")
        if dot and count:
            by_kind[what][kind] = count
    values: dict[str, float | None] = {}
    if cost.get("requests"):
        forwards = by_kind["forwards"]
        run = sum(
            count for kind, count in forwards.items() if kind in FORWARD_KINDS and FORWARD_KINDS[kind].runs_layers
        )
        steps = sum(forwards.get(kind, 0) for kind in STEP_KINDS)
        new_tokens, seconds = cost["new_tokens"], cost["seconds_generating"]
        values.update(
            requests=cost["requests"],
            seconds_generating=seconds,
            new_tokens=new_tokens,
            tokens_per_second=_ratio(new_tokens, seconds),
            tokens_per_forward=_ratio(new_tokens, run),
            tokens_per_step=_ratio(new_tokens, steps),
            truncated_prompts=cost.get("truncated_prompts", 0),
        )
    if cost.get("scored_requests"):
        requests, tokens, seconds = (cost[name] for name in ("scored_requests", "scored_tokens", "seconds_scoring"))
        values.update(
            scored_requests=requests,
            seconds_scoring=seconds,
            requests_per_second=_ratio(requests, seconds),
            scored_tokens=tokens,
            scored_tokens_per_second=_ratio(tokens, seconds),
        )
    if wall_seconds is not None:
        values["wall_seconds"] = wall_seconds
        if cost.get("new_tokens"):
            values["tokens_per_wall_second"] = _ratio(cost["new_tokens"], wall_seconds)
    sizes = {str(size): count for size, count in sorted((batch_sizes or {}).items())}
    return Throughput(**by_kind, **values, answers_by_batch_size=sizes)  # type: ignore[arg-type]


def speed_line(cost: Mapping[str, float]) -> str:
    """Answers, tokens and forwards of a process's own work, for a person who watches."""
    seconds = cost["seconds_generating"]
    kinds = [f"{name.split('.')[1]} {count}" for name, count in cost.items() if name.startswith("forwards.") and count]
    return (
        f"{cost['requests']} answers, {cost['new_tokens']} new tokens in {seconds:.1f} s: "
        f"{cost['new_tokens'] / seconds:.1f} tokens/s; forwards: {', '.join(kinds)}"
    )


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per else None
