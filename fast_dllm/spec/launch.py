"""How many processes this evaluation runs in, from what `accelerate launch` or torchrun left in the environment."""

from __future__ import annotations

import os
from typing import Mapping

from fast_dllm.errors import UsageError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher sets them all with WORLD_SIZE


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes; 1 without a launcher.

    Raises UsageError for a WORLD_SIZE that no launcher set, as one that an earlier program left in the shell: this
    process would wait for others that were never started.
    """
    text = environment.get("WORLD_SIZE", "1").strip() or "1"
    advice = "unset WORLD_SIZE, or start the processes with accelerate launch or torchrun"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"WORLD_SIZE is {text!r} in the environment, which is no number of processes; {advice}")
    missing = [name for name in NEEDED if not environment.get(name)]
    if int(text) > 1 and missing:
        raise UsageError(f"WORLD_SIZE is {text} in the environment, but {', '.join(missing)} is not set; {advice}")
    return int(text)
