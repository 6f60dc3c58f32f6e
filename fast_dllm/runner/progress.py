"""How far an evaluation is: the progress file that it writes every two seconds, and its words for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fast_dllm.spec.files import read_json

MOST_AMOUNT = 1e12  # a larger number was not written by an evaluation


@dataclass(frozen=True)
class Progress:
    """The content of progress.rank<r>.json (record/answers.py).

    answered, total: questions of the run, or of the shard that the process answers. new_tokens, seconds_generating: of
    the same. segment_answered, segment_seconds: of this process alone. run_total: questions of the whole run, where the
    process answers a shard; else 0.
    """

    answered: int = 0
    total: int = 0
    new_tokens: float = 0
    seconds_generating: float = 0
    segment_answered: float = 0
    segment_seconds: float = 0
    run_total: int = 0

    @classmethod
    def read(cls, folder: Path, name: str = "progress.rank0.json") -> Progress | None:
        """None where there is no such file, or no usable one."""
        content = read_json(folder / name)[0]
        if not content:
            return None
        values = {field: content.get(field, 0) for field in cls.__dataclass_fields__}
        for value in values.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST_AMOUNT:
                return None
        for field in ("answered", "total", "run_total"):
            values[field] = int(values[field])
        return cls(**values)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds_generating if self.seconds_generating > 0 else 0.0

    @property
    def answers_per_second(self) -> float:
        """The speed of this process alone, without what earlier processes answered."""
        return self.segment_answered / self.segment_seconds if self.segment_seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None if it is not known."""
        if not self.answers_per_second or self.total <= self.answered:
            return None
        return (self.total - self.answered) / self.answers_per_second


def describe(answered: int, total: int, tokens_per_second: float, seconds_left: float | None, extra: str = "") -> str:
    """Like ", 412/1319, 48.9 tok/s, ~25 min left". extra: a part between the questions and the speed."""
    text = (f", {answered}/{total}" if total else "") + extra
    if tokens_per_second:
        text += f", {tokens_per_second:.1f} tok/s"
    return text if seconds_left is None else f"{text}, ~{int(seconds_left / 60) + 1} min left"


def progress_text(progress: Progress | None) -> str:
    """The description of a run's progress; "" where there is none."""
    if progress is None:
        return ""
    return describe(progress.answered, progress.total, progress.tokens_per_second, progress.seconds_left)
