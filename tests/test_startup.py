"""What a command imports before it does anything: counted by name, because seconds depend on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(*command: str, status: int) -> set[str]:
    """The modules that a command, and every Python process that it starts, imports."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-2000:]
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")} - {
        "imported package"
    }


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["run", "--num_fewshots", "3"], 2),
        (["--model", "fast_dllm_v2", "--tasks", "toy_math", "--wandb_args", "project=x"], 2),
    ],
    ids=["unknown option", "unsupported option"],
)
def test_eval_answers_about_its_options_without_torch(words, status):
    found = imported(sys.executable, "eval.py", *words, status=status)
    assert "lm_eval" in found
    assert not found & {"torch", "transformers", "datasets"}


def test_the_launcher_imports_nothing_but_the_standard_library():
    found = imported("bash", "sbatch/run.sh", "--status", status=0)
    assert any(name.startswith("fast_dllm.runner.") for name in found)
    assert not found & {"torch", "transformers", "lm_eval", "numpy"}


def test_an_evaluation_imports_no_part_of_transformers_and_torch_that_it_does_not_use():
    """transformers' models bring in compilers and the code of other networks: as long as all the rest together."""
    program = (
        "import fast_dllm.evaluate.harness, fast_dllm.evaluate.task_loading, lm_eval.evaluator;"
        "fast_dllm.evaluate.harness.FastDLLM.create_from_arg_obj({'model_path': 'tiny'})"
    )
    found = imported(sys.executable, "-c", program, status=0)
    assert {"torch", "transformers", "lm_eval.api.task"} <= found
    unused = {
        "transformers.modeling_utils",
        "torch._dynamo",
        "torch.distributed.tensor",
        "sympy",
        "scipy",
        "accelerate",
    }
    assert not found & unused
