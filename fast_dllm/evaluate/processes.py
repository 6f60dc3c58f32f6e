"""A place among the processes of one evaluation: what lm_eval's evaluator asks of a model that runs in several."""

from __future__ import annotations

import os

import torch
from lm_eval.api.model import TemplateLM


class ProcessesLM(TemplateLM):
    """The part of the harness's model that knows of the other processes. Call `_join_processes` first."""

    def _join_processes(self, device: str) -> str:
        """Take a place among the processes of `accelerate launch` or torchrun; returns this process's device."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        from accelerate import Accelerator  # with all that it imports, for several processes only

        # where there is no GPU it has to be told, or takes every process for the only one
        self.accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        return str(self.accelerator.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.world_size == 1 else self.accelerator.gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    def leave_processes(self) -> None:
        """Wait for the others to be done, then part from them. A process that simply ended could crash on its way out
        (gloo's threads still run) and take with it those that are still writing results."""
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
