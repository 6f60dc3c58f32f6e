"""What a summary holds. Stands alone: no torch, no lm_eval.

A run leaves two files in results/<experiment>/<task>[_limit_<N>]/<config>/:

    results.json   everything lm_eval returned
    summary.json   the run in one page: accuracy, cost and provenance; written last, so it marks the run complete
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from fast_dllm.decoding import FORWARD_KINDS, STEP_KINDS
from fast_dllm.spec.tasks import task_of

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "transformers", "lm_eval", "accelerate", "datasets", "tokenizers", "safetensors")

# The number called "accuracy" of a task that tasks/tasks.json does not describe: the first of these that it reports.
FALLBACK_METRICS = (
    "acc,none",
    "exact_match,none",
    "exact_match,flexible-extract",
    "pass@1,create_test",  # humaneval
    "pass_at_1,none",  # mbpp
)


def model_revision(source: str) -> str | None:
    """What exactly was loaded: a hub model's commit, or for a folder a hash over its files.

    Files over 256 MB count by name, size and modification time: hashing them would take longer than loading them.
    """
    folder = Path(source)
    if folder.is_dir():
        digest = sha256()
        for path in sorted(folder.glob("*")):
            if path.suffix in (".json", ".safetensors", ".jinja", ".txt"):
                state = path.stat()
                large = state.st_size > 256 * 2**20
                content = f"{state.st_size} {state.st_mtime_ns}".encode() if large else path.read_bytes()
                digest.update(path.name.encode() + b"\0" + content + b"\0")
        return f"files-sha256:{digest.hexdigest()}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_state() -> dict[str, object]:
    """Commit, branch and dirty flag of the code that runs; a job's snapshot carries them in snapshot.json."""
    snapshot = ROOT / "snapshot.json"
    if snapshot.is_file():
        recorded = json.loads(snapshot.read_text())
        return {key: recorded.get(key) for key in ("git_commit", "git_branch", "git_dirty")}
    status = _git("status", "--porcelain", "--untracked-files=no")
    untracked = _git("status", "--porcelain", "--", "experiments", "fast_dllm", "tasks")  # what an evaluation may read
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "git_dirty": None if status is None else bool(status or untracked),
    }


def environment() -> dict[str, object]:
    """Host, job and package versions."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "host": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "packages": versions,
    }


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Score:
    """One task's or group's accuracy: a fraction, its standard error, the metric's name and the questions scored."""

    accuracy: float
    stderr: float | None
    metric: str
    num_samples: int


def score(results: Mapping[str, Mapping], name: str, num_samples: int) -> Score | None:
    """The primary metric of `name` in lm_eval's results or groups; None where it reports no number."""
    reported = {key: value for key, value in results[name].items() if "," in key and not isinstance(value, str)}
    described = task_of(name)
    preferred = [described.metric] if described else []
    numbers = [key for key in reported if "_stderr," not in key]
    for metric in (*preferred, *FALLBACK_METRICS, *numbers):
        if metric in reported:
            stderr = results[name].get(metric.replace(",", "_stderr,", 1))
            return Score(
                float(reported[metric]),
                None if isinstance(stderr, (str, type(None))) else float(stderr),
                metric,
                num_samples,
            )
    return None


def scores(lm_eval_results: Mapping, samples_scored: Mapping[str, int]) -> dict[str, Score]:
    """Scores of every task and group. `samples_scored`: task name -> number of questions that have a metric."""
    subtasks = lm_eval_results.get("group_subtasks", {})

    def leaves(name: str) -> set[str]:
        return set().union(*(leaves(child) for child in subtasks[name])) if subtasks.get(name) else {name}

    found = {}
    for table in ("results", "groups"):
        for name in lm_eval_results.get(table, {}):
            count = sum(samples_scored.get(leaf, 0) for leaf in leaves(name))
            value = score(lm_eval_results[table], name, count)
            if value is not None:
                found[name] = value
    return found


