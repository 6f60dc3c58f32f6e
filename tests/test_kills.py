"""Evaluations that are killed again and again: never a false "done", never a lost answer, never another result."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 12


def result_of(summary):
    throughput = {name: summary["throughput"][name] for name in ("requests", "new_tokens", "forwards")}
    names = ("accuracy", "accuracy_stderr", "num_samples", "num_samples_expected", "metric", "subtasks")
    return throughput | {name: summary[name] for name in names}


def killed_runs(folder, kills, model_args):
    command = [sys.executable, str(ROOT / "tests" / "kill_server.py"), "1", str(folder), str(kills)]
    command += ["--tasks", "toy_math", "--limit", str(LIMIT), "--batch_size", "1", "--num_fewshot", "0"]
    command += [
        "--model",
        "fast_dllm_v2",
        "--apply_chat_template",
        "--fewshot_as_multiturn",
        "--model_args",
        model_args,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(events, kills):
    assert sum(event["killed"] for event in events) >= kills
    reference = events[0]["summary"]
    assert events[0]["status"] == 0
    assert reference["num_segments"] == 1
    segments = []
    for _, runs in groupby(events[1:], key=lambda event: event["number"]):
        known = 0
        for event in runs:
            summary = event["summary"]
            if summary is None:
                assert event["killed"]
                assert event["answers"] >= known, "an answer was lost"
                known = event["answers"]
            else:  # also where the kill came after the end: what says "done" is done
                assert result_of(summary) == result_of(reference)
                segments.append(summary["num_segments"])
                break
    assert max(segments) >= 3, "hardly a kill came between two answers"


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    model_args = "model_path=tiny,threshold=1,experiment_name=00_baseline,reuse_k=2,layer_subset=middle"
    check(killed_runs(tmp_path, 100, model_args), 100)
