"""One batch of answers as a line of a file, and the sum of many batches."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Iterable, Mapping

from fast_dllm.record.cost import Cost
from fast_dllm.spec.files import as_object, parse_json

CHECKSUM_DIGITS = 16
_CHECKED_LINE = re.compile(rb'(.*), "sha256": "([0-9a-f]{16})"\}\n', re.DOTALL)
_KEYS = {"answers", "counters", "costs", "batch_size", "began", "ended"}


@dataclass(frozen=True)
class BatchRecord:
    """Answers that were given together, by request key.

    cost: of the batch as a whole. costs: of single answers, by key. batch_size: sequences side by side. began, ended:
    Unix times, None where they were not recorded.
    """

    answers: Mapping[str, Any]
    cost: Cost = field(default_factory=Cost)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    batch_size: int = 0
    began: float | None = None
    ended: float | None = None

    @classmethod
    def ending_now(
        cls,
        answers: Mapping[str, object],
        cost: Cost,
        costs: Mapping[str, Cost] | None = None,
        batch_size: int | None = None,
    ) -> BatchRecord:
        """A batch that ends now, and began as long ago as its cost says. batch_size: None for the number of answers."""
        ended = time.time()
        size = len(answers) if batch_size is None else batch_size
        return cls(dict(answers), cost, dict(costs or {}), size, round(ended - cost.seconds, 3), round(ended, 3))

    def to_line(self) -> bytes:
        """JSON with a checksum as the last key, so that a bit that flips within a text is noticed."""
        content = {
            "answers": self.answers,
            "counters": self.cost.as_json(),
            "costs": {key: cost.as_json() for key, cost in self.costs.items()},
            "batch_size": self.batch_size,
            "began": self.began,
            "ended": self.ended,
        }
        body = json.dumps(content)[:-1].encode()
        return body + f', "sha256": "{_checksum(body)}"}}\n'.encode()

    @classmethod
    def from_line(cls, line: bytes) -> BatchRecord:
        """The inverse of `to_line`. Raises ValueError, also for a line that is cut off or damaged."""
        checked = _CHECKED_LINE.fullmatch(line)
        if not checked or _checksum(checked[1]) != checked[2].decode():
            raise ValueError("it is cut off, or the checksum does not fit")
        content = parse_json(checked[1] + b"}", finite=False)  # a log-likelihood may be -Infinity
        if not content.keys() <= _KEYS or not isinstance(content.get("answers"), dict):
            raise ValueError("it is no batch of answers")
        answers = content["answers"]
        costs = {key: Cost.from_json(as_object(cost)) for key, cost in as_object(content.get("costs")).items()}
        batch_size = content.get("batch_size", len(answers))
        times = [content.get(name) for name in ("began", "ended")]
        if not isinstance(batch_size, int) or not all(isinstance(each, (int, float, type(None))) for each in times):
            raise ValueError("a size or a time is no number")
        return cls(answers, Cost.from_json(as_object(content.get("counters"))), costs, batch_size, *times)


def _checksum(body: bytes) -> str:
    return sha256(body).hexdigest()[:CHECKSUM_DIGITS]


class Ledger:
    """Answers and what they cost, each counted once.

    cost: its seconds are summed over processes, so they are GPU-seconds. segments: the lives of processes that answered
    something, (shard, number); those that ran side by side count as one. began, ended: Unix times of the first batch's
    start and the last one's end, by the clocks of the machines they ran on. batch_sizes: size -> answers that were
    given in such a batch. costs: of single answers, by request key, where they were recorded.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.cost = Cost()
        self.segments: set[tuple[str | None, int]] = set()
        self.began: float | None = None
        self.ended: float | None = None
        self.batch_sizes: Counter[int] = Counter()
        self.costs: dict[str, Cost] = {}

    def add(self, batch: BatchRecord) -> None:
        """What the batch cost as a whole is split evenly over its answers; those that are known already count once."""
        new = [key for key in batch.answers if key not in self.answers]
        if batch.answers and not new:
            return
        self.cost.add(batch.cost, len(new) / len(batch.answers) if len(new) < len(batch.answers) else 1)
        for key in new:
            self.answers[key] = batch.answers[key]
            if key in batch.costs:
                self.costs[key] = batch.costs[key]
                self.cost.add(batch.costs[key])
        self.batch_sizes[batch.batch_size] += len(new)
        self._extend(batch.began, batch.ended)

    def _extend(self, began: float | None, ended: float | None) -> None:
        self.began = min((time for time in (self.began, began) if time is not None), default=None)
        self.ended = max((time for time in (self.ended, ended) if time is not None), default=None)

    @property
    def num_segments(self) -> int:
        """How often the run was begun: shards side by side are one segment, the lives of one shard are several, and
        what was answered without shards before or after them is another."""
        lives = Counter(shard for shard, _ in self.segments)
        return lives.pop(None, 0) + max(lives.values(), default=0)

    @property
    def num_shards(self) -> int:
        """Shards that answered something; 1 for a run that was not split."""
        return max(len({shard for shard, _ in self.segments if shard is not None}), 1)

    @property
    def wall_seconds(self) -> float | None:
        """From the first batch's start to the last one's end, waits between jobs included."""
        return None if self.began is None or self.ended is None else self.ended - self.began


def combined(ledgers: Iterable[Ledger]) -> Ledger:
    """The sum over processes side by side that kept no answers on disk: one segment."""
    total = Ledger()
    for ledger in ledgers:
        total.answers.update(ledger.answers)
        total.costs.update(ledger.costs)
        total.cost.add(ledger.cost)
        total.batch_sizes += ledger.batch_sizes
        total._extend(ledger.began, ledger.ended)
    total.segments.add((None, 1))
    return total
