"""What sbatch/prefetch.sh does: look whether the hub's cache has room, and fetch model, tokenizer and data sets."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Mapping

from fast_dllm.errors import UsageError
from fast_dllm.runner import failures, venv
from fast_dllm.runner.environment import evaluation_environment
from fast_dllm.runner.messages import say
from fast_dllm.runner.slurm import ask
from fast_dllm.spec.request import Request

GIB = 2**30
MODEL_SPACE = 20 * GIB  # the 7B's weights take 15 GB
# Start of each program below: an error is printed as one line, and libraries log nothing.
ONE_LINE = """
import logging, sys
logging.disable(logging.WARNING)
sys.excepthook = lambda kind, error, _: print(f"{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr)
"""
MODEL_CODE = f"{ONE_LINE}from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"
TASK_CODE = f"""{ONE_LINE}
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2]).load([sys.argv[1]])
print("data of", len(tasks["tasks"]), "task(s) is here")"""

# lm_eval asks for a scorer while it reads these tasks' definitions.
CODE_TASK_CODE = f"""{ONE_LINE}
from fast_dllm.evaluate.task_loading import load_data
print("data of", load_data(sys.argv[1]), "task(s) is here")"""


def is_on_hub(model: str) -> bool:
    """Whether the model is a hub id (owner/name), not a folder."""
    return "/" in model and not Path(model).is_absolute()


def check_space(request: Request) -> None:
    """Raises UsageError if the hub's cache cannot be written or is too small for the model."""
    place = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
        raise UsageError(f"the hub's cache {place} cannot be written to; set HF_HOME")
    worked, text = ask("df", "-Pk", "--", str(place))
    free = int(text.splitlines()[1].split()[3]) * 1024 if worked else shutil.disk_usage(place).free
    say(f"cache: {place}, {free // GIB} GiB free on its disk")
    if shutil.which("pace-quota"):
        subprocess.run(["pace-quota"], stdout=sys.stderr)
    if is_on_hub(request.model_or_default) and free < MODEL_SPACE:
        need = f"{MODEL_SPACE // GIB} GiB are needed for {request.model_or_default} and data sets"
        raise UsageError(f"{need}; set HF_HOME to a larger disk, such as ~/scratch/hf")


def keep(request: Request) -> int:
    """Touch the files of model, data and venv, so that no purge removes them. The doctor does it, as it finds them."""
    words = ["--task", ",".join(request.tasks), *(["--model", request.model] if request.model else [])]
    command = [sys.executable, "-m", "fast_dllm.doctor", "--keep", *words]
    return subprocess.run(command, cwd=str(request.root)).returncode


def fetch(request: Request) -> int:
    """Fetch the model and the data of the request's tasks; returns 1 if anything could not be fetched."""
    check_space(request)
    folder = venv.ensure(request.code_root, request.root, for_jobs=True)
    if folder is None:
        return 1
    environment = evaluation_environment(venv.environment_of(folder, os.environ), request.code_root)
    commands = {}
    if is_on_hub(request.model_or_default):
        commands[f"model {request.model_or_default}"] = ["-c", MODEL_CODE, request.model_or_default]
    runs = request.runs()
    if any(run.task.sentence_data for run in runs):
        commands["sentence data"] = ["-m", "fast_dllm.runner.nltk_data", str(folder)]
    for run in runs:
        code = CODE_TASK_CODE if run.task.code else TASK_CODE
        commands[f"task {run.task.name}"] = ["-c", code, run.task.name, str(request.code_root / "tasks")]
    missing = [name for name, command in commands.items() if not _fetch(name, ["python", *command], environment)]
    for name in missing:
        say(f"prefetch.sh: not fetched: {name}")
    return 1 if missing else 0


def _fetch(name: str, command: list[str], environment: Mapping[str, str]) -> bool:
    """Run the command and show its output; returns whether it worked, and says why if not. name: for people."""
    say(f"== {name}")
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environment)) as process:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            lines = [*lines[-200:], line.decode("utf-8", "replace")]
    if process.returncode:
        status = process.returncode if process.returncode > 0 else 128 - process.returncode
        say(f"{name}: {failures.TEXTS[failures.classify(status, ''.join(lines), False)]}")
    return process.returncode == 0
