"""The environment of an evaluation: sbatch/cluster.env, the variables that libraries read, GPUs, the job's number."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Mapping

from fast_dllm.errors import UsageError

# What lm_eval, CUDA and the hub read; a value that the user has set stays.
DEFAULTS = {
    "HF_ALLOW_CODE_EVAL": "1",
    "HF_DATASETS_TRUST_REMOTE_CODE": "true",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def load_cluster_settings(root: Path) -> None:
    """Set the variables of sbatch/cluster.env (NAME=value lines); a variable that is set stays. Raises UsageError."""
    path = root / "sbatch" / "cluster.env"
    if not path.is_file():
        return
    settings = {}
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")  # a file that was written on Windows
        if re.fullmatch(r"\s*(#.*)?", line):
            continue
        match = re.fullmatch(r"([A-Z_][A-Z0-9_]*)=(.*)", line)
        if not match:
            raise UsageError(f"sbatch/cluster.env, line {number} is not NAME=value: {line!r}")
        settings[match[1]] = match[2]
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def evaluation_environment(activated: Mapping[str, str], code_root: Path) -> dict[str, str]:
    """The environment of an evaluation with the code of `code_root`. activated: that of the venv."""
    environment = {**DEFAULTS, **activated}
    environment["PYTHONPATH"] = str(code_root)
    environment["PYTHONUNBUFFERED"] = "1"
    # accelerate replaces OMP_NUM_THREADS
    environment.setdefault("FAST_DLLM_NUM_THREADS", environment.get("OMP_NUM_THREADS") or "auto")
    return environment


def has_gpu() -> bool:
    """Whether nvidia-smi sees a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        done = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(line.startswith(b"GPU") for line in done.stdout.splitlines())


def stderr_file(root: Path) -> str:
    """The file that stderr goes to, relative to the project if it is inside; "" where it is no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    if not Path(path).is_file():
        return ""
    prefix = f"{root}{os.sep}"
    return path[len(prefix) :] if path.startswith(prefix) else path
