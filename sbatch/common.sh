# shellcheck shell=bash
# Shared by every script here: names, checks, the evaluation command. Sourced after `set -euo pipefail`.
# PROJECT_ROOT has the results; CODE_ROOT has the code that runs (in a job the snapshot that was submitted, else the same).

CODE_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PROJECT_ROOT=${PROJECT_ROOT:-$CODE_ROOT}
# shellcheck source=sbatch/venv.sh
source "$CODE_ROOT/sbatch/venv.sh"
# shellcheck source=sbatch/summary.sh
source "$CODE_ROOT/sbatch/summary.sh"

# shellcheck disable=SC2034 # read by the scripts that source this file
DEFAULT_EXPERIMENT=00_baseline DEFAULT_MODEL=Efficient-Large-Model/Fast_dLLM_v2_7B
# k rows, subsets first/middle/last: the order of every table
CONFIGS=(k1_first k1_middle k1_last k2_first k2_middle k2_last k3_first k3_middle k3_last)
TASKS=(gsm8k mmlu gpqa_main_n_shot minerva_math ifeval toy_math toy_choice)
# Scored by running what the model wrote: local.sh evaluates them with --confirm_run_unsafe_code, prefetch.sh fetches them.
# shellcheck disable=SC2034 # read by those two
CODE_TASKS=(humaneval humaneval_instruct mbpp)

