"""One build of the venv: which Python and which installer, which build of PyTorch, and the packages.

The installer is uv where PATH has one; else pip, where a Python from 3.10 on can make a venv; else a uv that any older
Python's pip fetches, which brings a Python of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Mapping, Sequence

from fast_dllm.errors import line_of
from fast_dllm.runner import nltk_data

CPU, CUDA = "cpu", "cuda"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Of all packages, on Linux with x86-64. For CPUs measured (0.55 GB, of which torch 2.13 is 0.19), with CUDA estimated.
SIZES = {CPU: "0.6 GB", CUDA: "3.5 GB"}
ANSWER_SECONDS = 8.0
# With one of these the user has already decided where packages come from, or which build of PyTorch
SOURCE_SETTINGS = ("PIP_NO_INDEX", "UV_NO_INDEX", "UV_OFFLINE", "UV_TORCH_BACKEND")
UV_VERSION = "0.13.9"
BUILD_PYTHON = "3.12"  # the Python that a downloaded uv fetches
PYTHON_HELP = "what helps: module load python (3.10 or newer)"
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(14, 7, -1)))


class BuildError(RuntimeError):
    """The build failed. The message is one line that says what helps, or nothing where the log says it all."""


def say(text: str) -> None:
    print(f"venv: {text}", file=sys.stderr, flush=True)


def find_python(minor: int, modules: str) -> str | None:
    """The first Python on PATH that is 3.`minor` or newer and has the modules ("venv, ensurepip")."""
    for name in PYTHONS:
        program = shutil.which(name)
        if program:
            check = f"import sys, {modules}; sys.exit(sys.version_info < (3, {minor}))"
            done = subprocess.run([program, "-Sc", check], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                return program
    return None


def cpu_index_answers() -> bool:
    """Whether PyTorch's index of CPU builds can be reached; a look-up of its name that hangs counts as no answer."""
    import urllib.request  # it takes longer to import than everything that --status needs

    answers = []

    def ask() -> None:
        request = urllib.request.Request(f"{CPU_INDEX}/torch/", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS / 2):
                answers.append(True)
        except (OSError, ValueError, AttributeError):  # AttributeError: a Python without ssl
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return bool(answers)


