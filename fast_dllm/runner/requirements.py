"""Write a pyproject.toml's dependencies, those for development included, one a line: pip reads no such file itself.

python requirements.py pyproject.toml requirements.txt     (the Python of a new venv)
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip carries it
    from pip._vendor import tomli as tomllib

if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
