"""The types that tests/run.sh checks: a policy that speaks wrongly is seen before it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from golden_models import ROOT

POLICY = """
from fast_dllm.decoding import Answer, Forward, Options, Policy


def decode_one(answer: Answer, options: Options) -> Policy:
    prediction = yield Forward("full", answer.tokens, wanted=range(8))
    yield answer.fill(prediction, 0, 8, {0: 0})
    yield Forward  # wrong: the class
    yield "full"  # wrong: a kind's name
    yield answer.tokens  # wrong: no Forward around them
    yield answer.fill("prediction", 0, 8, {0: 0})  # wrong: what is filled in
    print(prediction.token)  # wrong: a field's name
    return Forward("commit")  # wrong: returned, so that it never runs


def unsaid(answer, options):  # wrong: without its types nothing of it would be looked at
    yield Forward
"""


@pytest.mark.slow
def test_a_wrong_yield_of_a_policy_is_seen_before_it_runs(tmp_path):
    file = tmp_path / "generation_functions.py"
    file.write_text(POLICY)
    words = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"), "--no-error-summary", str(file)]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *words],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    flagged = {int(number) for number in re.findall(r"generation_functions\.py:(\d+): error", found.stdout)}
    wrong = {number for number, line in enumerate(POLICY.splitlines(), start=1) if "# wrong" in line}
    assert (found.returncode, flagged) == (1, wrong), found.stdout + found.stderr
