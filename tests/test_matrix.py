"""An experiment's configurations, its knobs, and the folder that a result is kept in."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest

from fast_dllm.errors import UsageError
from fast_dllm.spec import matrix
from fast_dllm.spec.defaults import DEFAULTS
from fast_dllm.spec.knobs import read_knobs

OPTIONS = """
class Options(decoding.Options):
    reuse_k: int = 1
    layer_subset: str | None = None
    tolerance: float = 0.2
    refresh: str = "block"
    warm: bool = False
    shift: int = -1
    no_default: int
    CONSTANT = 3
"""
SWEEP = {"compare_with": "t1.00", "configurations": {"t0.50": {"threshold": 0.5}, "t1.00": {"threshold": 1}}}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "experiments" / "09_mine"
    folder.mkdir(parents=True)
    (folder / "generation_functions.py").write_text(OPTIONS)
    return tmp_path


def write_matrix(root, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "experiments" / "09_mine" / "matrix.json").write_text(text)


def names_of(root, *, overrides):
    found = matrix.matrix_of("09_mine", root)
    return matrix.folder_name(found, overrides.pop("name"), overrides, matrix.defaults_of("09_mine", root))


def test_without_a_file_it_is_the_nine(root):
    found = matrix.matrix_of("09_mine", root)
    assert found.names == tuple(f"k{k}_{subset}" for k in (1, 2, 3) for subset in ("first", "middle", "last"))
    assert found.configurations["k2_middle"] == {"reuse_k": 2, "layer_subset": "middle"}
    assert found.compare_with == "k1_first"
    assert matrix.matrix_of(None, root) == found


def test_a_file_gives_names_arguments_and_order(root):
    write_matrix(root, SWEEP)
    found = matrix.matrix_of("09_mine", root)
    assert (found.names, found.compare_with) == (("t0.50", "t1.00"), "t1.00")
    assert found.configurations["t0.50"] == {"threshold": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "unexpected \\["),
        ('{"compare_with": "a", "configurations": {"a": {}, "a": {}}}', "the key a stands twice"),
        (SWEEP | {"schema": 1}, "the keys compare_with and configurations, not compare_with, configurations, schema"),
        ({"configurations": SWEEP["configurations"]}, "not configurations"),
        (SWEEP | {"compare_with": "t2"}, "compare_with must be one of t0.50, t1.00, not 't2'"),
        (SWEEP | {"configurations": {}}, "at least one configuration"),
        (SWEEP | {"configurations": {"a,b": {}}}, "'a,b' is no name"),
        (SWEEP | {"configurations": {"a+b": {}}}, "'a\\+b' is no name"),
        (SWEEP | {"configurations": {"..": {}}}, "'..' is no name"),
        (SWEEP | {"configurations": {"a": 1}}, "an object of model arguments, not 1"),
        (SWEEP | {"configurations": {"a": {"treshold": 1}}}, "unknown model argument 'treshold'; valid"),
        (SWEEP | {"configurations": {"a": {"threshold": 2}}}, "a: threshold must be a number from 0 to 1"),
        (SWEEP | {"control": "yes"}, "control must be true or false, not 'yes'"),
        (SWEEP | {"configurations": {"a": {"tolerance": "much"}}}, "tolerance must be a number, not 'much'"),
        (SWEEP | {"configurations": {"a": {"model_path": "tiny"}}}, "unknown model argument 'model_path'"),
    ],
)
def test_a_broken_matrix_is_one_line_that_names_the_file_and_the_fault(root, content, message):
    write_matrix(root, content)
    with pytest.raises(UsageError, match=message) as raised:
        matrix.matrix_of("09_mine", root)
    assert str(raised.value).startswith("experiments/09_mine/matrix.json: ")
    assert "\n" not in str(raised.value)


def knobs_of(path, text):
    path.write_text(text)
    return read_knobs(path)


def test_the_defaults_are_the_shared_ones_and_the_knobs(root):
    path = root / "experiments" / "09_mine" / "generation_functions.py"
    assert knobs_of(path, OPTIONS) == {
        "reuse_k": 1, "layer_subset": None, "tolerance": 0.2, "refresh": "block", "warm": False, "shift": -1,
    }  # fmt: skip
    assert read_knobs(root / "none.py") is None
    assert knobs_of(path, "def generate(): ...\n") is None
    assert matrix.defaults_of("09_mine", root) == dict(DEFAULTS)
    path.write_text("class Options(Options):\n    tolerance: float = 0.2\n")
    assert set(DEFAULTS) - set(matrix.defaults_of("09_mine", root)) == {"reuse_k", "layer_subset"}
    write_matrix(root, SWEEP)
    path.write_text("def (")
    with pytest.raises(UsageError, match=r"^experiments/09_mine/generation_functions\.py, line 1: this is not Python"):
        matrix.matrix_of("09_mine", root)
    path.write_text("\0")
    with pytest.raises(UsageError, match=r"^experiments/09_mine/generation_functions\.py"):
        matrix.matrix_of("09_mine", root)


def test_a_default_may_be_an_expression_as_python_itself_reads_it(tmp_path, monkeypatch):
    """What is read without running the file is what a run of it gives."""
    text = """
from __future__ import annotations
import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar
BAR = 0.75
SIZES = (1, 2)
STEPS: int = 2 * 3

