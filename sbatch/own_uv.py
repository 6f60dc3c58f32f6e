"""A uv of our own, where PATH has neither uv nor a Python from 3.10 on: python3 own_uv.py FOLDER

With pip of whatever Python from 3.8 on; prints the program's path. FOLDER is a private one and is there whole or not at
all, however many call this at once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.13.9"
HELP = "what helps: module load python (3.10 or newer), or: pip install --user uv"


def install(folder: Path) -> Path:
    """Raises SystemExit with one line that says what helps."""
    program = folder / "bin" / "uv"
    if program.exists():
        return program
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".uv.", dir=str(folder.parent)))
    try:
        options = ["--no-input", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(new), f"uv=={VERSION}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, file=sys.stderr)
        if done.returncode or not (new / "bin" / "uv").is_file():
            last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
            raise SystemExit(f"no Python >= 3.10 and no uv here, and pip brings no uv ({last}); {HELP}")
        try:
            new.rename(folder)
        except OSError:
            if not program.exists():  # else another builder was faster
                raise
    finally:
        shutil.rmtree(str(new), ignore_errors=True)
    return program


if __name__ == "__main__":
    os.umask(0o022)
    print(install(Path(sys.argv[1]) / f"uv-{VERSION}"))
