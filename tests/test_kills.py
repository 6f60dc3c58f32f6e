"""Evaluations that are killed again and again: never a false "done", never a lost answer, never another result."""

import json
import os
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def words(limit):
    model_args = "model_path=tiny,threshold=1,experiment_name=00_baseline,reuse_k=2,layer_subset=middle"
    return [
        *("--tasks", "toy_math", "--limit", str(limit), "--batch_size", "1", "--num_fewshot", "0"),
        *("--model", "fast_dllm_v2", "--apply_chat_template", "--fewshot_as_multiturn", "--model_args", model_args),
    ]


def result_of(event):
    """What must not depend on how often the run was killed."""
    summary = event["summary"]
    throughput = {name: summary["throughput"][name] for name in ("requests", "new_tokens", "forwards")}
    names = ("accuracy", "accuracy_stderr", "num_samples", "num_samples_expected", "metric", "subtasks")
    return throughput | {name: summary[name] for name in names} | {"metrics": event["results"]["results"]}


def killed_runs(folder, kills, limit):
    command = [sys.executable, str(ROOT / "tests" / "kill_server.py"), "1", str(folder), str(kills), *words(limit)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(events, kills):
    """Returns the segments of each run that came to its end."""
    reference, *events = events
    assert reference["status"] == 0
    assert reference["summary"]["num_segments"] == 1
    assert sum(event["killed"] for event in events) >= kills
    segments = []
    for _, runs in groupby(events, key=lambda event: event["number"]):
        known = set()
        for event in runs:
            if event["summary"] is not None:  # also where the kill came after the end: what says "done" is done
                assert result_of(event) == result_of(reference)
                segments.append(event["summary"]["num_segments"])
                break
            assert event["killed"]
            assert known <= set(event["answers"]), "an answer was lost"
            assert len(event["answers"]) == len(set(event["answers"])), "a question was answered twice"
            known = set(event["answers"])
    killed = sum(event["killed"] for event in events)
    print(f"{killed} kills; {len(segments)} runs of {sum(segments)} segments, each equal to the undisturbed one")
    return segments


@pytest.mark.slow
def test_a_few_kills(tmp_path):
    """About 40 s on one core."""
    assert max(check(killed_runs(tmp_path, kills=6, limit=5), kills=6)) >= 2, "no kill came between two answers"


@pytest.mark.slow
def test_two_that_evaluate_one_run_at_once_leave_whole_and_equal_results(tmp_path):
    """What a lock should prevent: each takes the other for dead. About 30 s on one core."""
    folder, seen = tmp_path / "run", []
    command = [sys.executable, str(ROOT / "eval.py"), *words(4), "--output_path", f"{folder}/"]
    both = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    while any(process.poll() is None for process in both):
        if (folder / "summary.json").exists():
            seen.append({name: json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "results")})
        time.sleep(0.05)
    assert [process.returncode for process in both] == [0, 0], [process.stderr.read()[-2000:] for process in both]
    seen.append({name: json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "results")})
    assert all(result_of(event) == result_of(seen[0]) for event in seen)
    assert seen[0]["summary"]["num_samples"] == seen[0]["summary"]["throughput"]["requests"] == 4
    assert not (folder / "answers").exists()


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    """About 10 minutes on one core; -s shows the counts."""
    segments = check(killed_runs(tmp_path, kills=100, limit=12), kills=100)
    assert max(segments) >= 4, "hardly a kill came between two answers"
