"""run.sh --rehearse with the pretended Slurm: what each step says, what a failed one says, and what is left behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from script_project import FAKES, Project

GPU = '"NVIDIA of the test"'


class Cluster(Project):
    """Starts each submitted job as Slurm would: at once, or when the job that it waits for has failed.

    evaluations: what the evaluation of the first job, of the second, ... does ($FAKE_EVAL).
    """

    def __init__(self, folder: Path, *evaluations: str, reason: str = "") -> None:
        super().__init__(folder)
        (self.state / "bin" / "scontrol").symlink_to(FAKES / "slurm")
        self.evaluations_of_jobs, self.reason = evaluations, reason
        self.processes: dict[str, subprocess.Popen] = {}
        self.is_over = threading.Event()

    def rehearse(self, *words: str, **extra: str) -> subprocess.CompletedProcess:
        thread = threading.Thread(target=self.be_slurm)
        thread.start()
        try:
            options = ["--task", "toy_math", "--model", "tiny", *words]
            return self.bash("sbatch/run.sh", "--rehearse", *options, timeout=180, **extra)
        finally:
            self.is_over.set()
            thread.join(30)
            for process in self.processes.values():
                self.end(process)

    def be_slurm(self) -> None:
        while not self.is_over.is_set():
            for file in sorted((self.state / "jobs").iterdir()):
                fields = file.read_text().strip().split("|")
                if fields[0] == "PENDING" and file.name not in self.processes:
                    if self.reason:
                        file.write_text("|".join([fields[0], self.reason, *fields[2:]]) + "\n")
                    elif fields[1] != "Dependency" or self.has_failed(self.before(file.name)):
                        self.start(file, fields)
                elif fields[0] == "RUNNING" and file.name in self.processes:
                    self.follow(file, fields)
            time.sleep(0.1)

    def command(self, job: str) -> list[str]:
        return shlex.split((self.state / "ids" / job / "command").read_text())

    def before(self, job: str) -> str:
        return next(word.rpartition(":")[2] for word in self.command(job) if word.startswith("--dependency="))

    def has_failed(self, job: str) -> bool:
        return (self.state / "jobs" / job).read_text().split("|")[0] in ("FAILED", "TIMEOUT")

    def start(self, file: Path, fields: list[str]) -> None:
        folder, words = Path(fields[3]), self.command(file.name)
        place = next(number for number, word in enumerate(words) if word.endswith(".sh"))
        log = next(word.partition("=")[2] for word in words if word.startswith("--output="))
        spool = self.state / f"spool_script_{file.name}"
        shutil.copy(folder / words[place], spool)
        file.write_text("|".join(["RUNNING", "None", *fields[2:]]) + "\n")
        environment = self.environment | {
            "SLURM_JOB_ID": file.name,
            "SLURM_SUBMIT_DIR": str(folder),
            "FAKE_EVAL": self.evaluations_of_jobs[len(self.processes)],
            "FAKE_GPU": GPU if self.has_gpu else "null",
        }
        with (folder / log.replace("%j", file.name)).open("a") as output:
            self.processes[file.name] = subprocess.Popen(
                ["bash", str(spool), *words[place + 1 :]],
                cwd="/",
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    has_gpu = True

    def follow(self, file: Path, fields: list[str]) -> None:
        """End a job whose time limit was lowered, and note how one has ended."""
        process = self.processes[file.name]
        lowered = any(f"JobId={file.name} TimeLimit=1" in call for call in self.calls("scontrol"))
        if lowered:
            self.end(process)
        if process.poll() is not None:
            state = "TIMEOUT" if lowered else "FAILED" if process.returncode else "COMPLETED"
            file.write_text("|".join([state, "None", *fields[2:]]) + "\n")

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def steps(result: subprocess.CompletedProcess) -> list[tuple[str, str]]:
    """(ok or fail, the check) of each line."""
    return re.findall(r"^(ok|fail) +([^:\n]+): ", result.stdout, re.MULTILINE)


def files(cluster: Project) -> set[str]:
    return {path for path in cluster.written() if not path.startswith("logs")}


@pytest.mark.parametrize("model", ["tiny", pytest.param("a model of its own", marks=pytest.mark.slow)])
def test_all_that_works_is_said_and_nothing_is_left_behind(tmp_path, model):
    cluster = Cluster(tmp_path / "project", "sleep", "ok")
    if model != "tiny":
        shutil.copytree(cluster.root / "models" / "tiny", cluster.root / model)
    before = files(cluster)
    result = cluster.rehearse("--model", model)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["account, QOS and GPU type", "queue", "venv", "interruption", "continuation", "artifacts", "GPU"]
    names.insert(names.index("interruption" if model != "tiny" else "continuation"), "hub access")
    assert steps(result) == [("ok", name) for name in names]
    assert "job 2 went on where job 1 was ended" in result.stdout
    assert all(re.search(r"\(\d+ s\)$", line) for line in result.stdout.splitlines() if line.startswith("ok "))
    assert "all of it works: " in result.stdout
    assert "NVIDIA of the test" in result.stdout
    assert files(cluster) == before
    assert not any((cluster.root / "logs" / "rehearsal").iterdir())
    assert "--limit 2" in cluster.evaluations()[0]
    settings = (cluster.state / "ids" / "1" / "settings").read_text()
    assert "SBATCH_TIMELIMIT=00:30:00" in settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluations", "failed", "told"),
    [
        (("fail:Max retries exceeded with url",), "hub access", "next: bash sbatch/prefetch.sh --task toy_math"),
        (("sleep", "fail:Traceback"), "continuation", "job 2 ended: code error; next: squeue --me"),
    ],
)
def test_a_step_that_fails_is_named_with_the_next_thing_to_try(tmp_path, evaluations, failed, told):
    cluster = Cluster(tmp_path / "project", *evaluations)
    result = (
        cluster.rehearse("--model", "tiny") if failed != "hub access" else cluster.rehearse("--model", "models/tiny")
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert steps(result)[-1] == ("fail", failed)
    assert told in result.stdout
    assert [*(cluster.root / "logs" / "rehearsal").iterdir()]  # the log is there to be read
    assert not any("RUNNING" in file.read_text() for file in (cluster.state / "jobs").iterdir())


@pytest.mark.slow
def test_a_run_without_a_gpu_fails_at_the_end(tmp_path):
    cluster = Cluster(tmp_path / "project", "sleep", "ok")
    cluster.has_gpu = False
    result = cluster.rehearse()
    assert result.returncode == 1
    assert steps(result)[-2:] == [("ok", "artifacts"), ("fail", "GPU")]


def test_a_job_that_never_starts_is_cancelled(tmp_path):
    cluster = Cluster(tmp_path / "project", reason="QOSMaxWallDurationPerJobLimit")
    result = cluster.rehearse()
    assert result.returncode == 1
    assert steps(result)[-1] == ("fail", "queue")
    assert "its wall time is longer than its QOS or account allows" in result.stdout
    assert cluster.calls("scancel") == ["scancel 1"]


def test_a_submission_that_slurm_refuses(tmp_path):
    cluster = Cluster(tmp_path / "project")
    (cluster.state / "sbatch.fail").write_text("sbatch: error: Invalid account\n")
    result = cluster.rehearse()
    assert result.returncode == 1
    assert steps(result) == [("fail", "account, QOS and GPU type")]
    assert "Invalid account" in result.stderr
    assert "next: python -m fast_dllm.doctor --task toy_math --model tiny" in result.stdout


@pytest.mark.parametrize("words", [["--limit", "3"], ["k1_first", "k2_first"]])
def test_an_option_that_it_decides_itself_is_one_line(tmp_path, words):
    project = Project(tmp_path / "project")
    before = project.written()
    result = project.run("--rehearse", *words)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "--rehearse" in result.stderr
    assert project.written() == before


def test_without_slurm_it_says_so(tmp_path):
    project = Project(tmp_path / "project", slurm=False)
    result = project.run("--rehearse")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "no sbatch here" in result.stderr
