"""Which configurations an experiment has: the one place where the report asks, so that it asks what the runner asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fast_dllm.spec import matrix as runner_matrix
from fast_dllm.spec.values import parse_value


@dataclass(frozen=True)
class Matrix:
    """configurations: name -> the model arguments that make it; compare_with: what the others are held against."""

    configurations: Mapping[str, Mapping[str, object]]
    compare_with: str | None = None


NINE = Matrix(runner_matrix.NINE.configurations)


def matrix_of(experiment: str, root: Path) -> Matrix:
    """The runner's matrix of `experiment`: the nine where the experiment's folder is gone. Raises UsageError where its
    matrix.json is damaged: taken for another matrix, every row would be called extra and every setting missing."""
    found = runner_matrix.matrix_of(experiment, root)
    return Matrix(dict(found.configurations), found.compare_with)


def expected_arguments(matrix: Matrix, config: str) -> dict[str, object]:
    """What a folder's name promises: `k2_middle+threshold=0.8` is k2_middle's arguments and that threshold."""
    name, *extras = config.split("+")
    expected = dict(matrix.configurations.get(name, {}))
    for extra in extras:
        key, _, text = extra.partition("=")
        expected[key] = parse_value(text)
    return expected
