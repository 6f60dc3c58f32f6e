# shellcheck shell=bash
# Shared by every script here: where things are, questions to fast_dllm/runner, settings. Sourced after `set -euo pipefail`.
# PROJECT_ROOT has the results; CODE_ROOT has the code that runs (in a job the snapshot that was submitted, else the same).

CODE_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PROJECT_ROOT=${PROJECT_ROOT:-$CODE_ROOT}
# shellcheck source=sbatch/venv.sh
source "$CODE_ROOT/sbatch/venv.sh"

die() { # one line, then exit 2: the request was wrong and nothing was started
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# What a user typed, safe to show on one line
shown() { printf '%q' "$1"; }

need_value() { (($2 >= 2)) || die "$1 needs a value"; }

# -- the runner: what a task, a configuration, a summary and a state are ---------------------------------------------------
runner() { # command, options: python3 -m fast_dllm.runner with the code of this folder, whatever folder it is called from
  find_python
  "$RUNNER_PYTHON" -BS -X utf8 "$CODE_ROOT/fast_dllm/runner/__main__.py" "${0##*/}" "$PROJECT_ROOT" "$@"
}

ask_runner() { # command, options: sets the variables that it answers with. Ends the script where that fails
  local answer
  find_python
  answer=$(runner "$@") || exit
  eval "$answer"
}

# Set by `ask_runner request`: what is to be evaluated, and the words that ask for the same again. FOLDER[task/configuration]
# is below results/, logs/ and artifacts/, and the job's name.
# shellcheck disable=SC2034 # read by the scripts that source this file
EXPERIMENT="" TASK="" LIMIT="" TASK_FOLDER="" MODEL="" PART="" RUN_TASKS=() CONFIGS=() REQUEST=()
# shellcheck disable=SC2034
declare -A FOLDER=()

# -- settings ----------------------------------------------------------------------------------------------------------
load_cluster_settings() { ask_runner settings; } # of sbatch/cluster.env; what the caller's environment has already set stays

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# What lm_eval, CUDA and the hub read from the environment; a value that the user has set stays.
export_environment() {
  export HF_ALLOW_CODE_EVAL=${HF_ALLOW_CODE_EVAL:-1}
  export HF_DATASETS_TRUST_REMOTE_CODE=${HF_DATASETS_TRUST_REMOTE_CODE:-true}
  export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
  export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  export PYTHONPATH=$CODE_ROOT PYTHONUNBUFFERED=1
  export FAST_DLLM_NUM_THREADS=${FAST_DLLM_NUM_THREADS:-${OMP_NUM_THREADS:-auto}} # accelerate writes the latter over
}
