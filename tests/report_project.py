"""Made-up results for the report's tests: a project with summaries of both forms, written as real runs write them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fast_dllm.record import questions
from fast_dllm.record.cost import Cost
from fast_dllm.record.summary import parse_summary
from fast_dllm.record.throughput import throughput
from fast_dllm.spec.files import write_json
from fast_dllm.spec.hashes import file_sha256
from fast_dllm.spec.tasks import task_folder

CODE = "def generate(): ...\n"
NUM_LAYERS = 36
FULL = {"prefill": 100, "full": 700, "sub": 50, "commit": 150}
SUBSETS = ("first", "middle", "last")
NINE = [f"k{k}_{subset}" for k in (1, 2, 3) for subset in SUBSETS]


def sample(task: str, doc_id: int, answer: str, correct: float, metric: str = "exact_match") -> dict:
    return {
        "doc_id": doc_id,
        "doc": {"question": f"{task} question {doc_id}"},
        "target": str(doc_id),
        "arguments": [[f"What is {task} {doc_id}?", {}]],
        "resps": [[answer]],
        "filtered_resps": [answer],
        "filter": "flexible-extract",
        "metrics": [metric],
        "doc_hash": f"{task}-{doc_id}",
        "prompt_hash": f"prompt-{task}-{doc_id}",
        "target_hash": str(doc_id),
        metric: correct,
    }


def answers(num_questions: int, wrong: Sequence[int] = (), tag: str = "") -> list[tuple[str, int]]:
    """(answer, right) of each question; those in `wrong` are wrong."""
    return [
        (f"It is {i}." if i not in wrong else f"It is not {i}{tag}.", int(i not in wrong)) for i in range(num_questions)
    ]


class Project:
    """A folder with experiments/ and results/, and ways to put runs into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.experiment("00_baseline")

    def experiment(self, name: str, code: str = CODE, matrix: Mapping | None = None) -> None:
        folder = self.root / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "generation_functions.py").write_text(code)
        if matrix:
            control = {"control": True} if name == "04_threshold" else {}
            (folder / "matrix.json").write_text(json.dumps({**matrix, **control}))

    def folder(
        self, config: str, experiment: str = "00_baseline", task: str = "toy_math", base: str = "results"
    ) -> Path:
        return self.root / base / experiment / task / config

    def run(
        self,
        config: str,
        given: Sequence[tuple[str, float]],
        *,
        experiment: str = "00_baseline",
        task: str = "toy_math",
        limit: int | None = None,
        arguments: Mapping[str, object] | None = None,
        forwards: Mapping[str, int] | None = None,
        guesses: Mapping[str, int] = MappingProxyType({}),
        seconds: float = 10.0,
        new_tokens: int = 5000,
        changes: Mapping[str, object] | None = None,
        strata: Mapping[str, Sequence[tuple[str, float]]] | None = None,
        scored: bool = False,
        with_questions: bool = True,
        costs: Mapping[tuple[str, int], Cost] = MappingProxyType({}),
    ) -> Path:
        """One complete run; `given` is its questions' (answer, right), `costs` what they cost. Returns the folder.

        guesses: numbers by their names in a Cost's JSON, as "guesses_offered.step".
        """
        folder = self.folder(config, experiment, task_folder(task, limit))
        name = config.split("+")[0]
        made = {"model_path": "tiny", "reuse_k": 1, "layer_subset": None, "threshold": 0.9, "batch_size": 1}
        made |= {"refresh": "block", "small_block_size": 8, "use_block_cache": True, "experiment_name": experiment}
        if name[:1] == "k" and name[1:2].isdigit():
            made |= {"reuse_k": int(name[1]), "layer_subset": name[3:]}
        made |= dict(arguments or {})
        reused = {"reused": 200} if made["reuse_k"] > 1 else {}
        parts = strata or {task: given}
        samples = {part: [sample(part, i, a, c) for i, (a, c) in enumerate(rows)] for part, rows in parts.items()}
        metric = "exact_match,flexible-extract"
        means = {part: sum(c for _, c in rows) / len(rows) for part, rows in parts.items()}
        total = sum(len(rows) for rows in parts.values())
        accuracy = sum(means[part] * len(rows) for part, rows in parts.items()) / total
        found = {
            "results": {part: {metric: value} for part, value in means.items()} | {task: {metric: accuracy}},
            "versions": dict.fromkeys(parts, 3.0),
        }
        if strata:
            found |= {"groups": {task: {metric: accuracy}}, "group_subtasks": {task: list(parts)}}
        folder.mkdir(parents=True, exist_ok=True)
        if with_questions:
            found["samples_sha256"] = questions.write(folder, *questions.collect(samples, found, costs))
        write_json(folder / "results.json", found)
        cost = {"scored_requests": total, "scored_tokens": total, "seconds_scoring": seconds, "forwards.score": total}
        if not scored:
            kinds = FULL if forwards is None else forwards
            cost = {"requests": total, "new_tokens": new_tokens, "seconds_generating": seconds}
            for kind, count in ({**reused, **kinds}).items():
                depth = {"reused": 0, "partial": 24}.get(kind, NUM_LAYERS)
                cost |= {f"forwards.{kind}": count, f"layer_forwards.{kind}": count * depth}
                cost[f"row_layer_forwards.{kind}"] = count * depth * 32
            cost |= guesses
        code = self.root / "experiments" / experiment / "generation_functions.py"
        content = {
            "schema_version": 1,
            "experiment": experiment,
            "task": task,
            "config": config,
            "limit": limit,
            "num_samples": total,
            "num_samples_expected": total,
            "accuracy": accuracy,
            "accuracy_stderr": 0.01,
            "metric": metric,
            "generation_code_sha256": file_sha256(code),
            "model_args": made,
            "throughput": throughput(Cost.from_json(cost)).as_json(),
            "num_fewshot": 0, "chat_template": True, "seeds": [0, 1234, 1234, 1234], "num_processes": 1,
            "num_segments": 1, "num_layers": NUM_LAYERS,
            "model_revision": "files-sha256:1", "dtype": "float32", "device": "cuda:0",
            "gpu": "Quadro RTX 6000", "git_commit": "a" * 40, "git_dirty": False, "host": "node1",
            "python": "3.11.7", "packages": {"torch": "2.13.0", "lm_eval": "0.4.13"},
            "end_time": "2026-03-01T10:00:00+00:00",
            **(changes or {}),
        }  # fmt: skip
        parse_summary(content).write(folder)
        return folder

    def nine(self, num_questions: int = 300, lost: Sequence[int] = (10, 12, 40), **given) -> None:
        """A clean matrix: columns alike, k = 2 and 3 a little worse and with fewer forwards."""
        if given:
            self._write_nine(num_questions, lost, **given)
        else:
            shutil.copytree(clean_matrix(num_questions, tuple(lost)), self.root / "results", dirs_exist_ok=True)

    def _write_nine(self, num_questions: int, lost: Sequence[int], **given) -> None:
        for k in (1, 2, 3):
            rows = answers(num_questions, wrong=range(lost[k - 1]))
            for subset in SUBSETS:
                fewer = {kind: count // k if kind == "full" else count for kind, count in FULL.items()}
                seconds = 10.0 / (1 + 0.2 * (k - 1))
                self.run(f"k{k}_{subset}", rows, **({"forwards": fewer, "seconds": seconds} | given))


@functools.cache
def clean_matrix(num_questions: int, lost: tuple[int, ...]) -> Path:
    """The results/ folder of a clean matrix, written once."""
    folder = Path(tempfile.mkdtemp(prefix="clean_matrix_"))
    atexit.register(shutil.rmtree, folder)
    Project(folder)._write_nine(num_questions, lost)
    return folder / "results"


def earlier(
    folder: Path,
    config: str,
    accuracy: float,
    *,
    tokens: int | None = 4000,
    seconds: float = 80.0,
    limit: float | None = 100.0,
    task: str = "gsm8k",
    commit: str = "c0ffee" * 6,
    time: str = "20260120_120000",
    **changes: object,
) -> None:
    """A summary.json of the lab's first runner, in its form (made up)."""
    cost = (
        {"tokens_generated": tokens, "total_time_s": seconds, "tokens_per_s": round(tokens / seconds, 2)}
        if tokens
        else {}
    )
    content = {
        "task": task,
        "config": config,
        "timestamp": time,
        "accuracy": accuracy,
        "throughput": cost,
        "gpu_info": {"gpu_available": True, "gpu_name": "Quadro RTX 6000", "gpu_total_vram_gb": 23.46},
        "git": {"commit": commit, "branch": "main", "dirty": True},
        "environment": {"python_version": "3.12.3", "torch_version": "2.9.1", "hostname": "node2"},
        "model_args": {
            "model_path": "Efficient-Large-Model/Fast_dLLM_v2_7B", "reuse_k": int(config[1]),
            "layer_subset": config[3:], "use_block_cache": True, "show_speed": True,
        },
        "eval_params": {"num_fewshot": 0, "batch_size": "1", "limit": limit},
    } | changes  # fmt: skip
    path = folder / config / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