class Builder:
    """Builds one venv in `folder`; what the installers say goes to `log`."""

    def __init__(
        self, folder: Path, torch_build: str, code_root: Path, project_root: Path, report: Callable[[float], None]
    ) -> None:
        """report: called every second with the seconds since the start."""
        self.folder, self.torch_build = folder, torch_build
        self.code_root, self.project_root = Path(code_root), Path(project_root)
        self.log = folder / "build.log"
        self.python = folder / "bin" / "python"
        self._report, self._began = report, time.monotonic()
        self._uv = shutil.which("uv") or ""
        self._base_python = "" if self._uv else find_python(10, "venv, ensurepip") or ""
        self._settings: dict[str, str] = {}

    def build(self) -> None:
        """Raises BuildError and OSError."""
        installer = self._uv or self._base_python or "a uv and a Python of its own"
        say(f"building {self.folder} with {installer}, a few minutes (log: {self.log})")
        self.log.write_text("")
        has_cpu_index = self.torch_build == CPU and self._may_use_cpu_index()
        self._say_download(has_cpu_index)
        self._make_venv()
        if has_cpu_index:
            self._install_torch_for_cpus()
        self._install_requirements()
        self._link_project()
        self._add_sentence_data()

    # -- steps ---------------------------------------------------------------------------------------------------------
    def _may_use_cpu_index(self) -> bool:
        """Elsewhere than on Linux the package index has builds for CPUs alone."""
        if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in SOURCE_SETTINGS):
            return False
        if cpu_index_answers():
            return True
        say(f"{CPU_INDEX} does not answer: PyTorch comes from the package index, in a build that may contain CUDA")
        return False

    def _say_download(self, has_cpu_index: bool) -> None:
        if self.torch_build == CUDA:
            say(f"this downloads about {SIZES[CUDA]}: PyTorch with CUDA and the other packages")
        elif has_cpu_index or not sys.platform.startswith("linux"):
            say(f"no NVIDIA GPU is seen: this downloads about {SIZES[CPU]}: PyTorch for CPUs and the other packages")
        else:
            say(f"this downloads {SIZES[CPU]} to {SIZES[CUDA]}: PyTorch, without or with CUDA, and the other packages")

    def _make_venv(self) -> None:
        if self._base_python:
            self._run([self._base_python, "-m", "venv", str(self.folder)])
            return
        version = ">=3.10"
        if not self._uv:
            version = BUILD_PYTHON
            builds = self.folder.parent
            # not in a home of 20 GB, which torch alone would half fill
            for name, place in (("UV_PYTHON_INSTALL_DIR", "python"), ("UV_CACHE_DIR", "cache")):
                self._settings[name] = os.environ.get(name) or str(builds / place)
            self._uv = str(self._downloaded_uv(builds / f"uv-{UV_VERSION}"))
        help_text = f"uv could not bring Python {version}; {PYTHON_HELP}, or a node with a network"
        self._run([self._uv, "venv", "--allow-existing", "--python", version, str(self.folder)], help_text)

    def _install_torch_for_cpus(self) -> None:
        """Install PyTorch's build for CPUs. If that fails, the next step installs torch from the package index."""
        source = ["--torch-backend", "cpu"] if self._uv else ["--index-url", CPU_INDEX]
        try:
            self._install("torch", *source)
        except BuildError:
            say(f"PyTorch's build for CPUs could not be installed (see {self.log}): now from the package index")

    def _install_requirements(self) -> None:
        pyproject = str(self.code_root / "pyproject.toml")
        if self._uv:
            self._install("-r", pyproject, "--extra", "dev")
            return
        requirements = self.folder / "requirements.txt"
        reader = str(Path(__file__).with_name("requirements.py"))
        self._run([str(self.python), reader, pyproject, str(requirements)])
        self._install("-r", str(requirements))

    def _link_project(self) -> None:
        """A line in a .pth file: an editable install would write into the project's folder, which may be a snapshot."""
        code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
        done = subprocess.run([str(self.python), "-c", code], capture_output=True)
        if done.returncode:
            raise BuildError(f"{self.python} does not run: {' '.join(done.stderr.decode(errors='replace').split())}")
        packages = Path(os.fsdecode(done.stdout.rstrip(b"\n")))
        (packages / "fast_dllm_project.pth").write_text(f"{self.project_root}\n")

    def _add_sentence_data(self) -> None:
        try:
            nltk_data.install(self.folder, self._uv)
        except OSError as error:
            what_helps = "before ifeval run: bash sbatch/prefetch.sh --task ifeval"
            say(f"no sentence data for ifeval: {line_of(error)}; {what_helps}")

    # -- installers ----------------------------------------------------------------------------------------------------
    def _install(self, *words: str) -> None:
        constraints = ["-c", str(self.code_root / "constraints.txt")]
        if self._uv:
            settings = {"UV_LINK_MODE": "copy"}
            self._run(
                [self._uv, "pip", "install", "--python", str(self.python), *words, *constraints], settings=settings
            )
        else:
            # modules are compiled when they are first imported: most never are, and that halves the build and the files
            pip = [str(self.python), "-m", "pip", "install", "--no-input", "--no-compile"]
            self._run([*pip, *words, *constraints])

    def _downloaded_uv(self, folder: Path) -> Path:
        """The uv in `folder`, downloaded if it is missing; several builds may do this at once."""
        program = folder / "bin" / "uv"
        if program.exists():
            return program
        python = find_python(8, "pip") or sys.executable
        new = Path(tempfile.mkdtemp(prefix=".uv.", dir=str(folder.parent)))
        new.chmod(0o755)
        try:
            options = ["--no-input", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
            try:
                self._run([python, "-m", "pip", "install", *options, "--target", str(new), f"uv=={UV_VERSION}"])
            except BuildError:
                last = (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise BuildError(
                    f"no Python >= 3.10 and no uv here, and pip brings no uv ({last}); {PYTHON_HELP},"
                    " or: pip install --user uv"
                ) from None
            try:
                new.rename(folder)
            except OSError:
                if not program.exists():  # else another build was faster
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return program

    def _run(self, command: Sequence[str], help_text: str = "", settings: Mapping[str, str] | None = None) -> None:
        """Run a command with its output in the log. Raises BuildError with `help_text`."""
        environment = {**os.environ, **self._settings, **(settings or {})}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                while process.poll() is None:
                    try:
                        process.wait(1)
                    except subprocess.TimeoutExpired:
                        self._report(time.monotonic() - self._began)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            raise BuildError(help_text)
