"""Forwards that are recorded and replayed: the bookkeeping, and that nothing of a step is left out of a recording.

On a CPU a tape (tests/tape.py) stands in for the CUDA graph; tests/gpu has the graphs themselves.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter

import pytest
import tape
import torch
from golden_models import ROOT, few_layers, generate

from fast_dllm.decode import experiments
from fast_dllm.errors import NonFiniteError, UsageError
from fast_dllm.network import graphs, recordings
from fast_dllm.network.graphs import GraphExecution, GraphExecutor
from fast_dllm.network.kernels import Compiling
from fast_dllm.network.modes import use_graphs, use_padded_shapes
from fast_dllm.network.packing import BlockRows
from fast_dllm.network.recordings import Replays
from fast_dllm.spec.matrix import matrix_of

COMMON = {"mask_id": 319, "stop_token": 2, "max_new_tokens": 64, "threshold": 0.6}


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 318) for _ in range(length)] for length in lengths]


@pytest.fixture
def model():
    return few_layers()


@pytest.fixture
def taped(model):
    model.execution = GraphExecution(model, lambda: tape.record)
    return model


# -- the bookkeeping ---------------------------------------------------------------------------------------------------
class Recorder:
    """Records names; a recording says which piece of work it repeats."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, work):
        name = work.__name__
        self.log.append(f"record {name}")
        return lambda: self.log.append(f"replay {name}")

    def work(self, name: str):
        def run() -> None:
            self.log.append(f"run {name}")

        run.__name__ = name
        return run


def test_work_runs_as_written_twice_is_then_recorded_and_replayed_from_then_on():
    recorder = Recorder()
    replays = Replays(recorder)
    for key in "aabaab":
        replays(key, recorder.work(key))
    assert recorder.log == ["run a", "run a", "run b", "record a", "replay a", "replay a", "run b"]
    assert replays.counts == {"plain": 4, "recorded": 1, "replayed": 1}


def test_a_recording_that_is_out_of_use_goes_for_a_new_one():
    recorder = Recorder()
    replays = Replays(recorder, plain_runs=0, capacity=2)
    for key in "ab" + "a" * recordings.PATIENCE * 2 + "cbcab":
        replays(key, recorder.work(key))
    recorded = [entry[-1] for entry in recorder.log if entry.startswith("record")]
    assert recorded == ["a", "b", "c"], "c took the place of b, and b then runs as written"
    assert recorder.log[-5:] == ["replay c", "run b", "replay c", "replay a", "run b"]


def test_no_recording_is_made_where_the_memory_has_no_room():
    recorder, free = Recorder(), [True, False]
    replays = Replays(recorder, plain_runs=0, room=lambda: free[0])
    for key in "ab":
        replays(key, recorder.work(key))
        free.pop(0)
        free.append(False)
    assert recorder.log == ["record a", "replay a", "run b"]
    for key in "a" * recordings.PATIENCE + "bb":
        replays(key, recorder.work(key))
    assert recorder.log[-1] == "run b", "the only one there is is in use"


