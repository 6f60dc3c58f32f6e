"""Names, arguments and imports: what is accepted, what is refused, and which module may know which."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
from golden_models import ROOT

from fast_dllm.decode import experiments
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.spec.defaults import DEFAULTS
from fast_dllm.spec.matrix import defaults_of

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
    add(experiments_folder, "03_idea", GOOD.replace("decode_one(answer", "decode_one(  # mine\n    answer"))
    assert experiments.available() == ["00_baseline", "03_idea"]
    mine, baseline = experiments.load("03_idea"), experiments.load("00_baseline")
    assert mine.policy_sha256 != baseline.policy_sha256
    assert mine.decode_one is not baseline.decode_one
    assert mine.knobs == baseline.knobs


def test_no_name_means_the_active_file():
    active, frozen = experiments.load(None), experiments.load("00_baseline")
    assert active.path == ROOT / "generation_functions.py"
    assert active.decode_one.__module__ != frozen.decode_one.__module__


@pytest.mark.parametrize("name", ["nope", "../00_baseline", ""])
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
        ("class Options(decoding.Options):", "class Settings(decoding.Options):", "05_broken/.* has no class Options"),
        ("class Options(decoding.Options):", "class Options:", "has no class Options"),
        ("    reuse_k: int = 1\n", "    reuse_k: int\n", "."),  # dataclass's own complaint
        ("def decode_one(", "def decode(", "has no generator function decode_one"),
        ("answer: Answer, options", "answer: Answer, settings", r"take \(answer, options\)"),
    ],
)
def test_code_that_breaks_the_contract_is_refused_with_what_it_lacks(experiments_folder, old, new, message):
    assert old in GOOD
    add(experiments_folder, "05_broken", GOOD.replace(old, new))
    with pytest.raises((UsageError, TypeError), match=message):
        experiments.load("05_broken")


def test_an_experiment_may_add_knobs_which_every_caller_may_then_set(experiments_folder):
    knob = "    reuse_k: int = 1\n    warmth: float = 0.5\n    careful: bool = False\n"
    check = '        check_names("refresh"'
    text = GOOD.replace("    reuse_k: int = 1\n", knob).replace(
        check, '        if self.warmth > 1:\n            raise ValueError("warmth must be at most 1")\n' + check
    )
    add(experiments_folder, "06_more", text)
    arguments = ModelArguments.parse(experiment_name="06_more", warmth="0.25", careful="True")
    assert (arguments.knobs["warmth"], arguments.as_dict()["careful"]) == (0.25, True)
    assert arguments.config_name == "plain+careful=True+threshold=0.9+warmth=0.25"
    for given, message in (
        ({"warmth": 2}, "warmth must be at most 1"),
        ({"warmth": "hot"}, "warmth must be a number, not 'hot'"),
        ({"careful": 1}, "careful must be True or False, not 1"),
        ({"warmt": 1}, "unknown model argument 'warmt'; valid ones: .*refresh"),
    ):
        with pytest.raises(UsageError, match=message):
            ModelArguments.parse(experiment_name="06_more", **given)
    with pytest.raises(UsageError, match="unknown model argument 'warmth'"):
        ModelArguments.parse(experiment_name="00_baseline", warmth=0.25)


def test_a_policy_that_has_no_refresh_is_given_none_and_says_so(experiments_folder):
    text = """
from dataclasses import dataclass
from fast_dllm import decoding

@dataclass(frozen=True)
class Options(decoding.Options):
    pass

def decode_one(answer, options):
    yield answer.fill(decoding.Prediction("full", [], []), 0, 0, {})
