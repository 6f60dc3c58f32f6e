"""benchmarks/shards.py: what it counts, that nothing is lost in it, and that the documents show what it prints."""

import subprocess
import sys

import pytest
from golden_models import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import shards
from shards import Settings, Simulation

SMALL = {"shards": 4, "gpus": 10, "configurations": 3}


def test_without_deaths_each_call_is_one_that_the_scripts_make():
    outcome = Simulation(Settings(**SMALL, preemptions=0.0, limit=72.0)).run()
    assert (outcome.deaths, outcome.renewals, outcome.abandoned) == (0, 0, 0)
    # an array and a job that waits for each; each shard's continuation; run.sh's two looks, and one of each last shard
    assert outcome.calls == {"sbatch": 2 * 3 + 12, "scancel": 12 + 3, "squeue": 2 + 3}
    assert outcome.busy == pytest.approx(outcome.useful + 12 * shards.START + 3 * (shards.START + shards.FINISH))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_dies_every_run_is_completed_and_every_gpu_given_back(seed):
    simulation = Simulation(Settings(**SMALL, preemptions=2.0, exempt=0.0, limit=4.0, seed=seed))
    outcome = simulation.run()
    assert all(simulation.complete)
    assert not any(map(sum, simulation.work))
    assert simulation.free == 10
    assert outcome.deaths > 10
    assert 0 < outcome.waste < 0.3


def test_an_array_has_no_more_jobs_at_once_than_its_throttle_allows():
    settings = Settings(shards=40, gpus=100, configurations=1, preemptions=0.0, at_once=8, limit=72.0)
    simulation, most = Simulation(settings), 0
    begin = simulation.begin

    def counted(job):
        nonlocal most
        begin(job)
        most = max(most, 100 - simulation.free)

    simulation.begin = counted
    simulation.run()
    assert most == 8


@pytest.mark.slow
def test_the_documents_show_what_is_printed():
    command = [sys.executable, ROOT / "benchmarks" / "shards.py", "--table"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs" / "operations.md").read_text()
    rows = (ROOT / "docs" / "performance.md").read_text().splitlines()
    for one in (Settings(shards=8, preemptions=0.0), Settings(shards=8, preemptions=0.3)):
        rate = f"{one.preemptions:g} an hour" if one.preemptions else "none"
        assert shards.row(8, 200, rate, *shards.simulated(one)) in rows
