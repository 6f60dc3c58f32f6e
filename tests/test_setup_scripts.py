"""The venv: built once however many want it, taken over from the dead, never half of one; and the script to source."""

import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from script_project import FAKES, Project, old_pythons, system_tools

from fast_dllm.runner.venv_build import UV_VERSION


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "lab's project")


def builds(project):
    log = project.state / "uv.log"
    return log.read_text().splitlines() if log.exists() else []


def start(project, node="n1", **extra):
    environment = project.environment | {"FAKE_NODE": node} | extra
    return subprocess.Popen(
        ["bash", "sbatch/venv.sh"],
        cwd=project.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(check, seconds=20):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def is_complete(venv: str) -> bool:
    folder = Path(venv)
    return (folder / "complete").read_text().strip() == folder.name.split(".")[0] and (folder / "bin/python").exists()


def test_six_jobs_on_three_nodes_build_one_venv_once(project):
    project.pretend_nodes()
    jobs = [start(project, node=f"n{number % 3}", FAKE_UV_SECONDS="1") for number in range(6)]
    outputs = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 6, outputs
    venvs = {stdout.strip() for stdout, _ in outputs}
    assert len(venvs) == 1
    assert is_complete(venvs.pop())
    assert len(builds(project)) == 1


def test_a_builder_that_was_killed_is_taken_over_by_one_of_those_that_wait(project):
    project.pretend_nodes()
    first = start(project, node="n1", FAKE_UV_SECONDS="30")
    wait_until(lambda: builds(project))
    waiting = [start(project, node=f"n{number}", DEAD_SECONDS="4") for number in (2, 3, 4)]
    time.sleep(1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    outputs = [job.communicate(timeout=60) for job in waiting]
    assert [job.returncode for job in waiting] == [0, 0, 0], outputs
    assert time.monotonic() - began < 20
    assert len({stdout for stdout, _ in outputs}) == 1
    assert len(builds(project)) == 2
    assert [path.name.split(".")[1] for path in (project.state / "venv.d").iterdir()] == ["0002"]


def test_a_builder_on_the_same_node_is_seen_to_be_dead_at_once(project):
    first = start(project, FAKE_UV_SECONDS="30")
    wait_until(lambda: builds(project))
    first.kill()
    first.communicate()
    began = time.monotonic()
    assert start(project).wait(30) == 0
    assert time.monotonic() - began < 10


def test_a_failed_build_is_an_error_with_its_log_and_the_next_command_tries_again(project):
    failing = project.state / "uv.log.fail"
    failing.touch()
    result = project.bash("sbatch/venv.sh")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no route to the package index" in result.stderr
    assert not (project.state / "venv").exists()
    failing.unlink()
    assert is_complete(project.bash("sbatch/venv.sh").stdout.strip())


def test_a_venv_without_sentence_data_is_complete_and_one_line_says_so(project):
    result = project.bash("sbatch/venv.sh")  # the pretended installer installs nothing
    assert is_complete(result.stdout.strip())
    (line,) = [line for line in result.stderr.splitlines() if "sentence data" in line]
    assert line.endswith("before ifeval run: bash sbatch/prefetch.sh --task ifeval")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("changed", "old", "new"),
    [
        ("constraints.txt", "torch==2.13.*", "torch==2.14.*"),
        ("pyproject.toml", '"accelerate>=', '"einops", "accelerate>='),
        ("pyproject.toml", '"pytest>=', '"hypothesis", "pytest>='),
    ],
)
def test_a_complete_venv_is_used_again_until_the_requirements_change(project, changed, old, new):
    first = project.bash("sbatch/venv.sh").stdout.strip()
    assert project.bash("sbatch/venv.sh").stdout.strip() == first
    assert len(builds(project)) == 1
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("[tool.other]\ndependencies = ['not ours']\n")
    assert project.bash("sbatch/venv.sh").stdout.strip() == first
    changed, text = project.root / changed, (project.root / changed).read_text()
    changed.write_text(text.replace(old, new, 1))
    assert changed.read_text() != text
    second = project.bash("sbatch/venv.sh").stdout.strip()
    assert second != first
    assert is_complete(first), "jobs may still be running from the old one"
    assert (project.state / "venv").resolve() == Path(second)


def test_a_venv_without_its_interpreter_is_built_anew(project):
    first = project.bash("sbatch/venv.sh").stdout.strip()
    (Path(first) / "bin" / "python").unlink()
    second = project.bash("sbatch/venv.sh").stdout.strip()
    assert second != first
    assert is_complete(second)


def test_a_venv_without_the_mark_does_not_count(project):
    first = Path(project.bash("sbatch/venv.sh").stdout.strip())
    (first / "complete").write_text("")
    second = Path(project.bash("sbatch/venv.sh").stdout.strip())
    assert second != first
    assert len(builds(project)) == 2


def test_a_venv_that_somebody_made_by_hand_is_left_alone(project):
    (project.state / "venv" / "bin").mkdir(parents=True)
    mine = project.state / "venv" / "bin" / "python"
    mine.write_text("mine")
    result = project.bash("sbatch/venv.sh")
    assert is_complete(result.stdout.strip())
    assert mine.read_text() == "mine"
    assert "was not made by these scripts and is left alone" in result.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("scratch", "given", "expected"),
    [
        (False, None, "{root}/.venv"),
        (True, None, "{home}/scratch/Fast-dLLM/v2/.venv"),
        (True, "{home}/mine", "{home}/mine"),
        (True, "relative", "{root}/relative"),
    ],
)
def test_where_the_venv_is(project, scratch, given, expected):
    names = {"root": project.root, "home": project.environment["HOME"]}
    if scratch:
        (Path(project.environment["HOME"]) / "scratch").mkdir()
    del project.environment["FAST_DLLM_VENV"]
    extra = {"FAST_DLLM_VENV": given.format(**names)} if given else {}
    venv = project.bash("sbatch/venv.sh", **extra).stdout.strip()
    assert venv.startswith(expected.format(**names) + ".d/")