@pytest.mark.parametrize(
    ("free", "kept", "room", "emptied"), [(11, 0, True, 0), (9, 5, False, 0), (9, 11, True, 1), (0, 80, True, 1)]
)
def test_memory_that_torch_only_keeps_is_room_for_a_recording(monkeypatch, free, kept, room, emptied):
    """Of 100; torch uses 10. Asked again it has nothing left to give back."""
    there = {"free": free, "kept": kept, "emptied": 0}

    def empty_cache() -> None:
        there.update(free=there["free"] + there["kept"], kept=0, emptied=there["emptied"] + 1)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (there["free"], 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 + there["kept"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    for _ in range(2):
        assert recordings.has_room(torch.device("cuda")) is room
    assert there["emptied"] == emptied
    assert recordings.has_room(torch.device("cpu"))


# -- a recording follows the numbers -----------------------------------------------------------------------------------
def cases() -> list:
    """(experiment, knobs): the last configuration of each matrix, which differs most from plain decoding, under both
    refreshes. Two are default tests."""
    found = []
    for name in experiments.available():
        *_, knobs = matrix_of(name, ROOT).configurations.values()
        refreshes = ("block", "rows") if "refresh" in experiments.load(name).knobs else ("",)
        refreshes = ("rows",) if name == "03_carry_rows" else refreshes  # what it is about
        for refresh in refreshes:
            is_quick = (name, refresh) in (("00_baseline", "block"), ("02_residual_reuse", ""))
            settings = ({"refresh": refresh} if refresh else {}) | dict(knobs)
            marks = [] if is_quick else pytest.mark.slow
            found.append(pytest.param(name, settings, id=f"{name}-{refresh}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "knobs"), cases())
def test_replayed_forwards_give_the_tokens_of_plain_ones(name, knobs, model, monkeypatch):
    """Prompts of many lengths in three rows: each count of rows and each bucket is recorded on its own."""
    monkeypatch.setattr(recordings, "PLAIN_RUNS", 1)
    experiment = experiments.load(name)
    layers = {"layer_subset": "2-4"} if knobs.get("layer_subset") else {}
    batch, settings = prompts(5, 90, 33, 130), COMMON | knobs | layers | {"num_rows": 3}
    expected = experiment.generate(model, batch, **settings)
    model.execution = GraphExecution(model, lambda: tape.record)
    assert experiment.generate(model, batch, **settings) == expected
    assert experiment.generate(model, batch, **settings) == expected, "a second run, over what the first left"
    counts = model.execution.counts
    assert counts["replayed"] > 5 < counts["recorded"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", ["both", "mlp"])
def test_rows_that_part_in_mid_forward_are_replayed_in_parts(model, monkeypatch, part):
    experiment = experiments.load("02_residual_reuse")
    batch = prompts(5, 64, 33, 64, 12)
    knobs = {"reuse_k": 3, "layer_subset": "2-4", "tolerance": 0.05, "part": part}
    expected = experiment.generate(model, batch, **COMMON | knobs)
    parted: Counter[bool] = Counter()
    original = GraphExecutor._run_range_of_some

    def counted(self, frame, shape, store, read, members):
        parted[read] += 1
        original(self, frame, shape, store, read, members)

    monkeypatch.setattr(GraphExecutor, "_run_range_of_some", counted)
    model.execution = GraphExecution(model, lambda: tape.record)
    assert experiment.generate(model, batch, **COMMON | knobs) == expected
    assert parted[True] == parted[False] > 3


def test_sampled_tokens_are_those_of_plain_forwards(taped):
    settings = COMMON | {"temperature": 1.0, "reuse_k": 2, "layer_subset": "2-4"}
    batch = prompts(5, 90, 33)
    graphed = generate(taped, batch, generator=torch.Generator().manual_seed(1), **settings)
    assert taped.execution.counts["replayed"]
    taped.execution = None
    assert generate(taped, batch, generator=torch.Generator().manual_seed(1), **settings) == graphed


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", ["num_keys", "first_rows", "width of the frame"])
def test_what_a_recording_leaves_out_shows_in_the_tokens(fault, model, monkeypatch):
    """Each of what fixes a shape, left out of it: the check above would see it."""
    batch, settings = prompts(5, 90, 33, 300, 127, 12, 130), COMMON | {"num_rows": 3}
    expected = generate(model, batch, **settings)
    if fault == "num_keys":
        original = Replays.__call__

        def without(self, key, work):
            if isinstance(key[1], str):
                return original(self, key, work)
            return original(self, (key[0], key[1].first_rows, key[2]), work)

        monkeypatch.setattr(Replays, "__call__", without)
    elif fault == "first_rows":
        pack = graphs.pack_numbers

        def always_first(*given):
            numbers, shape = pack(*given)
            return numbers, graphs.replace(shape, first_rows=True)

        monkeypatch.setattr(graphs, "pack_numbers", always_first)
    else:
        # the offset of a window taken for a number of the step instead of a value
        unpack, first = graphs.unpack, {}

        def frozen(cache, numbers, shape):
            return unpack(cache, first.setdefault((tuple(numbers.shape), shape), numbers.clone()), shape)

        monkeypatch.setattr(graphs, "unpack", frozen)
    model.execution = GraphExecution(model, lambda: tape.record)
    with contextlib.suppress(RuntimeError, IndexError, ValueError):  # seen, too
        assert generate(model, batch, **settings) != expected


# -- the executor that stays from run to run ---------------------------------------------------------------------------
def test_the_cache_grows_when_it_must_and_stays_otherwise(taped):
    lengths = []
    for wanted in ((1, 200), (1, 250), (3, 100), (2, 600), (1, 64), (32, 100), (1, 64), (1, 600)):
        with taped.execution.executor(*wanted, 32) as executor:
            cache = executor.cache
            lengths.append((cache.batch_size, cache.max_length))
            assert cache.lengths == [0] * cache.batch_size
    assert lengths == [(1, 256), (1, 256), (3, 256), (3, 640), (3, 640), (32, 128), (32, 128), (1, 640)]


def test_only_the_forwards_that_are_recorded_ask_for_compiled_kernels(taped, monkeypatch):
    asked, used = [], []
    on_gpu, ran = Compiling(), type(taped.model.layers[0]).forward
    monkeypatch.setattr(graphs, "compiled_on_cuda", on_gpu)
    monkeypatch.setattr(torch, "compile", lambda kernel, **how: lambda x: used.append(asked[-1]) or x)
    kernel = on_gpu(lambda x: x)

    def counted(layer, x, attend):
        asked.append(x.shape[1])
        kernel(type("OnGPU", (), {"is_cuda": True})())
        return ran(layer, x, attend)

    monkeypatch.setattr(type(taped.model.layers[0]), "forward", counted)
    generate(taped, prompts(70), **COMMON)
    assert {64, 32} == set(asked), "a prefill of two blocks, then forwards of a block"
    assert set(used) == {32}


def test_a_second_run_beside_the_first_decodes_without_graphs(taped):
    (alone,) = generate(taped, prompts(40), **COMMON)
    first = experiments.load(None).denoise(taped, prompts(40), **COMMON)
    events = [next(first)]
    before = Counter(taped.execution.counts)
    assert generate(taped, prompts(40), **COMMON) == [alone]
    assert Counter(taped.execution.counts) == before, "it replayed nothing"
    assert [*events, *first][-1].generation == alone
    first = experiments.load(None).denoise(taped, prompts(40), **COMMON)
    next(first)
    first.close()
    assert isinstance(taped.execution.executor(1, 64, 32), GraphExecutor), "a run that is closed gives it back"


def test_nan_does_not_stay_in_the_buffers(taped):
    """What lies behind a sequence's end is masked, and a NaN there would come through the mask."""
    expected = generate(taped, prompts(70), **COMMON)
    layer = taped.model.layers[3].self_attn.v_proj
    kept = layer.bias.data.clone()
    layer.bias.data[:] = float("nan")
    taped.execution.forget()
    with pytest.raises(NonFiniteError):
        generate(taped, prompts(130), **COMMON)
    layer.bias.data[:] = kept
    assert generate(taped, prompts(70), **COMMON) == expected


def test_a_model_that_moves_is_recorded_anew(taped):
    expected = generate(taped, prompts(70), **COMMON)
    assert taped.execution.counts
    taped.to(torch.float64).to(torch.float32)
    assert not taped.execution.counts
    assert generate(taped, prompts(70), **COMMON) == expected


def test_the_modes(model):
    assert use_graphs(model, "auto").execution is None, "there is no CUDA GPU under this model"
    assert use_graphs(model, "off").execution is None
    expected = generate(model, prompts(70, 5), **COMMON)
    assert generate(use_padded_shapes(model), prompts(70, 5), **COMMON) == expected
    assert set(model.execution.counts) == {"plain"}
    for word in ("on", "padded"):
        with pytest.raises(UsageError, match=f"graphs must be one of auto, off, compiled, not '{word}'"):
            use_graphs(model, word)


# -- fused products ----------------------------------------------------------------------------------------------------
def test_fused_products_compute_what_the_layers_do_in_their_memory(model):
    ids = torch.tensor(prompts(64))
    names = set(model.state_dict())
    with torch.inference_mode():
        plain = model(ids).logits
        model.fuse()
        fused = model(ids).logits
        assert all(module.fused.fits() for module in model._fusible())
    assert set(model.state_dict()) == names
    assert (fused - plain).abs().max() < 1e-5 * plain.abs().max()
    for module in model._fusible():
        for linear in module.fused.linears:
            assert linear.weight.untyped_storage().data_ptr() == module.fused.weight.untyped_storage().data_ptr()


def test_a_weight_that_was_replaced_or_moved_is_the_one_that_is_used(model):
    ids = torch.tensor(prompts(64))
    model.fuse()
    with torch.inference_mode():
        before = model(ids).logits
        projection = model.model.layers[2].self_attn.v_proj
        projection.weight.data = projection.weight.data * 2
        replaced = model(ids).logits
        assert not model.model.layers[2].self_attn.fused.fits()
        assert (replaced - before).abs().max() > 1e-3
        projection.weight.data = projection.weight.data / 2
        assert torch.allclose(model(ids).logits, before, atol=1e-5 * float(before.abs().max()))
        model.to(torch.float64)
        assert all(module.fused.fits() for module in model._fusible())
        assert model(ids).logits.dtype == torch.float64


def test_a_forward_of_which_nothing_is_read_is_replayed_too(taped):
    with torch.inference_mode(), taped.execution.executor(2, 64, 32) as executor:
        for _ in range(4):
            logits = executor.run_block(BlockRows([0, 1], [[5] * 32] * 2, [0, 0], [[], []]))
            assert logits.shape == (2, 0, 320)
            assert executor.greedy(logits.flatten(0, 1), 319).shape == (3, 0)
    assert taped.execution.counts["replayed"]
