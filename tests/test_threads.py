"""The number of threads: small models, busy machines, and that what a user sets wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from golden_models import ROOT, golden_model

from fast_dllm.network import threads
from fast_dllm.network.threads import fit_threads
from fast_dllm.runner.environment import evaluation_environment


@pytest.fixture(autouse=True)
def number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return golden_model("tiny36")


def machine(monkeypatch, cores: int, load: float) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))


def test_a_small_model_has_one_thread_and_a_large_one_the_free_cores(model, monkeypatch):
    machine(monkeypatch, cores=6, load=2.2)
    assert fit_threads(model, {}) == torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "SMALL", 1000)
    assert fit_threads(model, {}) == torch.get_num_threads() == 4


def test_what_the_user_sets_wins(model, monkeypatch):
    machine(monkeypatch, cores=6, load=0)
    assert fit_threads(model, {"OMP_NUM_THREADS": "3"}) == torch.get_num_threads() == 3
    assert fit_threads(model, {"OMP_NUM_THREADS": "2,1"}) == 2
    assert fit_threads(model, {"OMP_NUM_THREADS": ""}) == 1
    assert fit_threads(model, {"OMP_NUM_THREADS": "1", "FAST_DLLM_NUM_THREADS": "2"}) == 2
    monkeypatch.setattr(threads, "SMALL", 1000)
    assert fit_threads(model, {"OMP_NUM_THREADS": "1", "FAST_DLLM_NUM_THREADS": "auto"}) == 6, "1 was accelerate's"


@pytest.mark.parametrize("given", [None, "2"])
def test_the_scripts_hand_on_what_the_user_has_set(given, tmp_path):
    """accelerate replaces OMP_NUM_THREADS, so the runner hands its value on under another name."""
    given_environment = {"OMP_NUM_THREADS": given} if given else {}
    environment = evaluation_environment(given_environment, tmp_path)
    assert environment["FAST_DLLM_NUM_THREADS"] == (given or "auto")


@pytest.mark.slow
def test_one_thread_for_the_embedded_model_in_a_program_of_its_own():
    """Whatever torch would take by itself."""
    environment = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    code = "import torch; from fast_dllm.decode.loaded import LoadedModel; LoadedModel.load('tiny', 'cpu', 'auto'); "
    code += "print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1:] == ["1"], done.stderr