def throughput(
    cost: Mapping[str, float], wall_seconds: float | None = None, batch_sizes: Mapping[int, int] | None = None
) -> dict[str, object]:
    """The cost of a run as the summary tells it: generation, scoring, or both.

    Seconds are GPU-seconds: summed over the processes and jobs that answered, each on a GPU of its own, and so
    `tokens_per_second` is of one GPU. `wall_seconds` is what passed from the first batch's start to the last one's end,
    with all waits between jobs, and `tokens_per_wall_second` is of whatever ran side by side meanwhile.
    `answers_by_batch_size` tells how many answers were given in batches of which size.

    `cost` counts requests, new_tokens, truncated_prompts, seconds_generating, scored_requests, scored_tokens,
    seconds_scoring (all without loading the model), and by kind of forward (decoding.FORWARD_KINDS, "score" for
    one that scores) forwards.<kind>, layer_forwards.<kind> and row_layer_forwards.<kind>.
    """
    by_kind: dict[str, dict[str, float]] = {"forwards": {}, "layer_forwards": {}, "row_layer_forwards": {}}
    for name, count in cost.items():
        what, dot, kind = name.partition(".")
        if dot and count:
            by_kind[what][kind] = count
    forwards = by_kind["forwards"]
    report: dict[str, object] = {name: counts for name, counts in by_kind.items() if counts or name == "forwards"}
    if cost.get("requests"):
        run = sum(
            count for kind, count in forwards.items() if kind in FORWARD_KINDS and FORWARD_KINDS[kind].runs_layers
        )
        steps = sum(forwards.get(kind, 0) for kind in STEP_KINDS)
        new_tokens, seconds = cost["new_tokens"], cost["seconds_generating"]
        report |= {
            "requests": cost["requests"],
            "seconds_generating": seconds,
            "new_tokens": new_tokens,
            "tokens_per_second": _ratio(new_tokens, seconds),
            "tokens_per_forward": _ratio(new_tokens, run),
            "tokens_per_step": _ratio(new_tokens, steps),
            "truncated_prompts": cost.get("truncated_prompts", 0),
        }
    if cost.get("scored_requests"):
        requests, tokens, seconds = (cost[name] for name in ("scored_requests", "scored_tokens", "seconds_scoring"))
        report |= {
            "scored_requests": requests,
            "seconds_scoring": seconds,
            "requests_per_second": _ratio(requests, seconds),
            "scored_tokens": tokens,
            "scored_tokens_per_second": _ratio(tokens, seconds),
        }
    if wall_seconds is not None:
        report["wall_seconds"] = wall_seconds
        if cost.get("new_tokens"):
            report["tokens_per_wall_second"] = _ratio(cost["new_tokens"], wall_seconds)
    if batch_sizes:
        report["answers_by_batch_size"] = {str(size): count for size, count in sorted(batch_sizes.items())}
    return report


def speed_line(cost: Mapping[str, float]) -> str:
    """Answers, tokens and forwards of a process's own work, for a person who watches."""
    seconds = cost["seconds_generating"]
    kinds = [f"{name.split('.')[1]} {count}" for name, count in cost.items() if name.startswith("forwards.") and count]
    return (
        f"{cost['requests']} answers, {cost['new_tokens']} new tokens in {seconds:.1f} s: "
        f"{cost['new_tokens'] / seconds:.1f} tokens/s; forwards: {', '.join(kinds)}"
    )


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per else None


def summarize(
    *,
    tasks: list[str],
    config: str,
    experiment: str,
    limit: float | None,
    found: Mapping[str, Score],
    num_samples: int,
    num_samples_expected: int,
    cost: Mapping[str, float],
    code_hashes: Mapping[str, str],
    model_args: Mapping[str, object],
    details: Mapping[str, object],
    wall_seconds: float | None = None,
    batch_sizes: Mapping[int, int] | None = None,
) -> dict[str, object]:
    """The content of summary.json. Top-level scalars come first, one a line, for people and grep."""
    whole = found.get(tasks[0]) if len(tasks) == 1 else None
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment,
        "task": ",".join(tasks),
        "config": config,
        "limit": limit,
        "num_samples": num_samples,
        "num_samples_expected": num_samples_expected,
        "accuracy": whole.accuracy if whole else None,
        "accuracy_stderr": whole.stderr if whole else None,
        "metric": whole.metric if whole else None,
        **code_hashes,
        "model_args": dict(model_args),
        "subtasks": {
            name: {
                "accuracy": value.accuracy,
                "accuracy_stderr": value.stderr,
                "metric": value.metric,
                "num_samples": value.num_samples,
            }
            for name, value in found.items()
            if [name] != tasks
        },
        "throughput": throughput(cost, wall_seconds, batch_sizes),
        **details,
    }
