"""What runs without a venv needs only the standard library of Python 3.8."""

from __future__ import annotations

import ast
import sys

import pytest
from golden_models import ROOT

PACKAGE = ROOT / "fast_dllm"
MODULES = sorted(path for room in ("spec", "record", "runner") for path in (PACKAGE / room).glob("*.py"))
MODULES += [PACKAGE / "decoding.py", PACKAGE / "errors.py"]
MODULES.remove(ROOT / "fast_dllm" / "runner" / "requirements.py")  # a new venv's own Python runs it
# Of the library after 3.8, what is easily taken for granted.
TOO_NEW = ("removeprefix", "removesuffix", "readlink", "is_relative_to", "pairwise", "tomllib")

OURS = tuple(f"fast_dllm.{name}" for name in ("errors", "decoding", "spec", "record", "runner"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_is_python_3_8_and_imports_the_standard_library_alone(path):
    text = path.read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    lazily = path.parent.name not in ("spec", "runner")  # provenance.py asks the hub for what a venv has
    for node in ast.walk(tree):
        if lazily and node not in tree.body:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            ours = name.startswith(OURS)
            assert ours or name.split(".")[0] in sys.stdlib_module_names, name
        if isinstance(node, ast.Call):
            assert all(keyword.arg != "strict" for keyword in node.keywords)
        if isinstance(node, ast.Attribute):
            is_os = isinstance(node.value, ast.Name) and node.value.id == "os"  # os.readlink is old, Path.readlink not
            assert is_os or node.attr not in TOO_NEW
    assert "from __future__ import annotations" in text or path.name in ("__init__.py", "__main__.py", "errors.py")
