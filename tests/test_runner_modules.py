"""fast_dllm/spec and runner need only the standard library of Python 3.8, and the scripts stay thin."""

from __future__ import annotations

import ast
import sys

import pytest
from golden_models import ROOT

MODULES = sorted(path for room in ("spec", "runner") for path in (ROOT / "fast_dllm" / room).glob("*.py"))
SCRIPTS = sorted((ROOT / "sbatch").glob("*.sh"))
# Of the library after 3.8, what is easily taken for granted.
TOO_NEW = ("removeprefix", "removesuffix", "readlink", "is_relative_to", "pairwise", "tomllib")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_is_python_3_8_and_imports_the_standard_library_alone(path):
    text = path.read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            own = name == "fast_dllm.errors" or name.startswith(
                ("fast_dllm.spec", "fast_dllm.record", "fast_dllm.runner")
            )
            assert own or name.split(".")[0] in sys.stdlib_module_names, name
        if isinstance(node, ast.Call):
            assert all(keyword.arg != "strict" for keyword in node.keywords)
        if isinstance(node, ast.Attribute):
            assert node.attr not in TOO_NEW
    assert "from __future__ import annotations" in text or path.name in ("__init__.py", "__main__.py")


def test_the_scripts_are_thin():
    lines = {path.name: len(path.read_text().splitlines()) for path in SCRIPTS}
    assert sum(lines.values()) < 1000
    assert max(lines.values()) <= 150, lines


def test_modules_and_functions_have_a_readable_size():
    for path in MODULES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path.name, node.name)
