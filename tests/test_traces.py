"""--traces: the steps that are recorded are those that were taken, nothing else changes, and they outlive a process."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from golden_models import ROOT, golden_model
from test_harness import asks

from fast_dllm.decode import experiments
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.decode.tracing import traced
from fast_dllm.decoding import FORWARD_KINDS
from fast_dllm.errors import UsageError
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.evaluate.options import read_command_line
from fast_dllm.record import traces
from fast_dllm.report import calibration
from fast_dllm.spec.matrix import matrix_of

MASK, STOP = 1, 2
PROMPTS = [[5, 9, 12, 20, 7] * 6, [31, 4, 4, 17], list(range(10, 42))]


def settings_of(name: str) -> dict:
    """One configuration of an experiment that differs from plain decoding."""
    configurations = matrix_of(name, ROOT).configurations
    knobs = experiments.load(name).knobs
    wanted = "k2_middle" if "k2_middle" in configurations else list(configurations)[-1]
    return {key: value for key, value in configurations[wanted].items() if key in knobs}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 0.0) for name in experiments.available()), ("00_baseline", 0.8)]
)
def test_steps_are_those_that_were_taken_and_nothing_else_changes(name, temperature):
    """The unmasked tokens make up the answer; kinds and resting layers add up to its cost."""
    model, experiment, found = golden_model("tiny36"), experiments.load(name), {}
    settings = {"mask_id": MASK, "stop_token": STOP, "max_new_tokens": 32, "temperature": temperature, "num_rows": 2}
    settings |= settings_of(name)

    def generate(policy):
        return policy.generate(model, PROMPTS, generator=torch.Generator().manual_seed(3), **settings)

    plain = generate(experiment)
    assert generate(replace(experiment, decode_one=traced(experiment.decode_one, found.__setitem__))) == plain
    assert sorted(found) == [0, 1, 2]
    for row, generation in enumerate(plain):
        steps, start = found[row]["steps"], found[row]["num_prompt"]
        assert start == len(PROMPTS[row])
        tokens = {}
        for step in steps:
            (seen,) = step["seen"]
            assert not tokens.keys() & set(seen["positions"]), "what is known is no candidate"
            candidates = dict(zip(seen["positions"], seen["tokens"], strict=True))
            assert MASK not in seen["tokens"]
            assert all(0 <= confidence <= 1 for confidence in seen["confidences"])
            filled = dict(zip(step["filled"]["positions"], step["filled"]["tokens"], strict=True))
            assert filled.items() <= candidates.items()
            tokens |= filled
        assert [tokens[start + index] for index in range(len(generation.tokens))] == generation.tokens
        kinds = [step["kind"] for step in steps]
        assert {kind: kinds.count(kind) for kind in FORWARD_KINDS} == generation.forwards
        if name != "02_residual_reuse":  # there a layer can rest in part
            layers = [36 - (step["rest"][1] - step["rest"][0] if step["rest"] else 0) for step in steps]
            assert sum(layers) == sum(generation.layer_forwards.values())
        rests = [kind == "partial" or not FORWARD_KINDS[kind].runs_layers for kind in kinds]
        assert [bool(step["rest"]) for step in steps] == rests
        assert [step["rows"] is not None for step in steps] == [FORWARD_KINDS[kind].runs_layers for kind in kinds]


# -- kept with the answers ---------------------------------------------------------------------------------------------
def finished(lm: FastDLLM, folder) -> tuple[dict, dict]:
    """(header, traces by the text of their questions) of a run whose questions are all answered."""
    traces.finish(lm.answers.store, folder, {"block_size": 32, "stop_token": STOP})
    header, found = traces.read(folder / traces.TRACES_FILE)
    return header, {str(trace["questions"]): trace for trace in found}


def without_times(found: dict) -> dict:
    return {key: [{**step, "ms": 0} for step in trace["steps"]] for key, trace in found.items()}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_traces(monkeypatch, random_model, tmp_path):
    """Three answers, a damaged line, and the rest by another process: each answer once, as in one go."""
    arguments = ModelArguments.parse(model_path=str(random_model), max_new_tokens=32, device="cpu")
    requests = asks([f"{'x' * index} {index}" for index in range(5)] + ["x 1"])  # the last one is asked before

    whole = FastDLLM(arguments)
    whole.keep_answers(tmp_path / "whole", with_traces=True)
    texts = whole.generate_until(requests, disable_tqdm=True)
    header, expected = finished(whole, tmp_path / "whole")
    assert (header["num_answers"], header["num_traces"], header["schema_version"]) == (5, 5, traces.SCHEMA_VERSION)

    first = FastDLLM(arguments)
    first.keep_answers(tmp_path / "parts", with_traces=True)
    keep = first.answers.keep

    def keep_three(*words):
        keep(*words)
        if len(first.answers.store) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(first.answers, "keep", keep_three)
    with pytest.raises(KeyboardInterrupt):
        first.generate_until(requests, disable_tqdm=True)
    (part,) = first.answers.store.folder.glob(f"*{traces.PART_SUFFIX}")
    with part.open("ab") as file:
        file.write(gzip.compress(b'{"key":"torn","questions":[],"steps":[]}\n')[:25])
    second = FastDLLM(arguments)
    second.keep_answers(tmp_path / "parts", with_traces=True)
    assert second.generate_until(requests, disable_tqdm=True) == texts
    header, continued = finished(second, tmp_path / "parts")
    assert (header["num_answers"], header["num_traces"]) == (5, 5)
    assert without_times(continued) == without_times(expected)
    assert str([["made_up", 1], ["made_up", 5]]) in expected  # one answer for two questions

    third = FastDLLM(arguments)  # without traces: the file of the run before is not left beside its results
    third.keep_answers(tmp_path / "plain")
    assert third.generate_until(requests, disable_tqdm=True) == texts
    (tmp_path / "plain" / traces.TRACES_FILE).write_bytes(b"old")
    assert traces.finish(third.answers.store, tmp_path / "plain", {}) == {}
    assert not (tmp_path / "plain" / traces.TRACES_FILE).exists()


def test_a_file_of_another_version_and_a_torn_one_are_refused(tmp_path):
    path = tmp_path / traces.TRACES_FILE
    path.write_bytes(gzip.compress(b'{"schema_version":2}\n'))
    with pytest.raises(traces.TracesError, match="schema version 2, not 1"):
        traces.read(path)
    path.write_bytes(gzip.compress(b'{"schema_version":1}\n{"key":"a"}\n')[:-12])
    with pytest.raises(traces.TracesError, match="cannot be read"):
        list(traces.read(path)[1])


def test_traces_need_a_folder():
    with pytest.raises(UsageError, match="--traces needs --output_path"):
        read_command_line(["--model", "fast_dllm_v2", "--tasks", "toy_math", "--traces"])


# -- calibration -------------------------------------------------------------------------------------------------------
def step(kind, seen, filled, window=(32, 40)):
    """seen: position -> (token, confidence); filled: position -> token."""
    positions, pairs = list(seen), list(seen.values())
    state = {"positions": positions, "tokens": [t for t, _ in pairs], "confidences": [c for _, c in pairs]}
    content = {"kind": kind, "seen": [state], "window": list(window)}
    return content | {"filled": {"positions": list(filled), "tokens": list(filled.values())}}


def test_candidates_are_counted_by_distance_and_step_against_the_finished_answer(tmp_path, capsys):
    """A hand-made answer: prompt up to position 34, tokens 10 11 12 and the stop at 35 to 38, a mask behind it."""
    steps = [
        step("full", {35: (10, 0.96), 36: (99, 0.3), 37: (12, 0.6), 38: (STOP, 0.8), 39: (7, 0.5)}, {37: 12}),
        step("reused", {35: (10, 0.96), 36: (99, 0.3)}, {}),  # nothing new was seen
        step("full", {35: (10, 0.97), 36: (11, 0.7), 38: (STOP, 0.85), 39: (7, 0.5)}, {35: 10}),
        step("full", {36: (11, 0.9), 38: (STOP, 0.9)}, {36: 11, 38: STOP, 39: 7}),
    ]
    path = tmp_path / traces.TRACES_FILE
    header = {"schema_version": 1, "experiment": "00_baseline", "task": "toy_math", "config": "plain"}
    header |= {"block_size": 32, "stop_token": STOP}
    trace = {"key": "a", "questions": [["toy_math", 0]], "num_prompt": 35, "steps": steps}
    path.write_bytes(gzip.compress(b"".join(json.dumps(each).encode() + b"\n" for each in (header, trace))))
    assert calibration.main([str(path), "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (content["answers"], content["candidates"]) == (1, 5)  # 39 is behind the stop; 37, 35, 36, 38 were unmasked
    groups = {(row["by"], row["group"]): (row["candidates"], round(row["right"], 3)) for row in content["groups"]}
    assert groups == {
        ("distance", "1"): (3, 1.0),  # 35 in the first step, 36 and 38 beside 37 in the second
        ("distance", "2"): (1, 0.0),  # 36 in the first step, where 99 was the candidate
        ("distance", "3 to 4"): (1, 1.0),  # 38 in the first step
        ("step", "1"): (3, 0.667),
        ("step", "2 to 3"): (2, 1.0),
    }
    (first,) = [row for row in content["groups"] if (row["by"], row["group"]) == ("distance", "2")]
    assert first["error"] == pytest.approx(0.3)
    assert {"calibration.png", "calibration.svg", "calibration.md"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert calibration.main([str(tmp_path / "absent.gz")]) == 2
    assert "an evaluation with --traces writes one" in capsys.readouterr().err
