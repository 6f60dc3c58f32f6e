#!/usr/bin/env bash
# Lint and tests: bash tests/run.sh [pytest arguments]. Makes the venv if it is missing. Leaves
# out what takes minutes (-m slow) or drives a real Slurm (-m slurm).
set -euo pipefail
PROJECT_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

shell_scripts() { # nul-terminated
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard -- '*.sh' .ci/run
  else
    find . \( -name '.venv*' -o -name results -o -name .snapshots \) -prune \
      -o \( -name '*.sh' -o -path ./.ci/run \) -type f -print0
  fi
}

# .mypy_cache keeps the libraries' types: half a minute the first time, seconds afterwards
lint_types() {
  local policy
  echo "== mypy"
  mypy
  # each by itself: they have one module name
  for policy in experiments/*/generation_functions.py; do
    mypy "$policy"
  done
}

lint_shell() {
  local scripts=() script
  while IFS= read -r -d '' script; do
    if [[ -f $script ]]; then scripts+=("$script"); fi
  done < <(shell_scripts)
  if command -v shfmt >/dev/null 2>&1; then
    echo "== shfmt"
    for script in "${scripts[@]}"; do
      # it is sourced by zsh too, whose words shfmt cannot read
      [[ $script == *setup_tmpdir_venv.sh ]] || shfmt -i 2 -ci -d -- "$script"
    done
  fi
  if command -v shellcheck >/dev/null 2>&1; then
    echo "== shellcheck (${#scripts[@]} scripts)"
    shellcheck -x -- "${scripts[@]}"
  else
    echo "== shellcheck is not installed: only the syntax of ${#scripts[@]} scripts is checked"
    for script in "${scripts[@]}"; do bash -n -- "$script"; done
  fi
}

main() {
  local venv
  cd -- "$PROJECT_ROOT"
  venv=$(bash sbatch/venv.sh)
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH PYTHONNOUSERSITE=1
  unset PYTHONHOME
  # the suite's models are tiny: more threads than one only get in each other's way
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  echo "== ruff"
  ruff check .
  ruff format --check .
  lint_types
  lint_shell
  echo "== pytest"
  # Each test is one thread. Three processes for two cores: some tests wait for a clock.
  # tests/conftest.py says which tests stay together.
  python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder \
    -m "not slow and not slurm" "$@"
}

{ # read as a whole before it starts: a pull may change this file meanwhile
  main "$@"
  exit
}
