"""app.py whose model takes its time over a block: an answer lasts for seconds, so that a slow browser sees it begin."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import app
from fast_dllm.network.eager import EagerExecutor

SECONDS = 0.15  # a forward

run_block = EagerExecutor.run_block


def slowly(*arguments, **options):
    time.sleep(SECONDS)
    return run_block(*arguments, **options)


if __name__ == "__main__":
    EagerExecutor.run_block = slowly
    app.main()
