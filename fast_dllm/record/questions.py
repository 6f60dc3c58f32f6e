"""What each question of a run got: whether it was right, and a hash of the answer. Stands alone: no torch, no lm_eval.

    questions.json.gz    small; beside summary.json, and copied to artifacts/: correctness, hashes, subtasks
    texts.jsonl.gz       the answers themselves, one question a line; only under results/

The comparison of two runs is a comparison of the same questions, so the first file is kept as long as the summary is.
results.json carries the SHA-256 of both, summary.json that of results.json, of questions.json.gz and one over itself: a
number that is corrected by hand is seen.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fast_dllm.decoding import STEP_KINDS
from fast_dllm.errors import line_of
from fast_dllm.record.cost import Cost
from fast_dllm.record.scores import score
from fast_dllm.record.summary import QUESTIONS_FILE
from fast_dllm.spec.files import parse_json, printable, write_whole

SCHEMA_VERSION = 1
TEXTS_FILE = "texts.jsonl.gz"
MOST_QUESTIONS_BYTES = 64 * 2**20  # inflated; MMLU's 14,042 questions take about 0.6 MB
MOST_LINE_BYTES, MOST_TEXTS_BYTES = 16 * 2**20, 2**30
MOST_ANSWER_HASH = 100  # characters
MOST_METRIC = 1e15  # a metric is a number of any size, most often 0 or 1
COST_COLUMNS = ("new_tokens", "layers", "step_layers")
HASH_DIGITS = 12  # 48 bits: two different answers to one question look equal once in 3e14


@dataclass(frozen=True)
class Question:
    """One question of one run.

    key: what tells it from others (a hash of document and target); answer: a hash of the answer's text, or for a
    scored task the chosen option's number as "#2"; correct: the primary metric's value, 0 to 1. new_tokens: of the
    answer; layers, step_layers: layers that its forwards ran, all of them and those of denoising steps; None where they
    were not recorded.
    """

    task: str
    doc_id: int
    key: str
    answer: str
    correct: float
    new_tokens: float | None = None
    layers: float | None = None
    step_layers: float | None = None


class QuestionsError(ValueError):
    """A questions file that cannot be read, or does not hold what it should; one line."""


def short_hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _answer(sample: Mapping) -> tuple[str, str]:
    """(hash of the answer, or #index of the chosen option; its text) of one of lm_eval's samples."""
    responses = sample["resps"]
    first = responses[0][0] if responses and responses[0] else None
    if isinstance(first, (list, tuple)):  # (log-likelihood, is greedy) of each option
        scores = [option[0][0] for option in responses]
        best = max(range(len(scores)), key=scores.__getitem__)
        return f"#{best}", " ".join(f"{value:.4f}" for value in scores)
    # With several processes, lm_eval repeats the last question where a process has fewer, so it has two equal answers.
    text = "\n".join(str(value) for response in responses for value in dict.fromkeys(response))
    return short_hash(text), text


def _weighting(results: Mapping, group: str, metric: str, sizes: Mapping[str, int]) -> str:
    """How lm_eval made the group's number out of its subtasks': "size", "equal" or "unknown"."""
    values = {task: results["results"].get(task, {}).get(metric) for task in sizes}
    group_value = results.get("groups", {}).get(group, {}).get(metric)
    if group_value is None or any(not isinstance(value, (int, float)) for value in values.values()):
        return "unknown"
    by_size = sum(values[task] * size for task, size in sizes.items()) / sum(sizes.values())
    equal = sum(values.values()) / len(values)
    for name, value in (("size", by_size), ("equal", equal)):
        if math.isclose(value, group_value, rel_tol=0, abs_tol=1e-9):
            return name
    return "unknown"


def _rows(rows: Iterable[Mapping], metric: str) -> list[Mapping]:
    """The samples of the metric's filter, by document, each once (processes may repeat the last)."""
    name, _, chosen = metric.partition(",")
    of_doc = {row["doc_id"]: row for row in rows if row.get("filter", chosen) == chosen and name in row}
    return [of_doc[doc_id] for doc_id in sorted(of_doc)]


def collect(
    samples: Mapping[str, Iterable[Mapping]],
    results: Mapping,
    costs: Mapping[tuple[str, int], Cost] = MappingProxyType({}),
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """(content of questions.json.gz, lines of texts.jsonl.gz).

    samples: task -> lm_eval's samples. results: lm_eval's results without them. costs: (task, number of the
    question) -> the cost of its answer; written for tasks for which all are known. A task whose primary
    metric gives no number for a single question is left out.
    """
    tasks: dict[str, dict[str, Any]] = {}
    texts: list[dict[str, object]] = []
    for task, rows in samples.items():
        value = score(results["results"], task, 0) if task in results["results"] else None
        if value is None:
            continue
        name = value.metric.partition(",")[0]
        scored_rows = [row for row in _rows(rows, value.metric) if isinstance(row[name], (bool, int, float))]
        if not scored_rows:
            continue
        answers = [_answer(row) for row in scored_rows]
        tasks[task] = {
            "metric": value.metric,
            "version": results.get("versions", {}).get(task),
            "prompts_sha256": sha256("".join(str(row.get("prompt_hash")) for row in scored_rows).encode()).hexdigest(),
            "doc_ids": [row["doc_id"] for row in scored_rows],
            "keys": "".join(short_hash(f"{row.get('doc_hash')} {row.get('target_hash')}") for row in scored_rows),
            "answers": [answer for answer, _ in answers],
            "correct": [_number(row[name]) for row in scored_rows],
        }
        known = [costs.get((task, row["doc_id"])) for row in scored_rows]
        if all(known):
            tasks[task] |= _cost_columns([cost for cost in known if cost])
        texts += [_text_line(task, row, name, text) for row, (_, text) in zip(scored_rows, answers, strict=True)]
    sizes = {task: len(content["doc_ids"]) for task, content in tasks.items()}
    content = {"schema_version": SCHEMA_VERSION, "groups": _groups(results, tasks, sizes), "tasks": tasks}
    return content, texts


def _cost_columns(costs: Iterable[Cost]) -> dict[str, list[float]]:
    """The columns COST_COLUMNS of a task's questions."""
    columns: dict[str, list[float]] = {name: [] for name in COST_COLUMNS}
    for cost in costs:
        layers = cost.layer_forwards
        columns["new_tokens"].append(_number(cost.new_tokens))
        columns["layers"].append(_number(sum(layers.values())))
        columns["step_layers"].append(_number(sum(count for kind, count in layers.items() if kind in STEP_KINDS)))
    return columns


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _groups(results: Mapping, tasks: Mapping, sizes: Mapping[str, int]) -> dict[str, str]:
    """Group name -> how its subtasks are weighted."""
    weights = {}
    for group in results.get("groups", {}):
        inside = {task: sizes[task] for task in _leaves(results.get("group_subtasks", {}), group) if task in sizes}
        if inside:
            weights[group] = _weighting(results, group, tasks[next(iter(inside))]["metric"], inside)
    return weights


def _leaves(subtasks: Mapping[str, list[str]], name: str) -> list[str]:
    children = subtasks.get(name)
    return [leaf for child in children for leaf in _leaves(subtasks, child)] if children else [name]


def _text_line(task: str, row: Mapping, metric: str, text: str) -> dict[str, object]:
    arguments = row.get("arguments") or [[""]]
    first = arguments[0] if isinstance(arguments, (list, tuple)) else next(iter(arguments.values()))
    prompt = first[0] if isinstance(first, (list, tuple)) else next(iter(first.values()))
    return {
        "task": task,
        "doc_id": row["doc_id"],
        "correct": _number(row[metric]),
        "prompt": str(prompt),
        "target": str(row.get("target")),
        "extracted": [str(value) for value in row["filtered_resps"]],
        "answer": text,
    }


def _compressed(text: str) -> bytes:
    """Equal content gives equal bytes: no time in the header."""
    return gzip.compress(text.encode(), 9, mtime=0)


def write(folder: Path, content: Mapping, texts: Iterable[Mapping]) -> dict[str, str]:
    """Write both files; returns file name -> SHA-256, for results.json."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in texts)
    files = {
        TEXTS_FILE: _compressed(lines),
        QUESTIONS_FILE: _compressed(json.dumps(content, separators=(",", ":"))),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
    return {name: sha256(data).hexdigest() for name, data in files.items()}


def _fault(path: Path, error: BaseException) -> QuestionsError:
    return QuestionsError(f"{path.name} cannot be read: {printable(line_of(error))}")


@dataclass(frozen=True)
class Questions:
    """A run's questions in the file's order, how groups weight their subtasks, and each task's version and prompts."""

    questions: tuple[Question, ...]
    groups: Mapping[str, str]
    versions: Mapping[str, object]
    prompts: Mapping[str, str]


def read(path: Path) -> Questions:
    """Raises QuestionsError where the file is not there, torn, of another form, or larger than MOST_QUESTIONS_BYTES."""
    try:
        with gzip.open(path) as file:
            data = file.read(MOST_QUESTIONS_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _fault(path, error) from None
    if len(data) > MOST_QUESTIONS_BYTES:
        raise QuestionsError(f"{path.name} cannot be read: it inflates to more than {MOST_QUESTIONS_BYTES} bytes")
    try:
        content = parse_json(data)
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']!r}, not {SCHEMA_VERSION}")
        questions: list[Question] = []
        for task, rows in content["tasks"].items():
            questions += _questions_of(task, rows)
        versions = {task: rows.get("version") for task, rows in content["tasks"].items()}
        prompts = {task: rows.get("prompts_sha256") for task, rows in content["tasks"].items()}
        groups = {group: str(weights) for group, weights in content["groups"].items()}
        return Questions(tuple(questions), groups, versions, prompts)
    except KeyError as error:
        raise QuestionsError(f"{path.name} is not a questions file: it has no {printable(str(error))}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise QuestionsError(f"{path.name} is not a questions file: {printable(line_of(error))}") from None


def _questions_of(task: str, rows: Mapping[str, Any]) -> list[Question]:
    """Raises KeyError, TypeError and ValueError."""
    keys, doc_ids, answers, correct = (rows[name] for name in ("keys", "doc_ids", "answers", "correct"))
    count = len(doc_ids)
    if not len(keys) == HASH_DIGITS * count == HASH_DIGITS * len(answers) == HASH_DIGITS * len(correct):
        raise ValueError(f"the columns of {task} have different lengths")
    costs = [rows[name] for name in COST_COLUMNS] if COST_COLUMNS[0] in rows else []
    if any(len(column) != count for column in costs):
        raise ValueError(f"the columns of {task} have different lengths")
    questions = []
    for row, (doc_id, answer, right) in enumerate(zip(doc_ids, answers, correct)):
        if not isinstance(doc_id, int) or not isinstance(answer, str) or len(answer) > MOST_ANSWER_HASH:
            raise ValueError(f"question {row} of {task} has no number or no hash of its answer")
        if not isinstance(right, (int, float)) or not -MOST_METRIC <= right <= MOST_METRIC:
            raise ValueError(f"question {row} of {task} has {right!r} as its metric")
        key = keys[row * HASH_DIGITS : (row + 1) * HASH_DIGITS]
        amounts = [column[row] for column in costs]
        if not all(isinstance(amount, (int, float)) and 0 <= amount <= MOST_METRIC for amount in amounts):
            raise ValueError(f"question {row} of {task} has {amounts!r} as its cost")
        questions.append(Question(task, doc_id, key, answer, float(right), *amounts))
    return questions


def read_texts(path: Path) -> dict[tuple[str, int], dict[str, object]]:
    """(task, doc_id) -> line of texts.jsonl.gz; empty where the file is not there. Raises QuestionsError."""
    texts: dict[tuple[str, int], dict[str, object]] = {}
    num_bytes = 0
    try:
        with gzip.open(path) as file:
            while line := file.readline(MOST_LINE_BYTES + 1):
                num_bytes += len(line)
                if len(line) > MOST_LINE_BYTES or num_bytes > MOST_TEXTS_BYTES:
                    raise ValueError("it is too large")
                text = parse_json(line)
                task, doc_id = text["task"], text["doc_id"]
                if not isinstance(task, str) or not isinstance(doc_id, int):
                    raise ValueError("a line names no question")
                texts[task, doc_id] = text
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, zlib.error) as error:
        raise _fault(path, error) from None
    except (KeyError, ValueError) as error:
        raise QuestionsError(f"{path.name} is not a texts file: {printable(line_of(error))}") from None
    return texts
