"""The processes of one evaluation: what lm_eval's evaluator asks of a model that runs in several processes."""

from __future__ import annotations

from typing import Any

import torch

from fast_dllm.spec.launch import launched_processes


class Processes:
    """The processes that `accelerate launch` or torchrun started for this evaluation; by default this one alone.

    rank: this process's number, from 0. count: how many there are. device: the name of this process's device.
    """

    def __init__(self, device: str):
        """Join the processes. device: the one that the user asked for."""
        self.rank, self.count, self.device = 0, 1, device
        if launched_processes() == 1:
            return
        from accelerate import Accelerator  # with all that it imports, for several processes only

        # Without a GPU and without this argument, accelerate takes every process for the only one.
        self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.device = str(self._accelerator.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.count == 1 else self._accelerator.gather(tensor)

    def gather_object(self, value: Any, destination: int = 0) -> list[Any] | None:
        """The values of all processes, on the process `destination`; None on the others."""
        if self.count == 1:
            return [value]
        gathered = [None] * self.count if self.rank == destination else None
        torch.distributed.gather_object(value, gathered, dst=destination)
        return gathered

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Wait until every process is done, then end the group.

        Otherwise a process may crash at its exit, because gloo's threads still run, and the launcher then ends the
        processes that still write results.
        """
        if self.count > 1:
            self._accelerator.wait_for_everyone()
            self._accelerator.end_training()