@dataclass
class Options:
    MOST = 64
    KINDS: ClassVar[tuple] = ("a", "b")
    half: float = 1 / 2
    bar: float = BAR
    low: float = BAR - 0.25
    less: int = -(STEPS // 4 + 7 % 3)
    most: int = MOST
    again: int = most
    part: float = field(default=0.5)
    word: str = dataclasses.field(default="block")
    nothing: str | None = field(default=None)
"""
    module = types.ModuleType("options_of_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there for ClassVar
    exec(text, module.__dict__)
    expected = {each.name: each.default for each in dataclasses.fields(module.Options)}
    assert knobs_of(tmp_path / "generation_functions.py", text) == expected
    assert len(expected) == 9


@pytest.mark.parametrize(
    "default",
    [
        "2 + max(1, 2)", '("a", "b")', "OTHER", "1 / 0", '"a" * 3', "field(default_factory=list)",
        "10 ** 10 ** 10", "[1]", "True + 1", "CHANGED",
    ],
)  # fmt: skip
def test_a_default_that_cannot_be_read_is_one_line_that_says_where(root, default):
    path = root / "experiments" / "09_mine" / "generation_functions.py"
    path.write_text(f"CHANGED = 1\nCHANGED = max(1, 2)\nclass Options(Options):\n    knob: int = {default}\n")
    with pytest.raises(UsageError, match=r"09_mine/generation_functions\.py, line 4: the default of the knob knob"):
        matrix.defaults_of("09_mine", root)


@pytest.mark.parametrize(
    ("name", "arguments", "refused"),
    [
        ("plain", {"threshold": 0.9}, True),
        ("plain", {"tolerance": 0.5, "threshold": 1}, True),
        ("plain", {"threshold": 1}, False),
        ("k2_8-19", {"reuse_k": 3, "layer_subset": "8-19"}, True),
        ("k2_8-19", {"reuse_k": 2, "layer_subset": "8-19"}, False),
        ("plainer", {"threshold": 0.9}, False),
    ],
)
def test_a_built_in_name_keeps_its_meaning(root, name, arguments, refused):
    write_matrix(root, {"compare_with": name, "configurations": {name: arguments}})
    if refused:
        with pytest.raises(UsageError, match=f"the configuration '{name}' is built in .*; give yours another name"):
            matrix.matrix_of("09_mine", root)
    else:
        assert matrix.matrix_of("09_mine", root).names == (name,)


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ({"name": "k2_middle"}, "k2_middle"),
        ({"name": "k2_middle", "threshold": 0.9, "reuse_k": 2}, "k2_middle"),
        ({"name": "k2_middle", "threshold": 0.80}, "k2_middle+threshold=0.8"),
        ({"name": "k2_middle", "tolerance": 0.3, "bd_size": 16}, "k2_middle+bd_size=16+tolerance=0.3"),
        ({"name": "k2_middle", "tolerance": 1.0}, "k2_middle+tolerance=1"),
        ({"name": "k2_middle", "tolerance": 0.2}, "k2_middle"),
        ({"name": "k2_middle", "refresh": "rows"}, "k2_middle+refresh=rows"),
        ({"name": "k2_middle", "use_block_cache": False}, "k2_middle+use_block_cache=False"),
        ({"name": "k2_middle", "model_path": "x", "device": "cpu", "batch_size": 3, "show_speed": True}, "k2_middle"),
        ({"name": "plain"}, "plain"),
        ({"name": "plain", "threshold": 1.0}, "plain"),
        ({"name": "plain", "threshold": 0.9}, "plain+threshold=0.9"),
        ({"name": "k2_8-19", "threshold": 0.5}, "k2_8-19+threshold=0.5"),
        ({"name": "k2_middle", "tolerance": 1e20}, "k2_middle+tolerance=1e20"),
    ],
)
def test_the_folder_follows_what_ran(root, overrides, folder):
    assert names_of(root, overrides=overrides) == folder
    assert "," not in folder


def test_the_command_line_beats_the_matrix_which_beats_the_defaults(root):
    write_matrix(root, SWEEP)
    found, defaults = matrix.matrix_of("09_mine", root), matrix.defaults_of("09_mine", root)
    assert matrix.effective_arguments(found, "t0.50", {}, defaults)["threshold"] == 0.5
    assert matrix.effective_arguments(found, "t0.50", {"threshold": 0.7}, defaults)["threshold"] == 0.7
    assert matrix.effective_arguments(found, "t0.50", {}, defaults)["tolerance"] == 0.2
    assert matrix.folder_name(found, "t0.50", {"threshold": 0.9}, defaults) == "t0.50+threshold=0.9"


def test_beside_the_matrix_there_are_plain_and_ranges_of_layers(root):
    write_matrix(root, SWEEP)
    found, defaults = matrix.matrix_of("09_mine", root), matrix.defaults_of("09_mine", root)
    assert matrix.arguments_of(found, "plain", defaults) == {"reuse_k": 1, "layer_subset": None, "threshold": 1}
    assert matrix.arguments_of(found, "k2_8-19", defaults) == {"reuse_k": 2, "layer_subset": "8-19"}
    for name in ("k2_19-8", "k0_1-2", "k2_01-2", "k2_middle", "", "t0.5", "k2_8-19,t0.50"):
        with pytest.raises(UsageError, match=r"no configuration named .*; valid: t0\.50 t1\.00 plain"):
            matrix.arguments_of(found, name, defaults)
    without = {"threshold": 0.9}
    assert matrix.arguments_of(found, "plain", without) == {"threshold": 1}
    with pytest.raises(UsageError):
        matrix.arguments_of(found, "k2_8-19", without)
