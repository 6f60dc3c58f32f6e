"""The benchmarks of speed at sizes that take no time: that they run, compare the same things, and what they count."""

from __future__ import annotations

import importlib
import json
import re
import sys

import pytest
import torch
from golden_models import generate, golden_json, golden_model

from benchmarks.decode import PARTS
from benchmarks.straightforward import Straightforward


def run(capsys, monkeypatch, name: str, *words: str) -> tuple[str, dict]:
    """What a benchmark printed, and its JSON line."""
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words])
    importlib.import_module(f"benchmarks.{name}").main()
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("refresh", ["rows", pytest.param("block", marks=pytest.mark.slow)])
def test_the_straightforward_form_is_the_same_algorithm(refresh):
    """Tokens and forwards of the engine, on the reference's cases: else the benchmark would compare two algorithms."""
    model = golden_model("tiny36")
    for case in golden_json("tiny36.generate.json")[:12:4]:
        settings = {
            key: case[key] for key in ("mask_id", "stop_token", "max_new_tokens", "small_block_size", "threshold")
        }
        form = Straightforward(model)
        (expected,) = generate(model, [case["prompt"]], refresh=refresh, **settings)
        assert form.generate(case["prompt"], refresh=refresh, **settings) == expected.tokens
        assert form.forwards == {kind: count for kind, count in expected.forwards.items() if count}


@pytest.mark.slow
def test_decode_beside_a_straightforward_form_and_a_peer(capsys, monkeypatch):
    words = ["--random_weights", "2x64", "--runs", "1", "--prompt_tokens", "40", "--new_tokens", "32"]
    text, found = run(capsys, monkeypatch, "decode", *words, "--baseline", "--where", "--threads", "1")
    baseline = found["baseline"]
    assert baseline["equal_answers"] == {"straightforward": 1}
    assert baseline["answers"] == 1
    assert baseline["ratios"]["straightforward"] > 0
    assert baseline["qwen2_tokens_per_second"] > 0
    for kind in ("full", "sub"):
        assert sum(found["where"][kind].values()) == pytest.approx(1)
        shares = found["where"][kind]
        assert all(shares[part] > 0 for part, _ in PARTS), "each is met; how much it takes depends on the load"
    assert "1 of 1 answers equal" in text
    assert found["settings"]["set"] == {}


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_one(capsys, monkeypatch, tmp_path):
    """All of its sections, so that the minutes of a GPU are not spent on a typing mistake."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    words = ["--random_weights", "16x64", "--device", "cpu", "--longest_context", "512", "--batch_size", "2"]
    text, found = run(
        capsys,
        monkeypatch,
        "gpu",
        *words,
        "--new_tokens",
        "32",
        "--questions",
        "2",
        "--json",
        str(tmp_path / "found.json"),
    )
    assert "failed" not in found, text
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert found["tokens"]["embedded"] == {"answers": 2, "as padded": 2, "as off": 2}
    assert {"forwards", "tokens", "batch", "experiments", "context", "lookahead"} <= found.keys()
    assert [found["lookahead"][f"answers, {states} states"]["same"] for states in (1, 2, 4, 8)] == [2] * 4


def test_in_long_answers_lookahead_saves_more_than_a_forward_per_block(capsys, monkeypatch):
    """An accepted commit saves its forward. Not only commits are guessed, so that a block saves more than one."""
    words = ["--questions", "2", "--blocks", "7", "--states", "4"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/lookahead.py", *words])
    importlib.import_module("benchmarks.lookahead").main()
    plain, four = capsys.readouterr().out.splitlines()
    per_block = [float(re.findall(r"([0-9.]+) forwards per block", line)[0]) for line in (plain, four)]
    assert per_block[1] <= per_block[0] - 1
    commits = re.findall(r"commit (\d+) of", four)
    assert int(commits[0]) > 6, "of the 12 commits of two answers of seven blocks, most are guessed"
    assert "2 of 2 answers equal" in four
