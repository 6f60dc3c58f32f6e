#!/usr/bin/env bash
# Evaluate on this machine, without Slurm. See --help.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=sbatch/evaluate.sh
source "$CODE_ROOT/sbatch/evaluate.sh"
# shellcheck source=sbatch/status.sh
source "$CODE_ROOT/sbatch/status.sh"

usage() {
  cat <<HELP
Usage: bash sbatch/local.sh [OPTION...]
Evaluates on this machine (makes the venv if it is missing) and writes
results/<experiment>/<task>[_limit_<N>]/<configuration>/{results.json,summary.json}. Interrupted, it goes on where it was.

  --task T          ${TASKS[*]} (default gsm8k),
                    or ${CODE_TASKS[*]}
  --limit N         only the first N questions (of each subtask)
  --experiment E    $(experiments | paste -sd ' ' -) (default $DEFAULT_EXPERIMENT)
  --config C[,C]    plain (the model without layer reuse, the default) or one of
                    ${CONFIGS[*]}
  --matrix          the nine configurations; those that are complete are skipped
  --demo            the matrix on toy_math with the tiny model, 200 questions each, and its table: a few minutes
  --force           answer every question again; with --matrix the complete configurations too
  --model M         tiny, a folder or a hub id (default: $DEFAULT_MODEL with a CUDA GPU, else tiny)
  --threshold X     confidence above which a token is accepted, 0 to 1 (default 1 for plain, else 0.9)
  --batch_size N    questions decoded together (default 1)
  --num_fewshot N   examples in the prompt (default 0)
  --confirm_run_unsafe_code
                    run the code that the model writes on this machine, as you; ${CODE_TASKS[0]} and the like need it
  --help

Examples:
  bash sbatch/local.sh --demo
  bash sbatch/local.sh --model tiny --task gsm8k --limit 10
  bash sbatch/local.sh --task toy_math --limit 50 --config k2_middle
  bash sbatch/local.sh --task toy_math --limit 50 --matrix
HELP
}

parse_options() {
  TASK=gsm8k LIMIT="" EXPERIMENT=$DEFAULT_EXPERIMENT MODEL="" GIVEN_THRESHOLD="" BATCH_SIZE="" FEWSHOT=0 MATRIX=0 DEMO=0 FRESH=0 CONFIRMED=""
  SELECTED=()
  while (($#)); do
    case $1 in
      --task) need_value "$1" $#; TASK=$2; shift ;;
      --limit) need_value "$1" $#; check_count "$1" "$2"; LIMIT=$2; shift ;;
      --experiment) need_value "$1" $#; EXPERIMENT=$2; shift ;;
      --config) need_value "$1" $#; split_configs "$2" plain; shift ;;
      --model) need_value "$1" $#; MODEL=$2; shift ;;
      --threshold) need_value "$1" $#; check_threshold "$2"; GIVEN_THRESHOLD=$2; shift ;;
      --batch_size | --batch-size) need_value "$1" $#; check_count "$1" "$2"; BATCH_SIZE=$2; shift ;;
      --num_fewshot) need_value "$1" $#; [[ $2 == 0 ]] || check_count "$1" "$2"; FEWSHOT=$2; shift ;;
      --confirm_run_unsafe_code) CONFIRMED=yes ;;
      --matrix) MATRIX=1 ;;
      --demo) DEMO=1 ;;
      --force) FRESH=1 ;;
      -h | --help) usage; exit 0 ;;
      *) die "unknown option $(shown "$1"); valid: --task --limit --experiment --config --matrix --demo --force --model --threshold --batch_size --num_fewshot --confirm_run_unsafe_code --help" ;;
    esac
    shift
  done
  if ((DEMO)); then
    # an answer does not depend on the batch that it was given in; together the questions take a third of the time
    TASK=toy_math MATRIX=1 LIMIT=${LIMIT:-200} MODEL=${MODEL:-tiny} BATCH_SIZE=${BATCH_SIZE:-32}
  fi
  BATCH_SIZE=${BATCH_SIZE:-1}
  check_task "$TASK" "${CODE_TASKS[@]}"
  check_experiment "$EXPERIMENT"
  if ((MATRIX)); then
    ((${#SELECTED[@]} == 0)) || die "--matrix runs all nine configurations; leave out --config"
    SELECTED=("${CONFIGS[@]}")
  elif ((${#SELECTED[@]} == 0)); then
    SELECTED=(plain)
  fi
  if [[ -z $MODEL ]]; then
    if has_gpu; then MODEL=$DEFAULT_MODEL; else MODEL=tiny; fi
  fi
  resolve_model "$MODEL"
}

is_done() { # CONFIG of a matrix, whose files have been read, has a result that is shown as it is
  examine
  case ${STATE[$CONFIG]} in
    complete) say "== $CONFIG is complete, skipped" ;;
    stale) ((!DEMO)) && say "== $CONFIG is ${DETAIL[$CONFIG]}; skipped, --force runs it again" ;;
    *) return 1 ;;
  esac
}

# The configurations with one threshold share a process, and the model that it loads. One that fails does not stop the
# others: they go on in another process. Sets STATUS and ALL_FAILED.
evaluate_pending() { # [configuration...]
  (($#)) || return 0
  THRESHOLD=${GIVEN_THRESHOLD:-$(default_threshold "$1")}
  local pending=("$@") status
  while ((${#pending[@]})); do
    say "== $EXPERIMENT/$(task_folder "$TASK" "$LIMIT")/$(IFS=,; printf '%s' "${pending[*]}"): model $MODEL, threshold $THRESHOLD"
    status=0
    evaluate "${pending[@]}" || status=$?
    if ((!MATRIX)); then
      for CONFIG in ${RUNS_DONE[@]+"${RUNS_DONE[@]}"}; do print_summary "results/$(run_folder)/summary.json"; done
    fi
    ALL_FAILED+=(${RUNS_FAILED[@]+"${RUNS_FAILED[@]}"})
    ((status == 0)) || STATUS=$status
    # what was wrong with the input of one is wrong for all; 2 is eval.py's own exit status
    if ((status == 2)); then ALL_FAILED+=(${RUNS_LEFT[@]+"${RUNS_LEFT[@]}"}) && return; fi
    pending=(${RUNS_LEFT[@]+"${RUNS_LEFT[@]}"})
  done
}

main() {
  parse_options "$@"
  # data sets given as folders (openai/gsm8k) and the results are found from the project's folder
  cd -- "$PROJECT_ROOT"
  load_cluster_settings
  venv_activate || exit 1
  export_environment
  local plain=() reuse=()
  STATUS=0 ALL_FAILED=() QUEUED=()
  if ((MATRIX)); then read_files; fi
  for CONFIG in "${SELECTED[@]}"; do
    THRESHOLD=${GIVEN_THRESHOLD:-$(default_threshold "$CONFIG")}
    if ((MATRIX && !FRESH)) && is_done; then continue; fi
    if [[ $CONFIG == plain ]]; then plain=(plain); else reuse+=("$CONFIG"); fi
  done
  evaluate_pending ${plain[@]+"${plain[@]}"}
  evaluate_pending ${reuse[@]+"${reuse[@]}"}
  if ((${#ALL_FAILED[@]})); then say "${0##*/}: failed: ${ALL_FAILED[*]}"; fi
  if ((MATRIX)); then
    THRESHOLD=${GIVEN_THRESHOLD:-0.9}
    examine_all || true # the queue does not matter here
    print_frame
    print_table
  fi
  exit "$STATUS"
}

main "$@"
