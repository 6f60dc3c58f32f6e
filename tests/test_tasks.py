"""tasks/tasks.json: each task described once, and what reads it."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess

import pytest
from golden_models import ROOT
from script_project import old_pythons

from fast_dllm.errors import UsageError
from fast_dllm.evaluate.prompts import rewrite_prompt
from fast_dllm.spec import hashes, tasks


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
     ("gpqa_main_n_shot", 2, 2), ("humaneval", None, 164)],
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


SOURCE = '''"""A module."""
LIMIT = 3  # rows


def function(value, scale=2.0):
    """What it returns."""
    return f"{value * scale:.{LIMIT}f} # no comment"
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value * scale", "value + scale"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("scale=2.0", "scale=3.0"),
        ("# no comment", "# another text"),
        ("    return", "    value = 1\n    return"),
    ],
    ids=["operator", "constant", "default", "text in a string", "statement"],
)
def test_a_change_of_code_changes_its_text(old, new):
    assert old in SOURCE
    assert hashes.code_text(SOURCE.replace(old, new)) != hashes.code_text(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # rows", ""),
        ("  # rows", "  # how many rows"),
        ('"""A module."""\n', ""),
        ("What it returns.", "Returns\n\n    a text."),
        ("\n\n\ndef", "\n\n# why\n\ndef"),
        ("(value, scale=2.0)", "(\n    value, scale = 2.0\n)"),
    ],
    ids=["no comment", "comment", "no docstring", "docstring", "lines", "layout"],
)
def test_comments_docstrings_and_layout_do_not(old, new):
    assert old in SOURCE
    assert hashes.code_text(SOURCE.replace(old, new)) == hashes.code_text(SOURCE)


@pytest.mark.parametrize("python", old_pythons())
def test_an_older_python_gives_the_same_hash(python):
    program = "from fast_dllm.spec.hashes import decoding_sha256; print(decoding_sha256('.', scored=True))"
    done = subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashes.decoding_sha256(ROOT, scored=True)


def test_what_can_change_a_token_changes_the_decoding_hash(copy):
    """In every file of it: a statement does, a comment does not."""
    before = hashes.decoding_sha256(copy)
    files = {name: copy / "fast_dllm" / name for name in hashes.DECODING_FILES}
    for path in files.values():
        path.write_text(path.read_text() + "\n# a comment\n")
    assert hashes.decoding_sha256(copy) == before
    for name, path in files.items():
        text = path.read_text()
        path.write_text(text + "\nx = 1\n")
        assert hashes.decoding_sha256(copy) != before, name
        path.write_text(text)


def test_the_hash_is_over_every_module_that_decoding_imports():
    """A file that is split off one of them belongs to them, and nobody has to remember it."""
    files, waiting = set(), ["decode.engine", "network.tokenizer", "evaluate.prompts"]
    while waiting:
        file = f"{waiting.pop().replace('.', '/')}.py"
        path = ROOT / "fast_dllm" / file
        if file in files or not path.is_file() or file.startswith("spec/"):
            continue
        files.add(file)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fast_dllm":
                package = node.module.partition(".")[2]
                waiting += [package, *(f"{package}.{alias.name}".strip(".") for alias in node.names)]
    only_refuse = {"errors.py", "network/memory.py"}
    assert files - only_refuse == set(hashes.DECODING_FILES)


def test_what_cannot_does_not(copy):
    before = hashes.decoding_sha256(copy), hashes.decoding_sha256(copy, scored=True)
    for name in ("doctor/__main__.py", "ui/chat.py", "record/summary.py", "record/answers.py"):
        assert (copy / "fast_dllm" / name).is_file()
        (copy / "fast_dllm" / name).write_text("edited = True")
    assert (hashes.decoding_sha256(copy), hashes.decoding_sha256(copy, scored=True)) == before
    (copy / "fast_dllm" / "evaluate" / "scoring.py").write_text("edited = True")
    assert hashes.decoding_sha256(copy) == before[0]
    assert hashes.decoding_sha256(copy, scored=True) != before[1]


def test_a_rewrite_of_prompts_counts_and_a_size_does_not(copy):
    file, before = copy / "tasks" / "tasks.json", hashes.decoding_sha256(copy)
    content = json.loads(file.read_text())
    content["tasks"]["gsm8k"]["questions"] = 7
    file.write_text(json.dumps(content))
    assert hashes.decoding_sha256(copy) == before
    content["instructions"]["boxed"] += "!"
    file.write_text(json.dumps(content))
    assert hashes.decoding_sha256(copy) != before


def test_the_record_of_replays(tmp_path):
    assert hashes.replays(tmp_path) == {}
    (tmp_path / "experiments").mkdir()
    file = tmp_path / "experiments" / "replays.json"
    file.write_text('{"schema_version": 1, "replayed": {"abc": ["00_baseline", "01_other"]}}')
    assert hashes.replays(tmp_path) == {"abc": ("00_baseline", "01_other")}
    for text in ("", "[]", '{"schema_version": 2, "replayed": {}}', '{"schema_version": 1}'):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"^experiments/replays\.json cannot be used"):
            hashes.replays(tmp_path)
