"""Which configurations an experiment has: the one place where the report asks, so that it asks what the runner asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BASELINE_K = 1


@dataclass(frozen=True)
class Matrix:
    """configurations: name -> the model arguments that make it; compare_with: what the others are held against."""

    configurations: Mapping[str, Mapping[str, object]]
    compare_with: str | None = None


NINE = Matrix({f"k{k}_{s}": {"reuse_k": k, "layer_subset": s} for k in (1, 2, 3) for s in ("first", "middle", "last")})


def matrix_of(experiment: str, root: Path) -> Matrix:
    """The runner's matrix of `experiment`; where there is no runner, its matrix.json, else the nine."""
    try:
        from fast_dllm.runner.matrix import matrix_of as runners
    except ImportError:
        return _from_file(root / "experiments" / experiment / "matrix.json")
    try:
        found = runners(experiment, root)
    except (ValueError, OSError):
        return NINE  # results of an experiment whose folder is gone
    return Matrix(dict(found.configurations), found.compare_with)


def _from_file(path: Path) -> Matrix:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return NINE
    return Matrix(dict(content.get("configurations", {})), content.get("compare_with"))


def expected_arguments(matrix: Matrix, config: str) -> dict[str, object]:
    """What a folder's name promises: `k2_middle+threshold=0.8` is k2_middle's arguments and that threshold."""
    name, *extras = config.split("+")
    expected = dict(matrix.configurations.get(name, {}))
    for extra in extras:
        key, _, text = extra.partition("=")
        expected[key] = value_of(text)
    return expected


def value_of(text: str) -> object:
    """A number, True, False, None, or the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
