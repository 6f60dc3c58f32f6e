"""Layers compiled for a CPU: the same values whatever the shapes, by the weights of now; and what they are not for.

Libraries are compiled into a folder of the session, not the user's: ten seconds each, twenty for the first.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from golden_models import golden_model
from margins import assert_same_but_for_rounding
from test_eval import load, model_args, run_eval
from test_graphs import COMMON, cases, prompts
from test_scoring import SCORE, few_shot_load, plainly

from fast_dllm.decode import experiments
from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.errors import UsageError
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.network.cache import Attend, KVCache
from fast_dllm.network.compiled import CompiledExecution, CompiledExecutor
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.layer_libraries import LayerLibraries, Variant, decoding_variants
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import use_graphs
from fast_dllm.network.packing import BlockRows, pack_block

NO_COMPILER = not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "g++"))))
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler (g++ or clang++)")


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """The library itself compares what it is given with what it was compiled for."""
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled") / "layers"


def with_compiled_layers(model: FastDLLMForCausalLM, folder: Path) -> FastDLLMForCausalLM:
    model.requires_grad_(False)
    model.execution = CompiledExecution(model, folder)
    return model


def loaded(model: FastDLLMForCausalLM) -> set[Variant]:
    """The variants whose libraries it has used."""
    return set(model.execution.libraries.loaded)


@pytest.fixture
def model(folder):
    return with_compiled_layers(golden_model("tiny36"), folder)


def random_cache(model: FastDLLMForCausalLM, num_rows: int, length: int) -> KVCache:
    """What lies beyond a sequence's end is there to be seen if it is read."""
    cache = model.new_cache(num_rows, length, 32)
    torch.manual_seed(0)
    for buffer in (cache.keys, cache.values):
        buffer.copy_(torch.randn(buffer.shape))
    return cache


@torch.inference_mode()
def assert_same_layers(model: FastDLLMForCausalLM, attend: Attend, x: torch.Tensor) -> None:
    """Hidden rows and the cache after all layers as written, and compiled, from the same cache."""
    cache = attend.cache
    before = cache.keys.clone(), cache.values.clone()
    layers, results = range(len(model.model.layers)), []
    for executor in (CompiledExecutor(model, cache, model.execution.libraries), EagerExecutor(model, cache)):
        cache.keys.copy_(before[0])
        cache.values.copy_(before[1])
        hidden = executor.run_layers(x, attend, layers)
        results.append((hidden, cache.keys.clone(), cache.values.clone()))
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * float(scale)), float((got - expected).abs().max())
    changed = (results[0][1] != before[0]).any(dim=(0, 3, 4))
    assert int(changed.sum()) == x.shape[0] * x.shape[1], "it wrote its own rows and no other"


def block_inputs(model, cache, rows, lengths, width, offset) -> tuple[Attend, torch.Tensor]:
    cache.lengths[:] = [32] * cache.batch_size
    for row, length in zip(rows, lengths, strict=True):
        cache.lengths[row] = length
    ids = [[random.Random(row).randrange(3, 300) for _ in range(width)] for row in rows]
    inputs = pack_block(cache, BlockRows(rows, ids, [offset] * len(rows), [[0]] * len(rows)))
    return inputs.attend, model.model.embed_tokens(inputs.ids)


# -- values ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@needs_compiler
def test_a_compiled_layer_gives_what_it_gives_as_written(model):
    """One sequence: any number of rows and keys, of a library that was compiled for others."""
    for length, width, offset, num_positions in ((0, 32, 0, 64), (64, 8, 24, 96), (320, 2, 7, 352), (96, 17, 3, 2048)):
        cache = random_cache(model, 1, num_positions)
        assert_same_layers(model, *block_inputs(model, cache, [0], [length], width, offset))
    assert len(loaded(model)) == 1


@pytest.mark.slow
@needs_compiler
def test_so_it_does_for_any_sequences_of_the_cache(model):
    """The first rows and others, at equal and at different positions, one and all of a cache."""
    for rows, lengths in (
        ([0, 1], [64, 64]),
        ([0, 1, 2, 3, 4, 5], [96] * 6),
        ([0, 1, 2], [32, 128, 64]),
        ([5, 2], [64, 64]),
        ([3, 0, 4, 1], [0, 256, 32, 96]),
        ([4], [128]),
        ([0], [128]),
    ):
        for width, offset in ((32, 0), (8, 16), (3, 1)):
            assert_same_layers(model, *block_inputs(model, random_cache(model, 6, 320), rows, lengths, width, offset))
    assert len(loaded(model)) == 6


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "knobs"), cases()[::2])
def test_every_experiment_answers_as_with_layers_as_written(name, knobs, folder):
    """Prompts of many lengths, one at a time and in three rows; what differs is less than rounding can move."""
    plain, model = golden_model("tiny36"), with_compiled_layers(golden_model("tiny36"), folder)
    experiment, settings = experiments.load(name), COMMON | knobs
    batch = prompts(5, 90, 33, 130)
    expected = [experiment.generate(plain, [each], **settings)[0] for each in batch]
    for num_rows in (1, 3):
        got = experiment.generate(model, batch, num_rows=num_rows, **settings)
        for prompt, one, other in zip(batch, expected, got, strict=True):
            assert_same_but_for_rounding(plain, experiment, prompt, settings, one, other)
    used = loaded(model)
    assert used <= set(decoding_variants(several=True)), "each is compiled before the first answer"
    assert used & set(decoding_variants(several=False))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chain", [False, True], ids=["reference", "chain"])
