"""Which build of PyTorch a venv gets, with stand-ins for uv, pip and nvidia-smi."""

from __future__ import annotations

import os
import shutil
import socket
import time

import pytest
from script_project import system_tools

from fast_dllm.runner import venv, venv_build

REQUIREMENTS = """
[project]
dependencies = ["torch>=2.9", "lm_eval"]
[project.optional-dependencies]
dev = ["pytest>=8"]
"""
# what both installers give a new venv: $LOG is told each call of its pip; the one for CPUs fails while $LOG.fail exists
VENV_PYTHON = """#!/usr/bin/env bash
if [[ $* == *purelib* ]]; then
  printf '%s\\n' "$(dirname "$0")"
elif [[ $* == "-m pip "* ]]; then
  echo "pip ${*:3}" >>"$LOG"
  [[ ! -f $LOG.fail || $* != *whl/cpu* ]]
else
  exec python3 "$@"
fi
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
if [[ $1 == venv ]]; then
  mkdir -p "${*: -1}/bin" && cp "$VENV_PYTHON" "${*: -1}/bin/python"
fi
[[ ! -f $LOG.fail || $* != *torch-backend* ]]
"""
PYTHON3 = """#!/usr/bin/env bash
if [[ $* == "-m venv "* ]]; then
  mkdir -p "$3/bin" && cp "$VENV_PYTHON" "$3/bin/python"
else
  exec {python} "$@"
fi
"""


