"""Whether a model fits into a device's memory: said before its weights are read or downloaded, with what to set."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from test_eval import run_eval

from fast_dllm.errors import UsageError
from fast_dllm.network import memory
from fast_dllm.network.config import FastDLLMConfig
from fast_dllm.network.loading import load_model

MIB = 2**20


@pytest.fixture
def seven_billion(tmp_path):
    """A folder with the published model's configuration and no weights."""
    FastDLLMConfig().save_pretrained(tmp_path / "seven")
    return str(tmp_path / "seven")


def refusal(path: str, device: str = "cpu", dtype: str = "auto") -> str:
    with pytest.raises(UsageError) as refused:
        load_model(path, device, dtype)
    return str(refused.value)


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "text"),
    [
        (23, "auto", "its weights take 28.4 GiB in float32, and 23.0 GiB of memory are free; "
                     "set dtype=bfloat16, which takes 14.2 GiB"),
        (12, "float32", "it needs a machine with more than 14.2 GiB, or a GPU"),
        (12, "bfloat16", "its weights take 14.2 GiB in bfloat16, and 12.0 GiB of memory are free; it needs a machine"),
        (23, "bfloat16", "model.safetensors"),  # it would fit: the missing weights are the next fault
    ],
)  # fmt: skip
def test_a_model_that_the_host_does_not_hold_is_refused(monkeypatch, seven_billion, gigabytes, dtype, text):
    monkeypatch.setattr(memory, "available_on_host", lambda: gigabytes * memory.GIB)
    assert text in refusal(seven_billion, dtype=dtype)


@pytest.mark.parametrize(
    ("capability", "gigabytes", "dtype", "text"),
    [
        (
            (8, 0),
            12,
            "auto",
            "14.2 GiB in bfloat16, and 12.0 GiB of memory are free on cuda:0; it needs a GPU with more",
        ),
        ((8, 0), 20, "float32", "set dtype=bfloat16, which takes 14.2 GiB"),
        ((6, 1), 20, "auto", "set dtype=float16, which takes 14.2 GiB"),
    ],
)
def test_a_gpu_that_is_too_small_is_refused(monkeypatch, seven_billion, capability, gigabytes, dtype, text):
    """Memory that torch has reserved and does not use is free, too: 1 GiB here."""
    free = (gigabytes - 1) * memory.GIB
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda device: capability,
        mem_get_info=lambda device: (free, 2 * free),
        memory_reserved=lambda device: 3 * memory.GIB,
        memory_allocated=lambda device: 2 * memory.GIB,
    )
    for name, function in vars(fake).items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert text in refusal(seven_billion, "cuda:0", dtype)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


@pytest.mark.parametrize(
    ("own", "groups", "available"),
    [
        ("0::/slurm/job1/step", {"slurm/job1": (V2, 900, 500, 100), "slurm/job1/step": (V2, "max", 500, 100)}, 500),
        ("0::/slurm/job1", {"slurm": (V2, 700, 300, 0), "slurm/job1": (V2, 5000, 10, 0)}, 400),
        (
            "4:memory:/slurm/job1\n3:cpuset:/",
            {"memory/slurm/job1": (V1, 800, 600, 50), "memory": (V1, 2**63, 9, 0)},
            250,
        ),
        ("0::/not/visible", {".": (V2, 300, 100, 0)}, 200),  # a container sees its own group as the root
        ("0::/", {".": (V2, 100, 200, 0)}, 0),
        ("0::/", {}, 1000),
    ],
)
def test_control_groups_limit_the_memory(monkeypatch, tmp_path, own, groups, available):
    """groups: folder -> (names of its files, limit, usage, cached files), in MiB."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {1000 * 1024} kB\n")
    (tmp_path / "cgroup").write_text(f"{own}\n")
    for folder, ((limit_file, usage_file, prefix), limit, usage, cached) in groups.items():
        group = tmp_path / "groups" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit_file).write_text(f"{limit * MIB if isinstance(limit, int) else limit}\n")
        (group / usage_file).write_text(f"{usage * MIB}\n")
        stat = f"anon 1\n{prefix}active_file {cached * MIB // 2}\n{prefix}inactive_file {cached * MIB // 2}\n"
        (group / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "groups")
    assert memory.available_on_host() == available * MIB


@pytest.mark.slow
def test_eval_says_it_in_a_line_and_ends_with_2(tmp_path, shared):
    """Thirty times as many layers as the published model: more weights than any machine here holds."""
    folder = tmp_path / "large"
    shutil.copytree(shared / "reference" / "fast_dllm_v2_7b", folder)
    FastDLLMConfig(num_hidden_layers=900, layer_types=None).save_pretrained(folder)
    done = run_eval("--model_args", f"model_path={folder}", "--tasks", "toy_math", "--limit", "1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "of memory are free; it needs a machine with more than" in line
