"""The table of results on 80 columns: its numbers, what they mean, and bars. The report makes the claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Mapping

from fast_dllm.record.summary import Summary
from fast_dllm.runner.states import State
from fast_dllm.spec.matrix import NINE
from fast_dllm.spec.request import Request

SUBSETS = ("first", "middle", "last")
ROWS = {
    f"k = {k}": [name for name, arguments in NINE.configurations.items() if arguments["reuse_k"] == k]
    for k in sorted({int(str(arguments["reuse_k"])) for arguments in NINE.configurations.values()})
}
BAR = 40  # columns of the longest bar
NOISE = 1.1  # two speeds of the same work that are further apart say that the machine had more to do

EXPLAINED = """\
accuracy, %: right answers ± one standard error. tokens/s: new tokens per second
of decoding, on this machine. tokens per forward: new tokens per full-depth
forward (layers that ran / layers of the model), prefill and commits counted; a
step that reads stored predictions again runs none."""


@dataclass(frozen=True)
class Result:
    """What the table shows of one complete configuration; None where its summary does not record it."""

    name: str
    is_foreign: bool  # of the lab's first runner
    accuracy: float
    error: float | None
    speed: float | None
    per_forward: float | None
    work: tuple  # equal for two that computed the same

    @classmethod
    def of(cls, state: State) -> Result:
        summary = state.judgement.summary or Summary()
        cost = summary.throughput
        return cls(
            name=state.run.folder,
            is_foreign=summary.is_foreign,
            accuracy=summary.accuracy or 0.0,
            error=summary.accuracy_stderr,
            speed=None if summary.is_foreign else cost.tokens_per_second,  # measured otherwise
            per_forward=cost.new_tokens / summary.full_forwards if cost.new_tokens and summary.full_forwards else None,
            work=tuple(str(value) for value in (summary.accuracy, cost.new_tokens, cost.forwards, cost.layer_forwards)),
        )


def accuracy(result: Result) -> str:
    text = f"{100 * result.accuracy:.1f}" + (f" ± {100 * result.error:.1f}" if result.error is not None else "")
    return f"{text} (earlier)" if result.is_foreign else text


def speed(result: Result) -> str:
    return "-" if result.speed is None else f"{result.speed:.1f}"


def per_forward(result: Result) -> str:
    return "-" if result.per_forward is None else f"{result.per_forward:.2f}"


# title, cell, width in a list
COLUMNS: tuple[tuple[str, Callable[[Result], str], int], ...] = (
    ("accuracy, %", accuracy, 20),
    ("tokens/s", speed, 12),
    ("tokens per forward", per_forward, 20),
)


def table(request: Request, states: list[State]) -> Iterator[str]:
    """The nine as k by subset, one measure below the other; any other matrix as a list."""
    results = {state.run.name: Result.of(state) for state in states if state.is_complete}
    if request.matrix == NINE:
        for title, cell, _ in COLUMNS:
            yield f"{title:<18}" + "".join(f"{subset:>20}" for subset in SUBSETS)
            for row, names in ROWS.items():
                cells = (cell(results[name]) if name in results else "-" for name in names)
                yield f"  {row:<16}" + "".join(f"{text:>20}" for text in cells)
    else:
        yield f"{'configuration':<26}" + "".join(f"{title:>{width}}" for title, _, width in COLUMNS)
        for state in states:
            result = results.get(state.run.name)
            cells = (f"{'-' if result is None else cell(result):>{width}}" for _, cell, width in COLUMNS)
            mark = "*" if state.run.name == request.matrix.compare_with else ""
            yield f"{state.run.folder + mark:<26}" + "".join(cells)
        yield "* the others are compared with it"
    if not results:
        return
    yield from ("", *EXPLAINED.split("\n"))
    one_result = request.matrix == NINE and columns_are_one_result(results)
    if one_result:
        yield "The three columns of a row are one result: same answers, whichever layers are"
        yield "skipped (docs/design.md)."
        yield from spread(results)
    shown = [(row, results[names[0]]) for row, names in ROWS.items() if names[0] in results] if one_result else [
        (state.run.folder, results[state.run.name]) for state in states if state.run.name in results
    ]  # fmt: skip
    yield from picture(shown)


def columns_are_one_result(results: Mapping[str, Result]) -> bool:
    """Every row that is complete has three times the same accuracy, tokens and forwards, and there is such a row."""
    rows = [[results[name] for name in names] for names in ROWS.values() if all(name in results for name in names)]
    rows = [row for row in rows if not any(result.is_foreign for result in row)]
    return bool(rows) and all(len({result.work for result in row}) == 1 for row in rows)


def spread(results: Mapping[str, Result]) -> Iterator[str]:
    """How far apart the speeds of one row are, which all did the same work."""
    ranges = []
    for row, names in ROWS.items():
        speeds = [results[name].speed or 0.0 for name in names if name in results]
        if len(speeds) == len(names) and min(speeds) > 0:
            ranges.append((row, min(speeds), max(speeds)))
    if ranges:
        row, low, high = max(ranges, key=lambda each: each[2] / each[1])
        ratio = high / low
        text = f"Speeds of the same work are up to {100 * (ratio - 1):.0f}% apart ({row}: {low:.1f} to {high:.1f})"
        yield f"{text}{':' if ratio > NOISE else '.'}"
        if ratio > NOISE:
            yield "the machine had other things to do, so compare tokens per forward."


def picture(shown: list[tuple[str, Result]]) -> Iterator[str]:
    """Tokens per forward as bars."""
    values = [result.per_forward or 0.0 for _, result in shown]
    if len(values) < 2 or not max(values):
        return
    yield from ("", "tokens per forward")
    for (name, result), value in zip(shown, values):
        length = "█" * max(1, round(BAR * value / max(values)))
        yield f"  {name[:16]:<16} {length:<{BAR}} {value:5.2f} {100 * result.accuracy:6.1f}%"
