"""run.sh --rehearse on a real Slurm: a job is really ended by it, and the one that waits goes on."""

import re

import pytest
from cluster import wait_for
from slurm_project import TASK

pytestmark = pytest.mark.slurm
STEPS = ["account, QOS and GPU type", "queue", "venv", "interruption", "hub access", "continuation", "artifacts"]


def steps(output):
    return re.findall(r"^(ok|fail) +([^:\n]+): ", output, re.MULTILINE)


def test_every_step_works_but_the_gpu_which_this_machine_has_not(project):
    kept = {
        path: path.read_bytes() for top in ("results", "artifacts") for path in (project.root / top).rglob("*.json")
    }
    words = ["sbatch/run.sh", "--rehearse", "--task", TASK, "--model", "tiny", "k2_middle"]
    done = project.bash(*words, check=False, SBATCH_QOS="embers")
    assert steps(done.stdout) == [*(("ok", step) for step in STEPS), ("fail", "GPU")], done.stdout + done.stderr
    assert done.returncode == 1
    first, second = re.search(r"job (\d+) went on where job (\d+) was ended", done.stdout).groups()[::-1]
    wait_for("the accounting to know both", lambda: project.cluster.state(second) == "COMPLETED")
    assert project.cluster.state(first) == "TIMEOUT"
    wait_for("the queue to be empty", lambda: not project.cluster.run("squeue", "-h").stdout)
    assert not (project.root / "results").exists()
    now = {path: path.read_bytes() for top in ("results", "artifacts") for path in (project.root / top).rglob("*.json")}
    assert now == kept


@pytest.mark.parametrize(
    ("settings", "told"), [({"SBATCH_ACCOUNT": "gts-nobody"}, "gts-nobody"), ({"SBATCH_QOS": "nosuch"}, "nosuch")]
)
def test_what_slurm_refuses_is_said_before_anything_waits(project, settings, told):
    before = len(project.cluster.jobs())
    done = project.bash("sbatch/run.sh", "--rehearse", "--task", TASK, "--model", "tiny", check=False, **settings)
    assert done.returncode == 1
    assert steps(done.stdout) == [("fail", STEPS[0])]
    assert told in done.stdout
    assert len(project.cluster.jobs()) == before
