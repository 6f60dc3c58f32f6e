"""Put nltk's English sentence data where nltk looks for it, in <venv>/nltk_data: ifeval counts sentences with it.

    python -m fast_dllm.runner.nltk_data [VENV]      (default: the venv of this Python)

nltk itself would download it from GitHub, which nodes that reach only a package index cannot; a wheel on PyPI carries
the same file. Prints the folder. Exit status 1, after one line, where the data could not be fetched.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llama-index-core==0.14.25"
MEMBER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab.zip"
SHA256 = "e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106"
FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def install(venv: Path, uv: str = "") -> Path:
    """Make <venv>/nltk_data/tokenizers/punkt_tab/english, whole or not at all; returns nltk_data. Raises OSError.

    uv: the program to install with; otherwise PATH's uv, or the venv's pip.
    """
    data = venv / "nltk_data"
    place = data / "tokenizers" / "punkt_tab" / "english"
    if all((place / name).is_file() for name in FILES):
        return data
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=str(data)) as temporary:
        new = Path(temporary) / "english"
        new.mkdir()
        with zipfile.ZipFile(_fetch_archive(venv, Path(temporary) / "wheel", uv)) as archive:
            for name in FILES:
                (new / name).write_bytes(archive.read(f"punkt_tab/english/{name}"))
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        new.rename(place)
    return data


def _fetch_archive(venv: Path, folder: Path, uv: str) -> Path:
    """nltk's punkt_tab.zip, by way of the wheel's installation into `folder`. Raises OSError."""
    python, uv = str(venv / "bin" / "python"), uv or shutil.which("uv") or ""
    installer = [python, "-m", "pip", "install", "--no-input", "--no-compile"]
    if uv:
        installer = [uv, "pip", "install", "--python", python]
    command = [*installer, "--no-deps", "--only-binary", ":all:", "--target", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    archive = folder / MEMBER
    if done.returncode or not archive.is_file():
        raise OSError(f"{WHEEL} could not be fetched: {' '.join(done.stderr.split()[-40:])}")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != SHA256:
        raise OSError(f"{archive.name} of {WHEEL} has the SHA-256 {sha256}, not {SHA256}")
    return archive


def main() -> None:
    try:
        print(install(Path(sys.argv[1] if len(sys.argv) > 1 else sys.prefix)))
    except OSError as error:
        sys.exit(f"nltk_data.py: no sentence data for ifeval: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
