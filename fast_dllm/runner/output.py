"""What a user sees: the frame, the same as JSON, and one result. The table is in table.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Iterator

from fast_dllm.runner.states import State
from fast_dllm.spec.files import as_object, read_json
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
        told = ", ".join(f"{count} on {kind}" for kind, count in kinds.items())
        yield f"Mixed GPUs, whose speeds and roundings differ: {told}"
    yield LINE


def as_json(request: Request, states: list[State]) -> str:
    """One entry for each configuration. A result of the lab's first runner has a state of its own, not `complete`."""
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
