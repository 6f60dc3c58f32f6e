#!/usr/bin/env bash
# The nine configurations of an experiment on a task: what is done, what runs, and one Slurm job for each that is missing.
# See --help and docs/operations.md.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=sbatch/status.sh
source "$CODE_ROOT/sbatch/status.sh"
# shellcheck source=sbatch/submit.sh
source "$CODE_ROOT/sbatch/submit.sh"

OPTIONS="--status --check --json --dry-run --force --limit --task --experiment --config --threshold --model --continue --report --help"

usage() {
  cat <<HELP
Usage: bash sbatch/run.sh [OPTION...] [CONFIG...]
Submits one Slurm job for each configuration that is neither complete, nor queued, nor running.

  --status          show what is complete, running, queued, failed or missing; submits nothing
  --check           with --status: exit status 3 while anything is incomplete
  --json            with --status: the same as JSON
  --dry-run         show what would be submitted and why, and write nothing
  --task T          ${TASKS[*]} (default gsm8k)
  --experiment E    $(experiments | paste -sd ' ' -) (default $DEFAULT_EXPERIMENT)
  --limit N         only the first N questions (of each subtask); stored apart, as <task>_limit_<N>
  --config C[,C]    only these configurations: ${CONFIGS[*]}
  --force           run complete and stale configurations again, from the first question
  --threshold X     confidence above which a token is accepted, 0 to 1 (default 0.9)
  --model M         a hub id, a folder or tiny (default $DEFAULT_MODEL)
  --continue N      how many further jobs may continue one that Slurm ended: time limit, preemption, node failure (default 3)
  --report          the table of results
  --help

Examples:
  bash sbatch/run.sh --status
  bash sbatch/run.sh --dry-run
  bash sbatch/run.sh                                  the whole matrix on gsm8k
  bash sbatch/run.sh --limit 100 k1_first k2_middle   a quick look
  bash sbatch/run.sh --task minerva_math --experiment $DEFAULT_EXPERIMENT
HELP
}

