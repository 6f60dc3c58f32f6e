"""Print a pyproject.toml's dependencies, those for development included, one a line: pip reads no such file itself.

python sbatch/requirements.py pyproject.toml      (the Python of a new venv: pip carries what reads TOML before 3.11)
"""

import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open(sys.argv[1], "rb") as file:  # noqa: PTH123
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")