class Machine:
    """A machine with one installer; `calls` are those of the installer, without the call for the sentence data."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.log = folder / "log"
        (folder / "bin").mkdir()
        (folder / "pyproject.toml").write_text(REQUIREMENTS)
        (folder / "constraints.txt").write_text("torch==2.13.*\n")
        settings = {"LOG": self.log, "VENV_PYTHON": folder / "venv_python", "FAST_DLLM_VENV": folder / "venv"}
        settings |= {"HOME": folder, "PATH": f"{folder / 'bin'}:{system_tools()}"}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "FAST_DLLM_TORCH", *venv_build.SOURCE_SETTINGS):
            monkeypatch.delenv(name, raising=False)
        self.program("../venv_python", VENV_PYTHON)

    def program(self, name, text):
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def add_gpu(self):
        self.program("nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: NVIDIA H100'\n")

    def build(self):
        found = venv.ensure(self.folder, self.folder)
        return found and found.name

    @property
    def calls(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if "llama-index" not in line]


@pytest.fixture(params=["uv", "pip"])
def machine(request, tmp_path, monkeypatch):
    machine = Machine(tmp_path, monkeypatch)
    machine.installer = request.param
    if request.param == "uv":
        machine.program("uv", UV)
        install = f"uv pip install --python {tmp_path}/venv.d/KEY/bin/python"
        machine.cpu = f"{install} torch --torch-backend cpu -c {tmp_path}/constraints.txt"
        machine.all = f"{install} -r {tmp_path}/pyproject.toml --extra dev -c {tmp_path}/constraints.txt"
    else:
        machine.program("python3", PYTHON3.replace("{python}", str(shutil.which("python3"))))
        install = "pip install --no-input --no-compile"
        machine.cpu = f"{install} torch --index-url {venv_build.CPU_INDEX} -c {tmp_path}/constraints.txt"
        machine.all = f"{install} -r {tmp_path}/venv.d/KEY/requirements.txt -c {tmp_path}/constraints.txt"
    return machine


def installs(machine, name):
    return [call.replace(name, "KEY") for call in machine.calls if " install " in call]


@pytest.fixture
def index_answers(monkeypatch):
    monkeypatch.setattr(venv_build, "cpu_index_answers", lambda: True)


@pytest.fixture
def index_is_silent(monkeypatch):
    monkeypatch.setattr(venv_build, "cpu_index_answers", lambda: False)


def test_where_no_gpu_is_seen_pytorch_for_cpus_comes_first(machine, index_answers, capsys):
    name = machine.build()
    assert name.endswith("-cpu.0001")
    assert installs(machine, name) == [machine.cpu, machine.all]
    said = capsys.readouterr().err.splitlines()
    assert "venv: no NVIDIA GPU is seen: this downloads about 0.6 GB: PyTorch for CPUs and the other packages" in said


def test_with_a_gpu_pytorch_is_the_package_indexs_own(machine, index_answers, capsys):
    machine.add_gpu()
    name = machine.build()
    assert name.endswith("-cuda.0001")
    assert installs(machine, name) == [machine.all]
    said = capsys.readouterr().err.splitlines()
    assert "venv: this downloads about 3.5 GB: PyTorch with CUDA and the other packages" in said


def test_a_venv_of_the_login_node_never_serves_a_gpu_node_nor_the_other_way_round(machine, index_answers):
    login = machine.build()
    machine.add_gpu()
    assert venv.find_complete(machine.folder, machine.folder) is None
    node = machine.build()
    assert (login.split("-")[0], login != node) == (node.split("-")[0], True)
    assert machine.build() == node
    (machine.folder / "bin" / "nvidia-smi").unlink()
    assert machine.build() == login
    assert len([call for call in machine.calls if machine.installer == "uv" and call.startswith("uv venv")]) in (0, 2)
    machine.monkeypatch.setenv("SLURM_JOB_GPUS", "0")  # a job whose nvidia-smi fails has a GPU all the same
    assert machine.build() == node


def test_where_the_index_for_cpus_cannot_be_reached_a_line_says_what_comes_instead(machine, index_is_silent, capsys):
    name = machine.build()
    assert name.endswith("-cpu.0001")
    assert installs(machine, name) == [machine.all]
    said = capsys.readouterr().err
    assert f"{venv_build.CPU_INDEX} does not answer: PyTorch comes from the package index" in said
    assert "this downloads 0.6 GB to 3.5 GB" in said


def test_where_it_answers_and_has_no_such_version_the_build_goes_on_with_a_word(machine, index_answers, capsys):
    (machine.folder / "log.fail").touch()
    name = machine.build()
    assert installs(machine, name) == [machine.cpu, machine.all]
    assert "PyTorch's build for CPUs could not be installed" in capsys.readouterr().err


@pytest.mark.parametrize("setting", venv_build.SOURCE_SETTINGS)
def test_who_has_decided_where_packages_come_from_is_not_overruled(machine, index_answers, setting):
    machine.monkeypatch.setenv(setting, "1")
    name = machine.build()
    assert installs(machine, name) == [machine.all]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "cuda"),
        ({"SLURM_JOB_GPUS": "3"}, "cuda"),
        ({"SLURM_JOB_GPUS": "3", "FAST_DLLM_TORCH": "cpu"}, "cpu"),
        ({"FAST_DLLM_TORCH": "cuda"}, "cuda"),
    ],
)
def test_what_counts_as_a_gpu(tmp_path, monkeypatch, settings, expected):
    Machine(tmp_path, monkeypatch)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert venv.torch_build_wanted() == expected


def test_an_index_that_takes_the_call_and_never_answers_does_not_hold_the_build_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(venv_build, "CPU_INDEX", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(venv_build, "ANSWER_SECONDS", 1.0)
        began = time.monotonic()
        assert not venv_build.cpu_index_answers()
        assert time.monotonic() - began < 5


# -- the rest ----------------------------------------------------------------------------------------------------------
def test_the_environment_of_a_venv_puts_it_first_and_shuts_out_others(tmp_path):
    before = {"PATH": "/usr/bin", "PYTHONHOME": "/elsewhere", "KEPT": "1"}
    after = venv.environment_of(tmp_path, before)
    assert after == {
        "PATH": f"{tmp_path}/bin:/usr/bin",
        "VIRTUAL_ENV": str(tmp_path),
        "PYTHONNOUSERSITE": "1",
        "KEPT": "1",
    }
    assert "PYTHONHOME" in before


def test_builds_that_nobody_has_used_for_two_weeks_go_when_another_is_built(machine, index_answers):
    first = machine.folder / "venv.d" / machine.build()
    died = first.with_name("0123456789abcdef-cpu.0004")
    died.mkdir()
    (died / "owner").write_text("another-node 1\n")
    (first.parent / "python").mkdir()
    long_ago = time.time() - 20 * 86400
    for mark in (first / "complete", died / "owner"):
        os.utime(mark, (long_ago, long_ago))
    (machine.folder / "constraints.txt").write_text("torch==2.14.*\n")
    second = machine.build()
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([second, "python"])


def test_a_folder_that_cannot_be_written_to_is_one_line(machine, capsys):
    machine.monkeypatch.setenv("FAST_DLLM_VENV", "/proc/no/venv")
    assert machine.build() is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("venv: cannot write to /proc/no/venv.d: ")
