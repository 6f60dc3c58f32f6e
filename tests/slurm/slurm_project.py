"""A copy of this repository, its scripts and its tiny model, as a user of the cluster has it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster import Cluster, wait_for

from fast_dllm.runner.venv import location

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("sbatch", "fast_dllm", "experiments", "tasks", "models")
FILES = ("eval.py", "generation_functions.py", "pyproject.toml", "constraints.txt")
TASK = "toy_math"
LIMIT = 24  # questions of a run that is disturbed


def venv_of_this_run() -> str:
    """Where this checkout's scripts keep their venv: the copy's requirements are the same, so it is not built again."""
    return str(location(ROOT))


class SlurmProject:
    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.root, self.cluster = folder, cluster
        folder.mkdir(parents=True)
        for part in PARTS:
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "cluster.env"))
        for file in FILES:
            shutil.copy(ROOT / file, folder)
        # as on PACE: an account has to be named. One thread each: the nodes are one small machine.
        self.environment = cluster.environment | {
            "SBATCH_ACCOUNT": "gts-lab",
            "FAST_DLLM_VENV": venv_of_this_run(),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def bash(self, *arguments: str, check: bool = True, **extra: str) -> subprocess.CompletedProcess:
        result = subprocess.run(
            ["bash", *arguments],
            cwd=self.root,
            env=self.environment | extra,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    def submit(self, limit: int, *arguments: str, **extra: str) -> str:
        words = ["--task", TASK, "--model", "tiny", "--limit", str(limit)]
        return self.bash("sbatch/run.sh", *words, *arguments, **extra).stdout

    def status(self, limit: int) -> dict[str, dict]:
        words = ["--status", "--json", "--task", TASK, "--limit", str(limit)]
        entries = json.loads(self.bash("sbatch/run.sh", *words).stdout)["configurations"]
        return {entry["config"]: entry for entry in entries}

    def folder(self, config: str, limit: int, task: str = TASK) -> Path:
        return self.root / "results" / "00_baseline" / f"{task}_limit_{limit}" / config

    def summary(self, config: str, limit: int, task: str = TASK) -> dict:
        return json.loads((self.folder(config, limit, task) / "summary.json").read_text())

    def numbers(self, config: str, limit: int, task: str = TASK) -> dict:
        """What must not depend on what happened on the way."""
        summary = self.summary(config, limit, task)
        names = ("forwards", "new_tokens", "requests", "tokens_per_forward")
        throughput = {name: summary["throughput"].get(name) for name in names}  # no tokens where letters are scored
        return throughput | {name: summary[name] for name in ("accuracy", "accuracy_stderr", "num_samples", "subtasks")}

    def answered(self, config: str, limit: int, share: str = "") -> int:
        """Batches on disk, of a share ("0-of-2") or of the whole run."""
        files = self.folder(config, limit).glob(f"answers/*/*{share and f'.shard{share}.rank0'}.jsonl")
        return sum(file.read_bytes().count(b"\n") for file in files)

    def hold_after_an_answer(self, config: str, limit: int, share: str = "") -> None:
        """Stop the evaluation once it has answered, so that it is under way however fast the machine is. Slurm wakes up
        (SIGCONT) what it ends."""
        wait_for(f"an answer of {config}", lambda: self.answered(config, limit, share), 240, every=0.05)
        processes = self.processes(config, limit, share)
        assert processes, "it was over before it could be stopped"
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        assert self.answered(config, limit, share) < limit

    def hold_shares(self, config: str, limit: int, *shares: str) -> None:
        """`hold_after_an_answer`, of all at once: in turns, the last may be over before the first has begun."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda share: self.hold_after_an_answer(config, limit, share), shares))

    def wait_state(self, config: str, limit: int, state: str, seconds: float = 300) -> dict:
        def reached() -> dict | None:
            entry = self.status(limit)[config]
            assert state == "failed" or entry["state"] != "failed", entry
            return entry if entry["state"] == state else None

        return wait_for(f"{config} to be {state}", reached, seconds, every=1)

    def jobs(self, config: str, limit: int) -> list[dict[str, str]]:
        return self.jobs_named(f"00_baseline/{TASK}_limit_{limit}/{config}")

    def jobs_named(self, name: str) -> list[dict[str, str]]:
        return [job for job in self.cluster.jobs() if job["JobName"] == name and job["WorkDir"] == str(self.root)]

    def processes(self, config: str, limit: int, share: str = "") -> list[int]:
        """The evaluation's processes, by their command line."""
        names = f"\0--configurations\0{config}\0", f"\0--output_path\0results/00_baseline/{TASK}_limit_{limit}/\0"
        words = share and f"\0--shard\0{share.replace('-of-', '/')}\0"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    cwd, command = (entry / "cwd").readlink(), (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if all(text.encode() in command for text in (*names, words)) and cwd == self.root:
                    found.append(int(entry.name))
        return found