die() { # one line, then exit 2: the request was wrong and nothing was started
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# What a user typed, safe to show on one line
shown() { printf '%q' "$1"; }

one_of() { # $1: value, rest: the valid ones
  local value=$1 valid
  shift
  for valid; do [[ $value == "$valid" ]] && return 0; done
  return 1
}

experiments() { # the names of the experiments in CODE_ROOT; a folder with another kind of name is none
  local file name
  for file in "$CODE_ROOT"/experiments/*/generation_functions.py; do
    name=$(basename -- "$(dirname -- "$file")")
    if [[ -f $file && $name =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]]; then printf '%s\n' "$name"; fi
  done
}

need_value() { (($2 >= 2)) || die "$1 needs a value"; }

check_experiment() {
  local names
  mapfile -t names < <(experiments)
  one_of "$1" ${names[@]+"${names[@]}"} || die "no experiment named $(shown "$1"); there is: ${names[*]:-none}"
}

check_task() { # $1: name, rest: further valid names
  one_of "$1" "${TASKS[@]}" "${@:2}" || die "no task named $(shown "$1"); valid: ${TASKS[*]}${2:+ ${*:2}}"
}

split_tasks() { # $1: T[,T...], rest: further valid names. Sets SELECTED
  local task
  [[ $1 != *[[:cntrl:]]* ]] || check_task "$1" "${@:2}"
  IFS=, read -r -a SELECTED <<<"$1"
  ((${#SELECTED[@]})) || die "--task needs a name; valid: ${TASKS[*]}${2:+ ${*:2}}"
  for task in "${SELECTED[@]}"; do check_task "$task" "${@:2}"; done
}

check_config() { # $1: name, $2: further valid names
  # shellcheck disable=SC2086 # $2 is a list of words
  one_of "$1" "${CONFIGS[@]}" ${2:-} || die "no configuration named $(shown "$1"); valid: ${CONFIGS[*]}${2:+ $2}"
}

split_configs() { # $1: C[,C...], $2: further valid names. Appends to SELECTED, each once.
  local config list
  [[ $1 != *[[:cntrl:]]* ]] || die "no configuration named $(shown "$1"); valid: ${CONFIGS[*]}${2:+ $2}"
  IFS=, read -r -a list <<<"$1"
  ((${#list[@]})) || die "--config needs a name; valid: ${CONFIGS[*]}${2:+ $2}"
  for config in "${list[@]}"; do
    check_config "$config" "${2:-}"
    one_of "$config" ${SELECTED[@]+"${SELECTED[@]}"} || SELECTED+=("$config")
  done
}

check_count() { [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "$1 must be a whole number from 1, not $(shown "$2")"; }

check_threshold() {
  [[ $1 =~ ^(0|1|0?\.[0-9]+|0\.|1\.0*)$ ]] || die "--threshold must be a number from 0 to 1, not $(shown "$1")"
}

# Sets MODEL to what --model $1 names: `tiny`, a folder (absolute, for a job starts elsewhere) or a hub id.
resolve_model() {
  case $1 in
    tiny) MODEL=tiny ;;
    *[,=]* | *[[:cntrl:]]*) die "--model: a comma, an equals sign or a control character cannot be passed on in $(shown "$1")" ;;
    *)
      if [[ -d $1 ]]; then
        [[ -f $1/config.json ]] || die "--model: no config.json in the folder $(shown "$1")"
        MODEL=$(cd -- "$1" && pwd -P)
        [[ $MODEL != *[,=]* ]] || die "--model: the folder's full path has a comma or an equals sign: $(shown "$MODEL")"
      elif [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then
        MODEL=$1
      else
        die "--model: $(shown "$1") is neither 'tiny', nor a folder, nor a hub id (owner/name)"
      fi
      ;;
  esac
}

load_cluster_settings() { # NAME=value lines of sbatch/cluster.env; what the caller's environment has already set stays
  local line number=0
  [[ -f sbatch/cluster.env ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z_][A-Z0-9_]*)=(.*)$ ]] || die "sbatch/cluster.env, line $number is not NAME=value: $(shown "$line")"
    [[ -v ${BASH_REMATCH[1]} ]] || export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <sbatch/cluster.env
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

task_folder() { printf '%s%s\n' "$1" "${2:+_limit_$2}"; } # task, limit: a limited run can never pass for a full one

default_threshold() { if [[ $1 == plain ]]; then echo 1; else echo 0.9; fi; } # of a configuration

# What lm_eval, CUDA and the hub read from the environment; a value that the user has set stays.
export_environment() {
  export HF_ALLOW_CODE_EVAL=${HF_ALLOW_CODE_EVAL:-1}
  export HF_DATASETS_TRUST_REMOTE_CODE=${HF_DATASETS_TRUST_REMOTE_CODE:-true}
  export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
  export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  export PYTHONPATH=$CODE_ROOT PYTHONUNBUFFERED=1
  # its matrices are too small to share: with two threads on two busy cores it was 30 times slower than with one
  if [[ $MODEL == tiny ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
}

# The run is named by these variables, in every script: EXPERIMENT TASK LIMIT (or "") CONFIG, and how it is done by
# MODEL THRESHOLD BATCH_SIZE FEWSHOT.
# shellcheck disable=SC2153
run_folder() { printf '%s/%s/%s\n' "$EXPERIMENT" "$(task_folder "$TASK" "$LIMIT")" "$CONFIG"; }

# Sets EVAL_COMMAND. Several configurations (of the matrix) are answered by one process with one loaded model.
eval_command() { # configuration...
  local output several=""
  output=results/$EXPERIMENT/$(task_folder "$TASK" "$LIMIT")/
  local arguments="model_path=$MODEL,threshold=$THRESHOLD,show_speed=True,experiment_name=$EXPERIMENT"
  if (($# > 1)); then
    several=$(IFS=,; printf '%s' "$*")
  else
    output+=$1/
    if [[ $1 != plain ]]; then arguments+=",reuse_k=${1:1:1},layer_subset=${1#k?_}"; fi
  fi
  # every value that a user's `accelerate config` could change is given
  EVAL_COMMAND=(accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
  has_gpu || EVAL_COMMAND+=(--cpu)
  EVAL_COMMAND+=("$CODE_ROOT/eval.py" --tasks "$TASK" --batch_size "$BATCH_SIZE" --num_fewshot "$FEWSHOT"
    --model fast_dllm_v2 --apply_chat_template --fewshot_as_multiturn)
  [[ -z $LIMIT ]] || EVAL_COMMAND+=(--limit "$LIMIT")
  [[ -z ${CONFIRMED:-} ]] || EVAL_COMMAND+=(--confirm_run_unsafe_code)
  [[ -z $several ]] || EVAL_COMMAND+=(--configurations "$several")
  EVAL_COMMAND+=(--model_args "$arguments" --output_path "$output")
}
