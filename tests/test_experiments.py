"""Names, arguments and imports: what is accepted, what is refused, and which module may know which."""

from __future__ import annotations

import ast
import shutil

import pytest
from golden_models import ROOT

from fast_dllm import experiments
from fast_dllm.arguments import ModelArguments
from fast_dllm.errors import UsageError

GOOD = (ROOT / "generation_functions.py").read_text()


@pytest.fixture
def experiments_folder(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments" / "00_baseline", folder / "00_baseline")
    monkeypatch.setattr(experiments, "EXPERIMENTS", folder)
    return folder


def add(folder, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "generation_functions.py").write_text(text)


def test_a_copied_and_edited_folder_is_an_experiment(experiments_folder):
    add(experiments_folder, "03_idea", GOOD + "\nIDEA = 'mine'\n")
    assert experiments.available() == ["00_baseline", "03_idea"]
    assert experiments.load("03_idea").IDEA == "mine"
    assert not hasattr(experiments.load("00_baseline"), "IDEA")


def test_no_name_means_the_active_file():
    assert experiments.generation_file(None) == ROOT / "generation_functions.py"
    assert experiments.load(None).generate.__module__ != experiments.load("00_baseline").generate.__module__


@pytest.mark.parametrize("name", ["nope", "../00_baseline", "", "00_baseline/", "a b", "00_baseline\n"])
def test_an_unknown_experiment_is_an_error_that_lists_those_there_are(experiments_folder, name):
    with pytest.raises(UsageError, match="00_baseline"):
        experiments.load(name)


def test_a_folder_without_generation_code_is_an_error(experiments_folder):
    (experiments_folder / "04_empty").mkdir()
    with pytest.raises(UsageError, match=r"'04_empty' has no generation_functions\.py"):
        experiments.load("04_empty")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    reuse_k: int = 1,\n", "", "lacks reuse_k"),
        ("    threshold: float = 0.9,\n", "    treshold: float,\n", "lacks threshold and requires treshold"),
        ("def generate(", "def make(", r"no function generate\(\)"),
        ("def denoise(", "def events(", r"no function denoise\(\)"),
    ],
)
def test_code_that_breaks_the_contract_is_refused_with_what_it_lacks(experiments_folder, old, new, message):
    add(experiments_folder, "05_broken", GOOD.replace(old, new))
    with pytest.raises(UsageError, match=message):
        experiments.load("05_broken")


def test_an_experiment_may_add_parameters_with_defaults(experiments_folder):
    add(
        experiments_folder,
        "06_more",
        GOOD.replace("    reuse_k: int = 1,\n", "    reuse_k: int = 1,\n    warmth: int = 2,\n"),
    )
    experiments.load("06_more")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reuse_k": 0}, "reuse_k must be a whole number of at least 1, not 0"),
        ({"reuse_k": "two"}, "reuse_k must be a whole number"),
        ({"reuse_k": 4, "layer_subset": "last"}, "reuse_k must be one of 1, 2, 3, not 4"),
        ({"reuse_k": 2}, "needs a layer_subset: one of first, middle, last"),
        ({"layer_subset": "top"}, "layer_subset must be one of first, middle, last, not 'top'"),
        ({"threshold": 2}, "threshold must be a number from 0 to 1, not 2"),
        ({"threshold": "high"}, "threshold must be"),
        ({"use_block_cache": "yes"}, "use_block_cache must be True or False"),
        ({"experiment_name": "nope"}, "unknown experiment 'nope'; there are: 00_baseline"),
        ({"treshold": 1}, "unknown model argument 'treshold'; valid ones: model_path, experiment_name"),
        ({"small_block_size": 5}, "must divide the block of 32"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16"),
        ({"loglikelihood_mode": "exact"}, "one of reference, chain"),
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
    ],
)
def test_a_bad_model_argument_is_one_line_that_names_fault_and_choices(given, message):
    with pytest.raises(UsageError, match=message) as raised:
        ModelArguments.parse(**given)
    assert "\n" not in str(raised.value)


def test_model_arguments_have_the_documented_defaults():
    arguments = ModelArguments.parse()
    assert (arguments.threshold, arguments.use_block_cache, arguments.reuse_k) == (0.9, True, 1)
    assert (arguments.small_block_size, arguments.max_new_tokens) == (8, 2048)
    assert arguments.config_name == "plain"
    assert ModelArguments.parse(reuse_k="2", layer_subset="middle").config_name == "k2_middle"


# Who may import whom (docs/design.md): a module knows only modules of lower rank.
RANK = {
    "answers": 0,
    "errors": 0,
    "prompts": 0,
    "results": 0,
    "questions": 1,
    "checks": 1,
    "scoring": 1,
    "config": 1,
    "sampling": 1,
    "layer_reuse": 1,
    "cluster": 2,
    "model": 2,
    "tokenizer": 3,
    "experiments": 3,
    "arguments": 4,
    "chat": 5,
    "harness": 6,
    "task_loading": 6,
    "doctor": 7,
}
KNOW_LM_EVAL = {"harness", "task_loading", "doctor"}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_one_way():
    modules = {path.stem: path for path in (ROOT / "fast_dllm").glob("*.py") if path.stem != "__init__"}
    for name, path in modules.items():
        used = {full.split(".")[1] for full in imported(path) if full.startswith("fast_dllm.")} & modules.keys()
        assert name in RANK, f"give {name} a rank"
        assert all(RANK[other] < RANK[name] for other in used), f"{name} imports {sorted(used)}"
        if name not in KNOW_LM_EVAL:
            assert not any(full.split(".")[0] == "lm_eval" for full in imported(path)), f"{name} imports lm_eval"
    policy = {"sampling", "layer_reuse"}
    for path in [ROOT / "generation_functions.py", *(ROOT / "experiments").glob("*/generation_functions.py")]:
        used = {full.split(".")[1] for full in imported(path) if full.startswith("fast_dllm.")} & modules.keys()
        assert used <= policy, f"{path} imports {sorted(used)}"


def test_results_needs_neither_torch_nor_lm_eval():
    tree = ast.parse((ROOT / "fast_dllm" / "results.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {"torch", "lm_eval", "transformers"} & {name.split(".")[0] for name in top}