parse_options() {
  TASK=gsm8k EXPERIMENT=$DEFAULT_EXPERIMENT LIMIT="" MODEL="" THRESHOLD="" CONTINUE=3 FORCE=0 MODE=submit CHECK=0 AS_JSON=0
  SELECTED=()
  while (($#)); do
    case $1 in
      --task | --experiment | --limit | --config | --threshold | --model | --continue) need_value "$1" $# ;;&
      --task) TASK=$2; shift ;;
      --experiment) EXPERIMENT=$2; shift ;;
      --limit) check_count "$1" "$2"; LIMIT=$2; shift ;;
      --config) split_configs "$2"; shift ;;
      --threshold) check_threshold "$2"; THRESHOLD=$2; shift ;;
      --model) resolve_model "$2"; shift ;;
      --continue) [[ $2 == 0 ]] || check_count "$1" "$2"; CONTINUE=$2; shift ;;
      --status | --report) MODE=${1#--} ;;
      --dry-run) DRY_RUN=1 ;;
      --force) FORCE=1 ;;
      --check) CHECK=1 ;;
      --json) AS_JSON=1 ;;
      -h | --help) usage; exit 0 ;;
      -*) die "unknown option $(shown "$1"); valid: $OPTIONS" ;;
      *) split_configs "$1" ;;
    esac
    shift
  done
  check_task "$TASK"
  check_experiment "$EXPERIMENT"
  ((CHECK + AS_JSON == 0)) || [[ $MODE == status ]] || die "--check and --json go with --status"
  if ((${#SELECTED[@]} == 0)); then SELECTED=("${CONFIGS[@]}"); fi
}

warn_if_reuse_cannot_matter() {
  if one_of "$TASK" mmlu gpqa_main_n_shot toy_choice && ((${#SELECTED[@]} > 1)); then
    say "$TASK is scored by log-likelihood, in one full forward: layer reuse cannot change its scores. One configuration suffices: k1_first"
  fi
}

# What would make the jobs fail is said before they wait in a queue; warnings are shown and stop nothing.
look_first() {
  local python findings status=0
  ((!LOOKED)) || return 0
  LOOKED=1
  python=$(venv_complete "$(venv_location).d" "$(venv_hash)")/bin/python || python=$(venv_find_python 2>/dev/null) || {
    say "run.sh: no Python >= 3.10 with the venv module here, so nothing is checked before the submission"
    return 0
  }
  findings=$("$python" -m fast_dllm.doctor --quick --task "$TASK" --model "$MODEL" 2>&1) || status=$?
  grep -v '^ok ' <<<"$findings" >&2 || true
  if grep -q '^fail ' <<<"$findings"; then
    say "run.sh: nothing is submitted; python -m fast_dllm.doctor --task $TASK --model $MODEL says more"
    return 1
  fi
  ((status == 0)) || say "run.sh: the check before the submission failed; submitting all the same"
}

submit_config() { # CONFIG, which is missing, or complete and --force
  local id
  sbatch_command "" --continue "$CONTINUE"
  if ((DRY_RUN)); then
    printf '  %s: would be submitted (%s)\n    %s\n' "$CONFIG" "${DETAIL[$CONFIG]:-complete, forced}" "$(printf '%q ' "${SBATCH_COMMAND[@]}")"
    return 0
  fi
  mkdir -p -- "logs/$(run_folder)" # Slurm does not make it, and loses the log
  if ((FORCE)); then ask_again || return 1; fi
  id=$(submit) || { say "  $CONFIG: sbatch failed: $id"; return 1; }
  mkdir -p -- "results/$(run_folder)"
  record_job "results/$(run_folder)" "$id" "logs/$(run_folder)/slurm_$id.log"
  printf '  %s: job %s\n' "$CONFIG" "$id"
}

submit_under_lock() {
  local status=0
  warn_if_reuse_cannot_matter
  command -v sbatch >/dev/null 2>&1 || ((DRY_RUN)) || { say "run.sh: no sbatch here, so this is no Slurm cluster; sbatch/local.sh evaluates on this machine"; return 1; }
  if ((DRY_RUN)); then
    submit_missing
  else
    SUBMIT_LOCK=logs/$EXPERIMENT/$(task_folder "$TASK" "$LIMIT")/.submit
    lock_acquire "$SUBMIT_LOCK" forever
    submit_missing || status=$?
    lock_release "$SUBMIT_LOCK"
    return "$status"
  fi
}

submit_missing() {
  local status=0 state
  MODEL=${MODEL:-$DEFAULT_MODEL} THRESHOLD=${THRESHOLD:-0.9}
  # under the lock: what another run.sh has just submitted is seen
  if ! examine_all; then
    say "run.sh: squeue failed, so nothing is submitted: $QUEUE_FAULT"
    ((DRY_RUN)) || return 1
  fi
  snapshot_name
  for CONFIG in "${SELECTED[@]}"; do
    state=${STATE[$CONFIG]}
    case $state in
      running | queued)
        printf '  %s: not submitted, %s\n' "$CONFIG" "${DETAIL[$CONFIG]}"
        if ((FORCE)); then
          say "  $CONFIG: --force does not run it twice; first: scancel ${JOB[$CONFIG]}"
          status=1
        fi
        continue
        ;;
      complete | stale)
        if ! ((FORCE)); then
          printf '  %s: not submitted, %s (--force runs it again)\n' "$CONFIG" "${DETAIL[$CONFIG]:-complete}"
          continue
        fi
        ;;
    esac
    if ((!DRY_RUN)); then
      look_first || return 1
      lock_is_ours "$SUBMIT_LOCK" || { say "run.sh: another run.sh took this one for dead and goes on"; return 1; }
      snapshot_make || { say "run.sh: nothing more is submitted; run it again"; return 1; }
    fi
    submit_config || status=1
  done
  return "$status"
}

report() {
  [[ -f fast_dllm/report.py ]] || die "--report: this checkout has no fast_dllm/report.py"
  venv_activate || exit 1
  exec python -m fast_dllm.report --experiment "$EXPERIMENT" --task "$(task_folder "$TASK" "$LIMIT")"
}

main() {
  DRY_RUN=0 LOOKED=0
  cd -- "$PROJECT_ROOT"
  parse_options "$@"
  case $MODE in
    report) report ;;
    status)
      examine_all || say "run.sh: squeue failed, so jobs are not known: $QUEUE_FAULT"
      if ((AS_JSON)); then print_json; else print_frame; fi
      for CONFIG in "${SELECTED[@]}"; do
        if ((CHECK)) && [[ ${STATE[$CONFIG]} != complete ]]; then exit 3; fi
      done
      ;;
    submit)
      load_cluster_settings
      submit_under_lock
      ;;
  esac
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