def test_scores_are_those_of_whole_forwards_as_written(chain, random_model, folder):
    lm = FastDLLM(ModelArguments.parse(model_path=str(random_model), batch_size=5, device="cpu"))
    with_compiled_layers(lm.model, folder)
    pairs = few_shot_load(subjects=2, questions=2)
    got = lm.scorer.score([lm.scorer.masked_inputs(*pair, chain) for pair in pairs], quiet=True)
    assert loaded(lm.model)
    for pair, (value, greedy), (alone, best) in zip(pairs, got, plainly(lm, pairs, chain), strict=True):
        assert value == pytest.approx(alone, abs=(len(pair[1]) if chain else 1) * SCORE)
        assert greedy == best


@pytest.mark.slow
@needs_compiler
def test_the_weights_are_those_of_now(model):
    """Changed in place, given other data, and replaced."""
    layer = model.model.layers[3]
    cache = random_cache(model, 1, 96)
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert_same_layers(model, *block_inputs(model, cache, [0], [64], 8, 0))
    layer.self_attn.k_proj.bias.data = torch.randn_like(layer.self_attn.k_proj.bias)
    assert_same_layers(model, *block_inputs(model, cache, [0], [64], 8, 0))
    layer.input_layernorm.weight = torch.nn.Parameter(layer.input_layernorm.weight * 3, requires_grad=False)
    assert_same_layers(model, *block_inputs(model, cache, [0], [64], 8, 0))


@pytest.mark.slow
@needs_compiler
def test_a_library_that_was_cut_short_is_compiled_anew(tmp_path):
    model = with_compiled_layers(golden_model("tiny28"), tmp_path)
    (variant, _) = decoding_variants(several=False)
    model.execution.libraries.library(variant)
    (path,) = tmp_path.iterdir()
    for text in (path.read_bytes()[:100_000], b""):
        path.write_bytes(text)
        with_compiled_layers(model, tmp_path).execution.libraries.library(variant)
        assert path.stat().st_size > 100_000
        assert_same_layers(model, *block_inputs(model, random_cache(model, 1, 96), [0], [64], 8, 0))


# -- what is run as written, and what is refused -----------------------------------------------------------------------
def test_a_forward_that_no_library_is_for_runs_as_written(model, monkeypatch):
    monkeypatch.setattr(LayerLibraries, "library", lambda *_: pytest.fail("it is for the layers as written"))
    executor, two_rows = model.execution.executor(1, 64, 32), BlockRows([0], [[5, 6]], [0], [[0]])
    with torch.inference_mode():
        executor.run_block(BlockRows([0], [[5]], [0], [[0]]))  # one row
        model(torch.tensor([[5, 6, 7]]))  # no cache
    with torch.enable_grad():
        executor.run_block(two_rows)
    with torch.inference_mode(), pytest.raises(pytest.fail.Exception):
        executor.run_block(two_rows)
    model.bfloat16()
    with torch.inference_mode():
        model.execution.executor(1, 64, 32).run_block(two_rows)


def test_a_library_is_for_one_layer_one_torch_one_cpu_and_one_variant(model, monkeypatch):
    libraries = model.execution.libraries
    variant = Variant(False, False, None, False, False, 1)
    others = [
        variant._replace(**{name: value})
        for name, value in {
            "several": True,
            "many_cache_rows": True,
            "apart": True,
            "picked": True,
            "num_threads": 2,
        }.items()
    ]
    others += [variant._replace(mask=mask) for mask in itertools.product((False, True), repeat=2)]
    names = [libraries._name(each) for each in (variant, *others)]
    names.append(CompiledExecution(golden_model("tiny28")).libraries._name(variant))
    model.config.rms_norm_eps = 1e-3
    names.append(libraries._name(variant))
    for target, value in (("fast_dllm.network.layer_libraries._cpu", lambda: ("another",)), ("torch.__version__", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            names.append(libraries._name(variant))
    assert len(set(names)) == len(names)


@pytest.mark.slow
@needs_compiler
def test_a_machine_that_cannot_compile_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """Before anything is decoded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = golden_model("tiny28")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(
        UsageError, match="the layers cannot be compiled here, which takes a C\\+\\+ compiler"
    ) as raised:
        use_graphs(model, "compiled")
    assert "\n" not in str(raised.value)
    assert model.execution is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
@needs_compiler
def test_eval_says_that_layers_are_compiled_and_keeps_them(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AOTI_RUNTIME_CHECK_INPUTS")
    given, found = {"experiment_name": "00_baseline", "reuse_k": 2, "layer_subset": "middle"}, []
    for number, graphs in enumerate(("off", "compiled", "compiled")):
        arguments = model_args(random_model, **given, graphs=graphs)
        out = tmp_path / str(number)
        done = run_eval("--tasks", "made_up_sums", "--model_args", arguments, "--output_path", f"{out}/")
        assert done.returncode == 0, done.stderr
        assert ("compiling the layers for this CPU" in done.stderr) is (number == 1), "once"
        found.append(load(out)[1])
    assert [summary["graphs"] for summary in found] == ["off", "compiled", "compiled"]
    assert found[0]["accuracy"] == found[1]["accuracy"] == found[2]["accuracy"]
    assert found[0]["throughput"]["forwards"] == found[1]["throughput"]["forwards"]
    arguments = model_args(random_model, **given, graphs="compiled", dtype="bfloat16")
    failed = run_eval("--tasks", "made_up_sums", "--model_args", arguments, "--output_path", f"{tmp_path / 'none'}/")
    assert failed.returncode == 2
    assert "graphs=compiled is for float32 on a CPU" in failed.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "none").exists()
