# shellcheck shell=bash
# Which Python: one place where the scripts find one. Sourced by venv.sh and so by all.

RUNNER_PYTHON=""

python_from() { # N, modules: prints the first Python of PATH that is 3.N or newer and has the modules
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8; do
    "$candidate" -Sc "import sys, $2; sys.exit(sys.version_info < (3, $1))" 2>/dev/null || continue
    printf '%s\n' "$candidate"
    return 0
  done
  return 1
}

find_python() { # sets RUNNER_PYTHON: any Python from 3.8 on, the venv's where PATH has none
  [[ -z $RUNNER_PYTHON ]] || return 0
  RUNNER_PYTHON=$(python_from 8 sys) || RUNNER_PYTHON=$(venv_complete "$(venv_location).d" "$(venv_hash)")/bin/python || {
    printf '%s: no python3 from 3.8 on is found, neither on PATH nor in a venv (on a cluster: module load python)\n' "${0##*/}" >&2
    exit 1
  }
}