def test_pip_builds_what_pyproject_and_constraints_say(project):
    """Without uv: the real venv module, and pip replaced by a recorder."""
    (project.state / "bin" / "uv").unlink()
    recorder = project.state / "bin" / "python3"
    real = shutil.which("python3", path=project.environment["PATH"])
    recorder.write_text(
        f"""#!/usr/bin/env bash
if [[ $* == "-m venv "* ]]; then
  {real} -m venv --without-pip "$3"
  rm "$3/bin/python"
  cp "{project.state}/python_of_the_venv" "$3/bin/python"
  chmod +x "$3/bin/python"
else
  exec {real} "$@"
fi
"""
    )
    recorder.chmod(0o755)
    # its .pth file goes where that interpreter says: kept out of the real one
    (project.state / "python_of_the_venv").write_text(
        f"""#!/usr/bin/env bash
if [[ $* == "-m pip "* ]]; then
  printf "%s\\n" "$@" >>"{project.state}/pip"
elif [[ $* == *purelib* ]]; then
  echo "{project.state}"
else
  exec {real} "$@"
fi
"""
    )
    stand_in = (
        '[project]\ndependencies = ["torch>=2.9", "lm_eval"]\n[project.optional-dependencies]\ndev = ["pytest>=8"]\n'
    )
    (project.root / "pyproject.toml").write_text(stand_in)
    result = project.bash("sbatch/venv.sh")
    assert result.returncode == 0, result.stderr
    venv = Path(result.stdout.strip())
    arguments = (project.state / "pip").read_text().splitlines()
    requirements, constraints = f"{venv}/requirements.txt", f"{project.root}/constraints.txt"
    install = ["-m", "pip", "install"]
    assert arguments[:9] == [*install, "--no-input", "--no-compile", "-r", requirements, "-c", constraints]
    assert arguments[9:12] == install
    assert arguments[-1].startswith("llama-index-core=="), "then the wheel with the sentence data"
    assert (venv / "requirements.txt").read_text().split() == ["torch>=2.9", "lm_eval", "pytest>=8"]
    assert (project.state / "fast_dllm_project.pth").read_text() == f"{project.root}\n"


@pytest.fixture
def old_account(project, tmp_path):
    """Nothing but an old Python with pip, as on a login node without a module, and an index that has a uv."""
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python older than 3.10 here, neither pyenv's nor on PATH")
    (project.state / "bin" / "uv").unlink()
    (project.state / "bin" / "python3").write_text(f'#!/bin/sh\nexec {pythons[0]} "$@"\n')
    (project.state / "bin" / "python3").chmod(0o755)
    index = tmp_path / "index"
    index.mkdir()
    version = UV_VERSION
    with zipfile.ZipFile(index / f"uv-{version}-py3-none-any.whl", "w") as wheel:
        for name in ("uv", "accelerate"):
            script = zipfile.ZipInfo(f"uv-{version}.data/scripts/{name.replace('accelerate', 'fake_accelerate')}")
            script.external_attr = 0o100755 << 16
            wheel.writestr(script, (FAKES / f"fake_{name}").read_text())
        about = f"uv-{version}.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: uv\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    project.environment["PATH"] = f"{project.state / 'bin'}:{system_tools(without='python')}"
    project.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    return project


