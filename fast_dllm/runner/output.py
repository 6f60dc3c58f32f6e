"""What --status prints: the frame of states, or the same as JSON; and the fields of one result."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Iterator

from fast_dllm.record.summary import read_summary
from fast_dllm.runner.messages import say
from fast_dllm.runner.states import State, examine
from fast_dllm.spec.files import as_object, printable
from fast_dllm.spec.request import Request, Run
from fast_dllm.spec.tasks import task_folder

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
        counts = ", ".join(f"{count} on {kind}" for kind, count in kinds.items())
        yield f"Mixed GPUs, whose speeds and roundings differ: {counts}"
    yield LINE


def as_json(request: Request, states: list[State]) -> str:
    """The states as JSON, one line for each configuration. A result of the lab's first runner has the state EARLIER."""
    entries = []
    for state in states:
        entry = {
            "config": state.run.folder,
            "state": state.state,
            "detail": state.detail,
            "job": state.job,
            "accuracy": state.judgement.summary.accuracy if state.is_complete and state.judgement.summary else None,
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


def print_status(request: Request, as_json_text: bool, check: bool) -> int:
    """Print the frame (or JSON); returns 3 for `check` while anything is incomplete, else 0."""
    states, fault = examine(request)
    if fault:
        say(f"run.sh: squeue failed, so jobs are not known: {fault}")
    if as_json_text:
        print(as_json(request, states))
    else:
        print(*frame(request, states), sep="\n")
    return 3 if check and not all(state.is_complete for state in states) else 0


# -- one result --------------------------------------------------------------------------------------------------------
FIELDS = ("task", "limit", "config", "experiment", "metric", "accuracy", "accuracy_stderr", "num_samples")
THROUGHPUT_FIELDS = (
    "tokens_per_second", "tokens_per_forward", "seconds_generating", "requests_per_second", "seconds_scoring",
)  # fmt: skip


def print_summary(root: Path, run: Run) -> None:
    """Print the fields of a run's summary that a person wants to see first."""
    print(*_fields(root, run), sep="\n", flush=True)


def _fields(root: Path, run: Run) -> Iterator[str]:
    path = Path("results") / run.path / "summary.json"
    summary = read_summary(root / path)
    content = {} if summary is None else summary.as_json()
    speed = as_object(content.get("throughput"))
    for values, names in ((content, FIELDS), (speed, THROUGHPUT_FIELDS)):
        for name in names:
            if name in values:
                value = values[name]
                yield f"  {name:<20} {printable(value) if isinstance(value, str) else json.dumps(value)}"
    yield f"  {'full summary':<20} {path}"
