"""What a user sees: the frame, the table, the same as JSON, and one result."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Iterator, Mapping

from fast_dllm.runner.files import as_object, read_json
from fast_dllm.runner.matrix import NINE
from fast_dllm.runner.request import Request, Run
from fast_dllm.runner.states import State
from fast_dllm.runner.tasks import task_folder

LINE = "=" * 77


def frame(request: Request, states: list[State]) -> Iterator[str]:
    folder = task_folder(request.task, request.limit)
    yield from (LINE, f"Experiment Status: {request.experiment} / {folder}", LINE)
    for state in states:
        detail = f" ({state.detail})" if state.detail else ""
        yield f"  {'✓' if state.is_complete else '✗'} {state.run.folder}{detail}"
    yield from (LINE, f"Completed: {sum(state.is_complete for state in states)} / {len(states)}")
    kinds = Counter(state.gpu for state in states if state.gpu)
    if len(kinds) > 1:
        told = ", ".join(f"{count} on {kind}" for kind, count in kinds.items())
        yield f"Mixed GPUs, whose speeds and roundings differ: {told}"
    yield LINE


def as_json(request: Request, states: list[State]) -> str:
    """One entry for each configuration. What an earlier runner computed has the state `earlier`, not `complete`."""
    entries = []
    for state in states:
        entry = {
            "config": state.run.folder,
            "state": state.state,
            "detail": state.detail,
            "job": state.job,
            "accuracy": (state.judgement.content or {}).get("accuracy") if state.is_complete else None,
        }
        entries.append(f"\n    {json.dumps(entry, ensure_ascii=False)}")
    head = {
        "schema_version": 1,
        "experiment": request.experiment,
        "task": request.task,
        "limit": request.limit,
        "completed": sum(state.is_complete for state in states),
        "total": len(states),
        "compare_with": request.matrix.compare_with,
    }
    return json.dumps(head, indent=2)[:-2] + ',\n  "configurations": [' + ",".join(entries) + "\n  ]\n}"


# -- the table ---------------------------------------------------------------------------------------------------------
def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def cell(state: State | None) -> str:
    """Accuracy with its standard error, tokens/s and tokens a forward of what is complete."""
    if state is None or not state.is_complete:
        return "-"
    content: Mapping = state.judgement.content or {}
    speed = as_object(content.get("throughput"))
    accuracy, error = _number(content.get("accuracy")), _number(content.get("accuracy_stderr"))
    text = f"{100 * (accuracy or 0):5.1f}%" + (f" ± {100 * error:3.1f}" if error is not None else "")
    if state.state == "earlier":
        return f"{text} (earlier runner)"
    for name, form in (("tokens_per_second", "{:6.1f} tok/s"), ("tokens_per_forward", "{:5.2f}/fwd")):
        if _number(speed.get(name)) is not None:
            text += f" {form.format(speed[name])}"
    return text


def table(request: Request, states: list[State]) -> Iterator[str]:
    """The nine as k by subset; any other matrix as a list."""
    by_name = {state.run.name: state for state in states}
    if request.matrix != NINE:
        width = max(len(state.run.folder) for state in states)
        for state in states:
            mark = "  (the others are compared with it)" if state.run.name == request.matrix.compare_with else ""
            yield f"{state.run.folder:<{width}} | {cell(state)}{mark}"
        return
    cells = {name: cell(by_name.get(name)) for name in NINE.configurations}
    width = max(33, *map(len, cells.values()))
    yield f"{'':<6} | {'first':<{width}} | {'middle':<{width}} | last"
    for k in (1, 2, 3):
        columns = (f"{cells[f'k{k}_{subset}']:<{width}}" for subset in ("first", "middle", "last"))
        yield f"k = {k}  | {' | '.join(columns)}".rstrip()
    if columns_are_one_result(by_name):
        yield "The three columns of a row are one result: same answers, whichever layers are skipped (docs/design.md)."


def columns_are_one_result(by_name: Mapping[str, State]) -> bool:
    """Every row that is complete has three times the same accuracy, tokens and forwards, and there is such a row."""
    rows = []
    for k in (1, 2, 3):
        names = [f"k{k}_{subset}" for subset in ("first", "middle", "last")]
        states = [by_name[name] for name in names if name in by_name]
        if len(states) == len(names) and all(state.state == "complete" for state in states):
            contents = [state.judgement.content or {} for state in states]
            speeds = [as_object(content.get("throughput")) for content in contents]
            told = [(c.get("accuracy"), s.get("new_tokens"), s.get("forwards")) for c, s in zip(contents, speeds)]
            rows.append(told[0] == told[1] == told[2])
    return bool(rows) and all(rows)


# -- one result --------------------------------------------------------------------------------------------------------
FIELDS = ("task", "limit", "config", "experiment", "metric", "accuracy", "accuracy_stderr", "num_samples")
THROUGHPUT_FIELDS = (
    "tokens_per_second", "tokens_per_forward", "seconds_generating", "requests_per_second", "seconds_scoring",
)  # fmt: skip


def summary(root: Path, run: Run) -> Iterator[str]:
    path = Path("results") / run.path / "summary.json"
    content = read_json(root / path)[0] or {}
    speed = as_object(content.get("throughput"))
    for values, names in ((content, FIELDS), (speed, THROUGHPUT_FIELDS)):
        for name in names:
            if name in values:
                value = values[name]
                yield f"  {name:<20} {value if isinstance(value, str) else json.dumps(value)}"
    yield f"  {'full summary':<20} {path}"
