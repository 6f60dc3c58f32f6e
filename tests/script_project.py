"""A copy of the scripts in a folder of its own with stand-ins for Slurm, uv and the evaluation, to test sbatch/."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path

from fast_dllm.spec.hashes import decoding_sha256

ROOT = Path(__file__).resolve().parent.parent
FAKES = ROOT / "tests" / "fake_slurm"
CONFIGS = [f"k{k}_{subset}" for k in (1, 2, 3) for subset in ("first", "middle", "last")]
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # safetensors: the header's length, and a header without tensors
CODE = "def generate(): ...\n"


@functools.cache
def system_tools(without: str = "") -> Path:
    """A folder with links to the ordinary programs, so that a Slurm, uv or GPU of this machine is not found."""
    tools = Path(tempfile.mkdtemp(prefix="system_tools_"))
    atexit.register(shutil.rmtree, tools)
    hidden = {"sbatch", "squeue", "sacct", "sacctmgr", "scancel", "sinfo", "scontrol", "uv", "nvidia-smi"}
    for folder in ("/usr/bin", "/bin", "/usr/local/bin"):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            hide = program.name in hidden or (without and program.name.startswith(without))
            if not hide and not os.path.lexists(tools / program.name):  # also one that leads nowhere
                (tools / program.name).symlink_to(program)
    return tools


def old_pythons() -> list[str]:
    """Pythons before 3.10, the oldest first: pyenv's, and those on PATH."""
    folders = [*Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/3.*/bin")]
    folders += map(Path, os.environ["PATH"].split(os.pathsep))
    found = {}
    for minor in (8, 9):
        programs = (folder / f"python3.{minor}" for folder in folders)
        found[minor] = next((str(program) for program in programs if program.is_file()), None)
    return [program for program in found.values() if program]


NODE_PYTHON = """#!{python}
'''Stands in for python3 on the node $FAKE_NODE: a program that it runs sees that host name.'''
import os, runpy, socket, sys

words = sys.argv[1:]
while words and words[0] in ("-B", "-S", "-BS", "-u", "-X"):
    words = words[2:] if words[0] == "-X" else words[1:]
if "FAKE_NODE" not in os.environ or not words or words[0].startswith("-"):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
system = os.uname()
os.uname = lambda: os.uname_result((system.sysname, os.environ["FAKE_NODE"], *system[2:]))
socket.gethostname = lambda: os.environ["FAKE_NODE"]
sys.dont_write_bytecode = True
sys.argv = words
runpy.run_path(words[0], run_name="__main__")
"""


@functools.cache
def template() -> Path:
    """A project folder that each Project copies; with compiled modules, because the scripts write no bytecode."""
    folder = Path(tempfile.mkdtemp(prefix="project_template_"))
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(ROOT / "sbatch", folder / "sbatch", ignore=shutil.ignore_patterns("cluster.env"))
    for name in ("pyproject.toml", "constraints.txt", "setup_tmpdir_venv.sh"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "fast_dllm", folder / "fast_dllm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tasks").mkdir()
    shutil.copy(ROOT / "tasks" / "tasks.json", folder / "tasks")
    python = shutil.which("python3", path=str(system_tools()))
    subprocess.run([str(python), "-m", "compileall", "-q", str(folder / "fast_dllm")], check=True)
    return folder


@functools.cache
def decoding_hash() -> str:
    """The decoding hash of the package as each new Project has it."""
    return decoding_sha256(template())


def pretend_model(folder: Path) -> Path:
    """The files that a checkpoint must have, without anything in them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(NO_WEIGHTS)
    return folder


class Project:
    """A project folder and the environment its scripts run in. `slurm`: False leaves Slurm's commands off the PATH."""

    def __init__(self, folder: Path, slurm: bool = True) -> None:
        self.root = folder
        self.state = folder.parent / "fake_slurm_state"
        for name in ("jobs", "ids", "bin", "home"):
            (self.state / name).mkdir(parents=True)
        subprocess.run(["cp", "-a", str(template()), str(folder)], check=True)  # several times as fast as shutil
        for name in ("models/tiny", "experiments/00_baseline", "experiments/01_other"):
            (folder / name).mkdir(parents=True)
            (folder / name / "a file").write_text("")
        pretend_model(folder / "models" / "tiny")
        (folder / "eval.py").write_text("")
        for name in ("00_baseline", "01_other"):
            (folder / "experiments" / name / "generation_functions.py").write_text(CODE)
        for name in ("sbatch", "squeue", "sacct", "scancel") if slurm else ():
            (self.state / "bin" / name).symlink_to(FAKES / "slurm")
        for name in ("fake_uv", "fake_accelerate"):
            shutil.copy(
                FAKES / name, self.state / "bin" / name.removeprefix("fake_").replace("accelerate", "fake_accelerate")
            )
        # only what scripts may expect everywhere: no Slurm, nvidia-smi or Python of this machine
        self.environment = {
            "PATH": f"{self.state / 'bin'}:{system_tools()}",
            "HOME": str(self.state / "home"),
            "FAST_DLLM_VENV": str(self.state / "venv"),
            "FAKE_SLURM": str(self.state),
            "FAKE_UV_LOG": str(self.state / "uv.log"),
            "LC_ALL": "C.UTF-8",
        }

    # -- running -------------------------------------------------------------------------------------------------------
    def bash(self, *arguments: str, timeout: float = 120, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", *arguments],
            cwd=self.root,
            env=self.environment | extra,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess:
        return self.bash("sbatch/run.sh", *arguments, **extra)

    def start_job(self, job_id: str, *arguments: str, script: str = "sbatch/_job.sh", **extra: str) -> subprocess.Popen:
        """A script as Slurm runs it: a copy of it, from another place, its output in the log file. "12_3" is number 3
        of an array."""
        spool = self.state / f"spool_script_{job_id}"
        shutil.copy(self.root / script, spool)
        self.set_job(job_id, "RUNNING")
        log = self.root / "logs" / f"job_{job_id}.log"
        log.parent.mkdir(exist_ok=True)
        array, _, number = job_id.partition("_")
        job = {"SLURM_JOB_ID": job_id.replace("_", "00"), "SLURM_SUBMIT_DIR": str(self.root)}
        job |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": number} if number else {}
        with log.open("a") as file:
            return subprocess.Popen(
                ["bash", "-c", 'export SLURM_TASK_PID=$$; exec bash "$@"', "-", str(spool), *arguments],
                cwd="/",
                env=self.environment | job | extra,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def job(self, job_id: str, *arguments: str, **extra: str) -> int:
        """The exit status of a script that Slurm runs to its end."""
        status = self.start_job(job_id, *arguments, **extra).wait(120)
        self.set_job(job_id, "FAILED" if status else "COMPLETED")
        return status

    def successor(self, number: int = -1) -> tuple[str, list[str]]:
        """The script and the options of a submitted job, of those there are the last one."""
        commands = sorted((self.state / "ids").glob("*/command"), key=lambda file: int(file.parent.name))
        words = shlex.split(commands[number].read_text())
        start = next(place for place, word in enumerate(words) if word.endswith(".sh"))
        return words[start], words[start + 1 :]

    def pretend_nodes(self) -> None:
        """From now on the scripts' Python believes that it is on the node $FAKE_NODE, where that is set."""
        python = shutil.which("python3", path=self.environment["PATH"])
        program = self.state / "bin" / "python3"
        program.write_text(NODE_PYTHON.replace("{python}", str(python)))
        program.chmod(0o755)

    # -- the pretended cluster -----------------------------------------------------------------------------------------
    def set_job(
        self, job_id: str, state: str, name: str | None = None, reason: str = "None", folder: str | None = None
    ):
        file = self.state / "jobs" / job_id
        if name is None:
            name = file.read_text().strip().split("|")[2] if file.exists() else "unnamed"
        file.write_text(f"{state}|{reason}|{name}|{folder or self.root}\n")

    def calls(self, command: str) -> list[str]:
        log = self.state / "calls.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.split(" ")[0] == command]

    def submitted(self) -> list[str]:
        """Names of the jobs that exist, in the order of their ids."""
        files = sorted((self.state / "jobs").iterdir(), key=lambda file: [*map(int, file.name.split("_"))])
        return [file.read_text().split("|")[2] for file in files]

    def evaluations(self) -> list[str]:
        log = self.state / "evaluations.log"
        return log.read_text().splitlines() if log.exists() else []

    # -- results -------------------------------------------------------------------------------------------------------
    def folder(self, config: str, task: str = "gsm8k", experiment: str = "00_baseline", top: str = "results") -> Path:
        folder = self.root / top / experiment / task / config
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def summary(self, folder: str, top: str = "results", **changes: object) -> Path:
        """Write a summary that is complete, but for the changes."""
        content = {
            "schema_version": 1,
            "experiment": "00_baseline",
            "task": "gsm8k",
            "config": folder,
            "limit": None,
            "num_samples": 1319,
            "num_samples_expected": 1319,
            "accuracy": 0.7369,
            "accuracy_stderr": 0.012,
            "metric": "exact_match,flexible-extract",
            "generation_code_sha256": sha256(CODE.encode()).hexdigest(),
            "decoding_sha256": decoding_hash(),
            "model_args": {"model_path": "Efficient-Large-Model/Fast_dLLM_v2_7B", "threshold": 0.9},
            "throughput": {"tokens_per_second": 48.9, "forwards": {"full": 1, "sub": 2}},
            "seeds": [0, 1234, 1234, 1234],
        } | changes
        path = self.folder(folder, top=top) / "summary.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path

    def statuses(self, *arguments: str, **extra: str) -> dict[str, str]:
        """What --status says of each configuration: "complete", or the text in the parentheses."""
        result = self.run("--status", *arguments, **extra)
        assert result.returncode == 0, result.stderr
        found = {}
        for line in result.stdout.splitlines():
            if line.startswith(("  ✓ ", "  ✗ ")):
                name, _, detail = line[4:].partition(" (")
                found[name] = "✓ " * line.startswith("  ✓ ") + detail.removesuffix(")")
        return found

    def written(self) -> set[str]:
        """Every path in the project, to see that nothing was written."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
