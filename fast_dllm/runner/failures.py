"""Classifies why a run failed, from its log, its exit status and the kernel's counters, and writes failure.json."""

from __future__ import annotations

import os
import re
import socket
from datetime import datetime, timezone
from pathlib import Path

from fast_dllm.spec.files import printable, write_json

MOST_LOG_BYTES = 20000  # of the end of a log
INTERRUPTED = 130  # the exit status after Ctrl-C, as a shell has it: 128 + SIGINT

TEXTS = {
    "time_limit": "time limit reached",
    "preemption": "preempted",
    "node_failure": "node failure",
    "cancelled": "cancelled",
    "terminated": "told to stop",
    "interrupted": "interrupted by Ctrl-C",
    "killed": "killed by signal 9",
    "host_oom": "out of host memory",
    "gpu_oom": "out of GPU memory",
    "disk_quota": "disk full or over quota",
    "dataset_access": "no access to the data set or model "
    "(gated: ask for it on its page of the hub, then: hf auth login)",
    "hub_network": "hub not reachable, or not in the local cache",
    "wrong_input": "wrong input",
    "venv": "no venv",
    "not_finite": "the model's logits are no numbers",
    "code_error": "code error",
    "no_progress": "no progress in two jobs",
    "no_result": "ended without a result",
}
# Failures after which another job continues the run by itself. A code error would only happen again.
CONTINUED = ("time_limit", "preemption", "node_failure")

# Searched for in the last lines of the run's log; the first match counts. Lack of memory comes first, because it causes
# other errors. The data set comes before the network, because a refused download also mentions HTTP.
PATTERNS = (
    (
        "gpu_oom",
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|torch\.(cuda\.)?OutOfMemoryError",
    ),
    (
        "host_oom",
        r"oom.kill|Out Of Memory|^MemoryError|Cannot allocate memory|DefaultCPUAllocator: .*allocate memory",
    ),
    ("not_finite", r"^eval\.py: .*logits are not finite"),
    ("disk_quota", r"No space left on device|Disk quota exceeded"),
    (
        "dataset_access",
        r"GatedRepoError|gated (dataset|repo)|(401|403) Client Error|Access to (dataset|model) .* is restricted",
    ),
    (
        "hub_network",
        r"Max retries exceeded|Name or service not known|name resolution|Connection(Error| refused| reset)"
        r"|ConnectTimeout|OfflineMode|LocalEntryNotFoundError|LocalEntryNotFound|Couldn.t reach|couldn.t connect to"
        r"|Network is unreachable|could not be fetched|the hub does not answer",
    ),
)
# slurmstepd writes the reason before it sends the signal, often into the line of a progress bar:
# "slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT ... DUE TO TIME LIMIT ***"
_DUE = (
    ("DUE TO TIME LIMIT", "time_limit"),
    ("DUE TO PREEMPTION", "preemption"),
    ("DUE TO NODE FAIL", "node_failure"),
    ("CANCELLED", "cancelled"),
)
_STATES = (
    ("TIMEOUT", "time_limit"),
    ("DEADLINE", "time_limit"),
    ("PREEMPTED", "preemption"),
    ("NODE_FAIL", "node_failure"),
    ("BOOT_FAIL", "node_failure"),
    ("OUT_OF_MEMORY", "host_oom"),
    ("CANCELLED", "cancelled"),
    ("FAILED", "code_error"),
    ("COMPLETED", "no_result"),
)


def class_of_state(state: str) -> str:
    """The failure class of "state|exit code:signal", as sacct writes it; "" for a job that has not ended."""
    if re.match(r"FAILED.*:9$", state):
        return "killed"
    return next((name for start, name in _STATES if state.startswith(start)), "")


def cgroup_oom() -> bool:
    """Whether the kernel killed a process of this job for lack of memory. Reads the cgroup, version 2 then 1."""
    if not os.environ.get("SLURM_JOB_ID"):
        return False
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return False
    for pattern, file in (
        (r"^0::(.+)$", "/sys/fs/cgroup{}/memory.events"),
        (r"^\d+:memory:(.+)$", "/sys/fs/cgroup/memory{}/memory.oom_control"),
    ):
        group = re.search(pattern, groups, re.MULTILINE)
        try:
            if group and re.search(r"^oom_kill [1-9]", Path(file.format(group[1])).read_text(), re.MULTILINE):
                return True
        except OSError:
            continue
    return False


def classify(status: int, text: str, received_sigterm: bool) -> str:
    """The failure class of a run. text: the run's part of the log. received_sigterm: this process received SIGTERM."""
    job = re.escape(os.environ.get("SLURM_JOB_ID") or "none")
    ended = re.findall(rf"slurmstepd[^ \n]*: error: \*\*\* (?:JOB|STEP) {job}[ .].*", text)
    for words, name in _DUE if ended else ():
        if words in ended[-1]:
            return name
    if received_sigterm:
        return "terminated"
    if status == INTERRUPTED:
        return "interrupted"
    if status == 2:
        return "wrong_input"
    for name, pattern in PATTERNS:
        if re.search(pattern, text, re.MULTILINE):
            return name
    # accelerate's launcher turns the death of eval.py into a silent status 1
    if status == 137 or not re.search(r"Traceback|[Ee]rror", text):
        return "host_oom" if cgroup_oom() else "killed"
    return "code_error"


def end_of(log: Path, start: int = 0) -> str:
    """The last MOST_LOG_BYTES of a log, at most from byte `start` on."""
    try:
        with Path(log).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - MOST_LOG_BYTES))
            return file.read().replace(b"\0", b"").decode("utf-8", "replace")
    except OSError:
        return ""


def current_job() -> str:
    """The id of the job that this process runs in, "123_4" for one of an array; "" outside Slurm."""
    array, number = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{number}" if array and number else os.environ.get("SLURM_JOB_ID", "")


def write_failure(folder: Path, name: str, status: int, log: str, text: str) -> None:
    """Write failure.json. name: the class; status: the exit status; log: the log's path; text: the run's part of it."""
    lines = [line for line in text.replace("\r", "\n").split("\n") if line.strip(" ")]
    record = {
        "schema_version": 1,
        "class": name,
        "message": TEXTS[name],
        "exit_code": status,
        "job_id": current_job(),
        "host": socket.gethostname(),
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "log": printable(log),
        "last_lines": printable("\n".join(lines[-15:]).replace("\t", " "), keep="\n"),
    }
    write_json(Path(folder) / "failure.json", record)