"""
    add(experiments_folder, "07_bare", text)
    assert "refresh" not in ModelArguments.parse(experiment_name="07_bare").as_dict()
    with pytest.raises(UsageError, match="unknown model argument 'refresh'"):
        ModelArguments.parse(experiment_name="07_bare", refresh="rows")
    with pytest.raises(UsageError, match=r"07_bare/.* takes no 'refresh'; it takes: max_new_tokens"):
        experiments.load("07_bare").generate(None, [], mask_id=1, stop_token=2, refresh="rows")


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
        ({"use_block_cache": "maybe"}, "use_block_cache must be True or False"),
        ({"experiment_name": "nope"}, "unknown experiment 'nope'; there are: 00_baseline"),
        ({"refresh": "all"}, "refresh must be one of block, rows, not 'all'"),
        ({"reuse_k": 2, "layer_subset": "last", "use_block_cache": False}, "reuse_k 2 needs the block cache"),
        ({"treshold": 1}, "unknown model argument 'treshold'; valid ones: model_path, experiment_name"),
        ({"small_block_size": 5}, "must divide the block of 32"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, float16, bfloat16"),
        ({"loglikelihood_mode": "exact"}, "one of reference, chain"),
        ({"graphs": "on"}, "graphs must be one of auto, off, compiled"),
        ({"batch_size": "many"}, "batch_size must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"experiment_name": "01_adaptive_skip", "reread_above": 2}, "reread_above must be a probability from 0 to 1"),
        ({"experiment_name": "02_residual_reuse", "order": 2}, "order must be one of 0, 1, not 2"),
        ({"experiment_name": "03_carry_rows", "carry": True, "refresh": "block"}, "carry needs refresh rows"),
        ({"experiment_name": "05_two_bars", "prefix_above": -1}, "prefix_above must be a probability from 0 to 1"),
    ],
)
def test_a_bad_model_argument_is_one_line_that_names_fault_and_choices(given, message):
    with pytest.raises(UsageError, match=message) as raised:
        ModelArguments.parse(**given)
    assert "\n" not in str(raised.value)


def test_model_arguments_have_the_documented_defaults():
    arguments = ModelArguments.parse()
    knobs = arguments.knobs
    assert (knobs["threshold"], knobs["use_block_cache"], knobs["reuse_k"]) == (0.9, True, 1)
    assert (knobs["small_block_size"], knobs["max_new_tokens"], knobs["refresh"]) == (8, 2048, "block")
    # what the scripts take defaults from says the same (runner/defaults.py)
    assert {name: arguments.as_dict()[name] for name in DEFAULTS} == dict(DEFAULTS)
    assert defaults_of(None, ROOT) == {
        name: value
        for name, value in arguments.as_dict().items()
        if name not in ("model_path", "experiment_name", "batch_size", "device", "graphs", "show_speed")
    }


def test_a_result_is_named_after_the_configuration_that_it_has_every_setting_of_and_what_differs():
    assert ModelArguments.parse(threshold=1).config_name == "plain"
    assert ModelArguments.parse().config_name == "plain+threshold=0.9"
    assert ModelArguments.parse(reuse_k=2, layer_subset="last", refresh="rows").config_name == "k2_last+refresh=rows"
    assert ModelArguments.parse(reuse_k=3, layer_subset="8-19", threshold=0.8).config_name == "k3_8-19+threshold=0.8"
    assert ModelArguments.parse(reuse_k="2", layer_subset="middle").config_name == "k2_middle"


# Who may import whom (docs/design.md, Layers): a room of the package knows only rooms of a lower rank.
RANK = {
    "errors": 0,
    "decoding": 0,
    "guard": 1,
    "spec": 1,
    "sampling": 1,
    "layer_reuse": 1,
    "record": 2,
    "network": 3,
    "decode": 4,
    "evaluate": 5,
    "transcripts": 5,
    "ui": 6,
    "report": 6,
    "drift": 7,
    "runner": 7,
    "doctor": 8,
}
PROGRAMS = 14  # eval.py, app.py, run_chatbot.py, benchmarks/, training/, docs/: nobody imports them
KNOW_LM_EVAL = {"evaluate", "doctor", "drift", "eval"}
POLICY = {"decoding", "sampling", "layer_reuse"}  # what a generation_functions.py may know


def imported(text: str) -> set[str]:
    """Full names of what a module imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "."} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def project_modules() -> dict[Path, str]:
    """Every Python file of the project but the tests -> the name that its rank stands under."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", "results", "logs", "artifacts") or any(part.startswith(".") for part in parts):
            continue
        in_package = parts[0] == "fast_dllm" and parts[-1] != "__init__.py"
        found[path] = parts[1].removesuffix(".py") if in_package else parts[0].removesuffix(".py")
    return found


def wrong_imports(name: str, path: Path, text: str) -> list[str]:
    """What of the project's own modules `path` imports and may not."""
    names, rank = imported(text), RANK.get(name, PROGRAMS)
    used = {full.split(".")[1] for full in names if full.startswith("fast_dllm.")} & RANK.keys()
    if path.name == "generation_functions.py":
        wrong = used - POLICY
    else:
        wrong = {other for other in used if RANK[other] >= rank and other != name}
    if name not in KNOW_LM_EVAL and not str(path).startswith(str(ROOT / "tasks")):
        wrong |= {full for full in names if full.split(".")[0] == "lm_eval"}
    programs = {"eval", "app", "run_chatbot", "generation_functions"}
    own = {"benchmarks", "training"} - {path.parent.name}
    return sorted(wrong | {full for full in names if full.split(".")[0] in programs | own})


def test_imports_run_one_way_in_every_module_of_the_project():
    modules = project_modules()
    names = {path.name for path in modules}
    assert {"eval.py", "app.py", "run_chatbot.py", "generation_functions.py", "situation.py", "decode.py"} <= names
    for path, name in modules.items():
        assert name in RANK or path.parts[len(ROOT.parts)] != "fast_dllm" or path.name == "__init__.py", f"rank {name}"
        assert wrong_imports(name, path, path.read_text()) == [], path


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fast_dllm/network/model.py", "from fast_dllm.decode import engine"),
        ("fast_dllm/decode/engine.py", "from fast_dllm.evaluate.scoring import batches"),
        ("fast_dllm/doctor/__main__.py", "def late():\n    from eval import read_command_line"),
        ("fast_dllm/ui/chat.py", "import lm_eval.tasks"),
        ("fast_dllm/spec/matrix.py", "from fast_dllm.record.scores import score"),
        ("generation_functions.py", "from fast_dllm.network.loading import load_model"),
        ("experiments/00_baseline/generation_functions.py", "from fast_dllm.decode import engine"),
        ("run_chatbot.py", "import app"),
    ],
)
def test_the_check_of_imports_can_fail(module, line):
    path = ROOT / module
    assert wrong_imports(project_modules()[path], path, path.read_text() + "\n" + line + "\n")


def test_no_class_and_no_file_of_the_package_has_anothers_name():
    files = [path for path in (ROOT / "fast_dllm").rglob("*.py") if path.stem not in ("__init__", "__main__")]
    names = [path.name for path in files]
    for path in files:
        names += [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
