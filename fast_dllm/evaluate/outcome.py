"""Makes the summary of a finished evaluation, writes its files, and refuses to overwrite another run's result."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import handle_non_serializable

from fast_dllm.errors import UsageError
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.evaluate.sandbox import sandbox_in_use
from fast_dllm.record import provenance, questions, traces
from fast_dllm.record.answers import Ledger
from fast_dllm.record.cost import Cost
from fast_dllm.record.scores import scores
from fast_dllm.record.summary import AS_THE_SCRIPTS_RUN, SUMMARY_FILE, Summary, SummaryError, read_summary
from fast_dllm.record.throughput import throughput
from fast_dllm.spec.files import write_json, write_whole
from fast_dllm.spec.matrix import GENERATION_FILE

logger = logging.getLogger(__name__)

CHANGE_NO_ANSWER = ("show_speed", "batch_size", "device", "graphs")  # model arguments


def settings_of(config: EvaluatorConfig, lm: FastDLLM) -> dict[str, Any]:
    """All settings that can change an answer or a score of a run. The keys are field names of Summary."""
    limit = config.limit
    if limit is not None and limit == int(limit):
        limit = int(limit)
    settings = {
        "experiment": lm.arguments.experiment_name or "active",
        "task": ",".join(task_names(config)),
        "limit": limit,
        "model_args": lm.arguments.as_dict(),
        "num_fewshot": config.num_fewshot,
        "chat_template": bool(config.apply_chat_template),
        "fewshot_as_multiturn": bool(config.fewshot_as_multiturn),
        "system_instruction": config.system_instruction or None,
        "gen_kwargs": config.gen_kwargs or None,
        "samples": config.samples or None,
        "seeds": config.seed,
        "model_revision": lm.model_revision,
        "generation_code_sha256": lm.experiment.policy_sha256,
    }
    assert settings.keys() >= AS_THE_SCRIPTS_RUN.keys()
    return settings


def task_names(config: EvaluatorConfig) -> list[str]:
    """The names of the tasks. For a task that was named by the path of a YAML file, it is the name in the file."""
    names = []
    for task in config.tasks:
        if isinstance(task, dict):
            task = task["task"] if isinstance(task.get("task"), str) else task.get("group")
        names.append(str(task))
    return names


def summary_of(
    name: str,
    results: dict[str, Any],
    samples: dict[str, list[dict]],
    config: EvaluatorConfig,
    lm: FastDLLM,
    total: Ledger,
    began: float,
    loaded: float,
) -> Summary:
    """The Summary of a finished run.

    name: of the configuration. results, samples: from lm_eval. total: the answers and costs of all processes. began,
    loaded: the Unix times when the program started and when the model was loaded.
    """
    samples_scored = {task: len({sample["doc_id"] for sample in rows}) for task, rows in samples.items()}
    expected = sum(int(count["effective"]) for task, count in results["n-samples"].items() if task in samples_scored)
    settings = settings_of(config, lm)
    by_name = scores(results, samples_scored)
    task_score = by_name.pop(settings["task"], None)  # None for several tasks at once: they have no accuracy together
    return Summary(
        config=name,
        num_samples=sum(samples_scored.values()),
        num_samples_expected=expected,
        accuracy=task_score.accuracy if task_score else None,
        accuracy_stderr=task_score.stderr if task_score else None,
        metric=task_score.metric if task_score else None,
        subtasks=by_name,
        throughput=throughput(total.cost, total.wall_seconds, total.batch_sizes),
        num_processes=lm.world_size,
        num_shares=total.num_shards,
        num_segments=total.num_segments,
        num_layers=lm.model.config.num_hidden_layers,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        seconds_loading=loaded - began,
        start_time=provenance.timestamp(began),
        end_time=provenance.timestamp(time.time()),
        **settings | lm.code_hashes(scored=bool(total.cost.scored_requests)),
        **lm.device_report(),
        **provenance.code_state(),
        **provenance.environment(),
        sandbox=sandbox_in_use(),
    )


def write_results(
    folder: Path,
    results: dict[str, Any],
    samples: dict[str, list[dict]],
    summary: Summary,
    policy: bytes,
    log_samples: bool,
    costs: Mapping[tuple[str, int], Cost],
) -> None:
    """Write results.json, the policy's text and, with `log_samples`, the samples. summary.json is written last, because
    it marks the run as complete. costs: (task, number of the question) -> the cost of its answer."""
    results["samples_sha256"] = questions.write(folder, *questions.collect(samples, results, costs))
    write_json(folder / "results.json", results, default=handle_non_serializable)
    write_whole(folder / GENERATION_FILE, policy)
    if log_samples:
        for task, rows in samples.items():
            lines = (json.dumps(row, default=handle_non_serializable, ensure_ascii=False) for row in rows)
            write_whole(folder / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    summary.write(folder)


def write_traces(folder: Path, name: str, summary: Summary, lm: FastDLLM) -> None:
    """Write the traces file of a finished run. Without traces, remove the file of an earlier run."""
    store = lm.answers.store
    assert store is not None, "a run with a folder keeps its answers there"
    header = {
        "config": name,
        **{key: getattr(summary, key) for key in ("experiment", "task", "limit", "model_args", "num_layers")},
        **lm.code_hashes(scored=False),
        "block_size": lm.loaded.block_size,
        "mask_id": lm.loaded.ids.mask,
        "stop_token": lm.loaded.ids.stop,
    }
    counts = traces.finish(store, folder, header)
    if counts and counts["num_traces"] < counts["num_answers"]:
        logger.warning(
            "%d of %d answers have a trace; the others were given without --traces",
            counts["num_traces"],
            counts["num_answers"],
        )


def check_no_other_result(folder: Path, config: EvaluatorConfig, lm: FastDLLM) -> None:
    """Raises UsageError if `folder` has the result of a run with other settings, which this run would overwrite."""
    try:
        summary = read_summary(folder / SUMMARY_FILE)
    except SummaryError as error:
        raise UsageError(
            f"--output_path: {str(folder)!r} holds a summary.json that cannot be read ({error}); name another folder "
            "or move it"
        ) from None
    if summary is None:
        return
    settings = settings_of(config, lm)
    del settings["experiment"]  # the model arguments name it
    changed = summary.other_identity(settings, CHANGE_NO_ANSWER)
    if changed:
        raise UsageError(
            f"--output_path: {str(folder)!r} holds a result of another run ({', '.join(changed)}); name another folder "
            "or move it"
        )