def test_where_nothing_is_installed_the_venv_comes_with_a_uv_of_its_own(old_account):
    jobs = [start(old_account, node=f"n{number}") for number in range(3)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 3, outputs
    [venv] = {stdout.strip() for stdout, _ in outputs}
    assert is_complete(venv)
    assert "with a uv and a Python of its own" in "".join(stderr for _, stderr in outputs)
    [own] = (old_account.state / "venv.d").glob("uv-*")
    assert (own / "bin" / "uv").is_file()
    assert not list((old_account.state / "venv.d").glob(".uv.*"))
    log = (Path(venv) / "build.log").read_text()
    assert "Successfully installed uv-" in log
    # the next build has it already
    with (old_account.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    again = old_account.bash("sbatch/venv.sh", PIP_FIND_LINKS="/nowhere")
    assert again.returncode == 0, again.stderr


def test_where_not_even_uv_is_to_be_had_one_line_says_what_helps(old_account):
    result = old_account.bash("sbatch/venv.sh", PIP_FIND_LINKS="/nowhere")
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if "what helps" in line]
    assert line.startswith("no Python >= 3.10 and no uv here, and pip brings no uv (ERROR: No matching distribution")
    assert line.endswith("what helps: module load python (3.10 or newer), or: pip install --user uv")
    (old_account.state / "uv.log.fail").touch()  # a uv that reaches no Python
    result = old_account.bash("sbatch/venv.sh")
    assert result.returncode == 1
    assert "uv could not bring Python 3.12; what helps: module load python (3.10 or newer)" in result.stderr


def test_a_uv_alone_is_enough(project):
    """No Python on PATH, as in a container image of uv's: its uv runs one."""
    uv = project.state / "bin" / "uv"
    python = shutil.which("python3", path=project.environment["PATH"])
    text = uv.read_text()
    start = 'if [[ $1 == run ]]; then while [[ $1 != python ]]; do shift; done; exec REAL "${@:2}"; fi\n'
    uv.write_text(
        text.replace("case $1 in", start.replace("REAL", str(python)) + "case $1 in").replace(
            '"$(command -v python3)"', f'"{python}"'
        )
    )
    project.environment["PATH"] = f"{project.state / 'bin'}:{system_tools(without='python')}"
    result = project.bash("sbatch/venv.sh")
    assert result.returncode == 0, result.stderr
    assert is_complete(result.stdout.strip())
    assert project.run("--status").returncode == 0


def test_what_runs_without_the_venv_runs_with_the_old_python(old_account):
    assert old_account.statuses()["k1_first"] == "pending"
    assert old_account.run("--help").returncode == 0
    quick = ("-m", "fast_dllm.doctor", "--quick", "--task", "toy_math", "--model", "tiny")
    done = old_account.bash("-c", 'python3 "$@"', "-", *quick)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "ok   model tiny: whole" in done.stdout
    result = old_account.run("k1_first", HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "fail model Efficient-Large-Model/Fast_dLLM_v2_7B: " in result.stderr, "it looked before it submitted"
    result = old_account.run("k1_first")
    assert (result.returncode, old_account.submitted()) == (0, ["00_baseline/gsm8k/k1_first"]), result.stderr


# -- setup_tmpdir_venv.sh ----------------------------------------------------------------------------------------------
SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]


def in_shell(project, shell, *words, **extra):
    environment = project.environment | extra
    return subprocess.run(
        [shell, *words], cwd=project.root, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_sourcing_activates_a_venv_in_tmpdir_and_changes_no_option(project, shell, tmp_path):
    fast = tmp_path / "node disk"
    fast.mkdir()
    script = """
    show() { set -o; if [ -n "${BASH_VERSION:-}" ]; then shopt -p; shopt -po; fi; trap; }
    set -u; set -e
    before=$(show); umask_before=$(umask); directory=$PWD
    source ./setup_tmpdir_venv.sh >/dev/null 2>&1
    [ "$(show)" = "$before" ] || { echo options changed; exit 1; }
    [ "$(umask)" = "$umask_before" ] && [ "$PWD" = "$directory" ]
    typeset -f | grep fast_dllm && exit 1
    typeset | grep -i "^_fast_dllm" && exit 1
    echo "$VIRTUAL_ENV"; command -v python
    """
    result = in_shell(project, shell, "-c", script, TMPDIR=str(fast))
    assert result.returncode == 0, result.stdout + result.stderr
    venv, python = result.stdout.split("\n")[:2]
    assert venv.startswith(str(fast))
    assert python == f"{venv}/bin/python"


@pytest.mark.parametrize("shell", SHELLS)
def test_executing_it_instead_says_to_source_it(project, shell):
    result = in_shell(project, shell, "setup_tmpdir_venv.sh")
    assert result.returncode == 2
    assert "source setup_tmpdir_venv.sh" in result.stderr
    assert builds(project) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failed_build_leaves_the_shell_running_and_as_it_was(project, shell, tmp_path):
    (project.state / "uv.log.fail").touch()
    script = "source ./setup_tmpdir_venv.sh; echo status $? ${VIRTUAL_ENV:-none}"
    result = in_shell(project, shell, "-c", script, TMPDIR=str(tmp_path))
    assert result.stdout == "status 1 none\n"
