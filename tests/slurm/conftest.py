"""A Slurm for these tests, started once; skipped where none is installed."""

import pytest
from cluster import Cluster, why_not
from slurm_project import LIMIT, TASK, SlurmProject


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory):
    """The numbers of k = 1, 2 and 3 without Slurm, in one piece: stored outputs give each subset the same tokens."""
    project = SlurmProject(tmp_path_factory.mktemp("undisturbed") / "project", cluster)
    configs = {k: f"k{k}_first" for k in (1, 2, 3)}
    words = ["--task", TASK, "--model", "tiny", "--limit", str(LIMIT), "--config", ",".join(configs.values())]
    project.bash("sbatch/local.sh", *words)
    return {k: project.numbers(config, LIMIT) for k, config in configs.items()}


@pytest.fixture
def project(cluster, tmp_path, request):
    """A copy of the repository whose jobs run on the cluster. When a test fails, their logs are printed."""
    project = SlurmProject(tmp_path / "lab's own project", cluster)
    yield project
    cluster.run("scancel", "--user=root", "--state=PENDING", check=False)
    cluster.run("scancel", "--user=root", check=False)
    cluster.wait_idle()
    if getattr(request.node, "failed", False):
        for log in sorted([*(project.root / "logs").rglob("*.log"), *project.root.glob("*.log")]):
            lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
            print(f"== {log.name}", *[line for line in lines if "req/s" not in line][-25:], sep="\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call" and outcome.get_result().failed:
        item.failed = True
