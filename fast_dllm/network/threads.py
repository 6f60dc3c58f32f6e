"""How many threads a CPU's products are shared among: decided here for every program.

A product that is shared waits for the last of its threads. On two busy cores a product of 8 x 64 took 2 to 13 ms with
two threads, waiting for one that had no core, and 0.02 ms with one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from fast_dllm.network.model import FastDLLMForCausalLM

SMALL = 30_000_000  # parameters up to which a forward's products are too small to share
# The first that is set counts. The job scripts hand on in their own variable what the user has set, or `auto`:
# accelerate sets the other one to 1 where nobody has.
VARIABLES = ("FAST_DLLM_NUM_THREADS", "OMP_NUM_THREADS")


def fit_threads(model: FastDLLMForCausalLM, environment: Mapping[str, str] = os.environ) -> int:
    """Set torch's number of threads for this model, and return it: what the user's OMP_NUM_THREADS says; else one for a
    small model, and for another one for each core that is free. On a GPU torch's own number stays."""
    wanted = next((environment[name] for name in VARIABLES if environment.get(name)), "auto").split(",")[0]
    if wanted.isdecimal() and int(wanted):
        torch.set_num_threads(int(wanted))
    elif model.device.type == "cpu":
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
        torch.set_num_threads(1 if is_small else free_cores(environment))
    return torch.get_num_threads()


def free_cores(environment: Mapping[str, str] = os.environ) -> int:
    """Of the cores that this process may use, those that others leave, shared with the processes that were launched
    beside it; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = environment.get("SLURM_CPUS_PER_TASK", "")
    if given.isdecimal() and int(given):
        return max(min(cores, int(given)), 1)  # a job's cores are its own, whatever else loads the node
    processes = environment.get("LOCAL_WORLD_SIZE", "")
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max((cores - busy) // (int(processes) if processes.isdecimal() and int(processes) else 1), 1)
