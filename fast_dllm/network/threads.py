"""How many threads compute a matrix product on a CPU: one rule for every program.

A product waits for the last of its threads. On two busy cores a product of 8 x 64 took 2 to 13 ms with two threads,
one of which waited for a core, and 0.02 ms with one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from fast_dllm.network.model import FastDLLMForCausalLM

SMALL = 30_000_000  # up to this many parameters, a forward's products are too small for several threads
# The first that is set counts. The job scripts pass the user's value, or `auto`, in a variable of their own, because
# accelerate sets OMP_NUM_THREADS to 1 where the user has not set it.
VARIABLES = ("FAST_DLLM_NUM_THREADS", "OMP_NUM_THREADS")


def fit_threads(model: FastDLLMForCausalLM, environment: Mapping[str, str] = os.environ) -> int:
    """Set torch's number of threads for this model, and return it.

    The number that the user has set (VARIABLES) counts. Else it is one for a small model on a CPU and one per free core
    for a larger one. For a model on a GPU torch's default stays.
    """
    setting = next((environment[name] for name in VARIABLES if environment.get(name)), "auto").split(",")[0]
    if setting.isdecimal() and int(setting):
        torch.set_num_threads(int(setting))
    elif model.device.type == "cpu":
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
        torch.set_num_threads(1 if is_small else free_cores(environment))
    return torch.get_num_threads()


def free_cores(environment: Mapping[str, str] = os.environ) -> int:
    """How many cores this process may use, at least one: a job's cores under Slurm, else those that are idle now.

    Processes that were launched together divide the idle ones.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job_cpus = environment.get("SLURM_CPUS_PER_TASK", "")
    if job_cpus.isdecimal() and int(job_cpus):
        return max(min(cores, int(job_cpus)), 1)  # Slurm reserves a job's cores, whatever else runs on the node
    processes = environment.get("LOCAL_WORLD_SIZE", "")
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max((cores - busy) // (int(processes) if processes.isdecimal() and int(processes) else 1), 1)
