"""tasks/tasks.json: each task described once, and what reads it."""

from __future__ import annotations

import ast
import json
import shutil

import pytest
from golden_models import ROOT

from fast_dllm.errors import UsageError
from fast_dllm.prompts import rewrite_prompt
from fast_dllm.runner import code_hashes, tasks


def test_lists_and_their_order():
    assert list(tasks.benchmarks()) == [
        "gsm8k", "mmlu", "gpqa_main_n_shot", "minerva_math", "ifeval",
        "toy_math", "toy_math_wide", "toy_math_held_out", "toy_choice",
    ]  # fmt: skip
    assert tasks.baseline_tasks() == ["mmlu", "gpqa_main_n_shot", "gsm8k", "minerva_math", "ifeval"]
    assert list(tasks.benchmarks(code=True)) == ["humaneval", "humaneval_instruct", "mbpp"]


def test_subtasks_and_variants_are_described_by_their_family():
    for name, described in {
        "mmlu_law": "mmlu", "gpqa_diamond_zeroshot": "gpqa_main_n_shot", "toy_choice_working": "toy_choice",
        "minerva_math_algebra": "minerva_math", "gsm8k_cot": "gsm8k",
    }.items():  # fmt: skip
        assert tasks.task_of(name).name == described
    assert tasks.task_of("unheard_of") is None
    assert tasks.task_of(None) is None
    assert rewrite_prompt("x\nSolution:", "minerva_math_algebra").endswith(r"within \boxed{{}}.")
    assert rewrite_prompt("x\nAnswer:", "mmlu_law") == "x\nAnswer:"


@pytest.mark.parametrize(
    ("name", "limit", "size"),
    [("gsm8k", None, 1319), ("gsm8k", 10, 10), ("gsm8k", 2000, 1319), ("mmlu", None, 14042), ("mmlu", 2, None),
     ("gpqa_main_n_shot", 2, 2), ("humaneval", None, None)],
)  # fmt: skip
def test_how_many_questions_a_run_has(name, limit, size):
    assert tasks.TASKS[name].size(limit) == size


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"instructions": {}, "tasks": {"a": {"metrik": "x"}}}'])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tasks.json").write_text(text)
    with pytest.raises(UsageError, match=r"^tasks/tasks\.json cannot be used: [^\n]+$"):
        tasks.read_tasks(tmp_path)


# -- which code a result is of -----------------------------------------------------------------------------------------
@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "fast_dllm", tmp_path / "fast_dllm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tasks").mkdir()
    shutil.copy(ROOT / "tasks" / "tasks.json", tmp_path / "tasks")
    return tmp_path


@pytest.mark.parametrize("name", ["model.py", "sampling.py", "layer_reuse.py", "prompts.py", "tokenizer.py"])
def test_what_can_change_a_token_changes_the_decoding_hash(copy, name):
    before = code_hashes.decoding_sha256(copy)
    with (copy / "fast_dllm" / name).open("a") as file:
        file.write("\n")
    assert code_hashes.decoding_sha256(copy) != before


def test_the_hash_is_over_every_module_that_decoding_imports():
    """A file that is split off one of them belongs to them, and nobody has to remember it."""
    folder, seen, waiting = ROOT / "fast_dllm", set(), ["engine", "tokenizer", "prompts"]
    while waiting:
        name = waiting.pop()
        if name not in seen and (folder / f"{name}.py").is_file():
            seen.add(name)
            for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fast_dllm."):
                    waiting.append(node.module.split(".")[1])
    assert {f"{name}.py" for name in seen - {"errors"}} == set(code_hashes.DECODING_FILES)


def test_what_cannot_does_not(copy):
    before = code_hashes.decoding_sha256(copy), code_hashes.decoding_sha256(copy, scored=True)
    for name in ("doctor.py", "chat.py", "results.py", "answers.py"):
        (copy / "fast_dllm" / name).write_text("edited")
    assert (code_hashes.decoding_sha256(copy), code_hashes.decoding_sha256(copy, scored=True)) == before
    (copy / "fast_dllm" / "scoring.py").write_text("edited")
    assert code_hashes.decoding_sha256(copy) == before[0]
    assert code_hashes.decoding_sha256(copy, scored=True) != before[1]


def test_a_rewrite_of_prompts_counts_and_a_size_does_not(copy):
    file, before = copy / "tasks" / "tasks.json", code_hashes.decoding_sha256(copy)
    content = json.loads(file.read_text())
    content["tasks"]["gsm8k"]["questions"] = 7
    file.write_text(json.dumps(content))
    assert code_hashes.decoding_sha256(copy) == before
    content["instructions"]["boxed"] += "!"
    file.write_text(json.dumps(content))
    assert code_hashes.decoding_sha256(copy) != before


def test_the_record_of_replays(tmp_path):
    assert code_hashes.replays(tmp_path) == {}
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "replays.json"
    file.write_text('{"schema_version": 1, "replayed": {"abc": ["00_baseline", "01_other"]}}')
    assert code_hashes.replays(tmp_path) == {"abc": ("00_baseline", "01_other")}
    for text in ("", "[]", '{"schema_version": 2, "replayed": {}}', '{"schema_version": 1}'):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"^experiments/replays\.json cannot be used"):
            code_hashes.replays(tmp_path)
