# shellcheck shell=bash
# Sourced by the other scripts: replaces the script by the runner, in Python.

start_runner() { # the code's folder, the command, its options
  local code=$1 python builds
  shift
  for python in python3 python3.{14,13,12,11,10,9,8}; do
    if "$python" -Sc 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
      exec "$python" -BS -X utf8 "$code/fast_dllm/runner" "$@"
    fi
  done
  # where PATH has none: the one of a venv that these scripts have built
  builds=${FAST_DLLM_VENV:-$code/.venv}.d
  if [[ -z ${FAST_DLLM_VENV:-} && -d ${HOME:-}/scratch ]]; then
    builds=$HOME/scratch/Fast-dLLM/v2/.venv.d
  fi
  for python in "$builds"/*/bin/python; do
    [[ ! -x $python ]] || exec "$python" -BS -X utf8 "$code/fast_dllm/runner" "$@"
  done
  if command -v uv >/dev/null 2>&1; then
    exec uv run --quiet --no-project --no-config python -BS -X utf8 "$code/fast_dllm/runner" "$@"
  fi
  echo "${0##*/}: no python3 from 3.8 on is found, neither on PATH nor in a venv" \
    "(on a cluster: module load python)" >&2
  exit 1
}
