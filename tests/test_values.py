"""One conversion from text to value: the scripts, eval.py, matrix.json, the chat and the page cannot disagree."""

from __future__ import annotations

import json

import pytest
from golden_models import ROOT

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.spec.matrix import defaults_of, matrix_of
from fast_dllm.spec.values import check_arguments, parse_arguments
from fast_dllm.ui.chat import ChatSettings


def entrances(tmp_path):
    """Every place where a value is typed: name of the place -> a function (name, text) -> value."""
    (tmp_path / "experiments" / "00_baseline").mkdir(parents=True)
    policy = (ROOT / "generation_functions.py").read_text()
    (tmp_path / "experiments" / "00_baseline" / "generation_functions.py").write_text(policy)

    def in_matrix(name, text):
        content = {"compare_with": "a", "configurations": {"a": {name: text}}}
        (tmp_path / "experiments" / "00_baseline" / "matrix.json").write_text(json.dumps(content))
        return matrix_of("00_baseline", tmp_path).configurations["a"][name]

    return {
        "run.sh --model_args": lambda name, text: check_arguments(
            parse_arguments(f"{name}={text}"), defaults_of(None, ROOT)
        )[name],
        "eval.py --model_args": lambda name, text: ModelArguments.parse(**{name: text}).knobs[name],
        "matrix.json": in_matrix,
        "chat /set": lambda name, text: ChatSettings.parse(**{name: text}).knobs[name],
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("threshold", ".50", 0.5),
        ("threshold", "1", 1.0),
        ("small_block_size", "16.0", 16),
        ("use_block_cache", "off", False),
        ("use_block_cache", "Yes", True),
        ("layer_subset", "8-19", "8-19"),
        ("layer_subset", "none", None),
    ],
)
def test_every_entrance_gives_the_same_value(tmp_path, name, text, value):
    for place, convert in entrances(tmp_path).items():
        got = convert(name, text)
        assert (got, type(got)) == (value, type(value)), place


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("threshold", "7", "threshold must be a number from 0 to 1, not 7"),
        ("threshold", "nan", "threshold must be a number from 0 to 1, not nan"),
        ("threshold", "1" * 400, "threshold must be a number from 0 to 1, not 1111"),
        ("threshold", "high", "threshold must be a number from 0 to 1, not 'high'"),
        ("threshold", "none", "threshold needs a value"),
        ("small_block_size", "0", "small_block_size must be a whole number of at least 1, not 0"),
        ("small_block_size", "2.5", "small_block_size must be a whole number of at least 1, not 2.5"),
        ("small_block_size", "1e300", "small_block_size must be a whole number of at least 1, not 1e300"),
        ("use_block_cache", "2", "use_block_cache must be True or False, not 2"),
        ("layer_subset", "5", "layer_subset must be a word, or none, not 5"),
        ("reuse", "2", " 'reuse'; valid ones: "),
    ],
)
def test_every_entrance_refuses_the_same_in_one_short_line(tmp_path, name, text, message):
    for place, convert in entrances(tmp_path).items():
        with pytest.raises(UsageError) as raised:
            convert(name, text)
        told = str(raised.value)
        assert message in told, place
        assert "\n" not in told
        assert len(told) < 400
