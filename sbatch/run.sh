#!/usr/bin/env bash
# The configurations of an experiment on a task: what is done, what runs, and one Slurm job for each that is missing.
# See --help and docs/operations.md.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=sbatch/submit.sh
source "$CODE_ROOT/sbatch/submit.sh"

OPTIONS="--status --check --json --dry-run --force --limit --task --experiment --config --threshold --model --model_args --num_fewshot --continue --hours --gpu --gpus --shards --report --help"

parse_options() {
  REQUEST=(--matrix) HOW=(--continue=3) DRY_RUN=0 MODE=submit SHOW=()
  while (($#)); do
    case $1 in
      --task | --experiment | --limit | --config | --threshold | --model | --model_args | --num_fewshot) need_value "$1" $#; REQUEST+=("$1=$2"); shift ;;
      --continue | --hours | --gpu | --gpus | --shards) need_value "$1" $#; HOW+=("$1=$2"); shift ;;
      --status) MODE=status ;;
      --dry-run) DRY_RUN=1 HOW+=(--dry_run) ;;
      --force) HOW+=(--force) ;;
      --check | --json) SHOW+=("$1") ;;
      -h | --help) runner help; exit ;;
      -*) die "unknown option $(shown "$1"); valid: $OPTIONS" ;;
      *) REQUEST+=("--config=$1") ;;
    esac
    shift
  done
  ((${#SHOW[@]} == 0)) || [[ $MODE == status ]] || die "--check and --json go with --status"
}

# What would make the jobs fail is said before they wait in a queue; warnings are shown and stop nothing.
look_first() {
  local python findings status=0
  ((!LOOKED)) || return 0
  LOOKED=1
  python=$(venv_complete "$(venv_location).d" "$(venv_hash)")/bin/python || python=$(python_from 8 venv) || {
    say "run.sh: no Python >= 3.8 with the venv module here, so nothing is checked before the submission"
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

submit_under_lock() {
  local status=0
  command -v sbatch >/dev/null 2>&1 || ((DRY_RUN)) || { say "run.sh: no sbatch here, so this is no Slurm cluster; sbatch/local.sh evaluates on this machine"; return 1; }
  if ((DRY_RUN)); then
    submit_missing
  else
    SUBMIT_LOCK=logs/$EXPERIMENT/$TASK_FOLDER/.submit
    lock_acquire "$SUBMIT_LOCK" forever
    submit_missing || status=$?
    lock_release "$SUBMIT_LOCK"
    return "$status"
  fi
}

submit_missing() {
  local status=0 result=0 lines config folder action detail words settings how submitted=0 waiting=0
  # under the lock: what another run.sh has just submitted is seen
  lines=$(runner plan "${REQUEST[@]}" "${HOW[@]}") || return
  snapshot_name
  while IFS=$'\t' read -r -u 3 config folder action detail words; do
    if [[ $action != submit ]]; then
      printf '  %s: not submitted, %s\n' "${folder##*/}" "$detail"
      if [[ $action == wait ]]; then waiting=$((waiting + 1)); fi
      if [[ $action == cancel* ]]; then
        say "  ${folder##*/}: --force does not run it twice; first: s$action"
        status=1
      fi
      continue
    fi
    if ((DRY_RUN)); then
      printf '  %s: would be submitted (%s)\n' "${folder##*/}" "$detail"
    else
      look_first || return 1
      lock_is_ours "$SUBMIT_LOCK" || { say "run.sh: another run.sh took this one for dead and goes on"; return 1; }
      snapshot_make || { say "run.sh: nothing more is submitted; run it again"; return 1; }
    fi
    eval "settings=($words)" result=0 # quoted by the runner
    runner submit "${REQUEST[@]}" "${HOW[@]}" "--only=$config" "--snapshot=$SNAPSHOT" ${settings[@]+"${settings[@]}"} || result=$?
    case $result in
      0) submitted=$((submitted + 1)) ;;
      75) waiting=$((waiting + 1)) ;; # others had taken the place meanwhile
      *) status=1 ;;
    esac
  done 3<<<"$lines"
  if ((DRY_RUN)); then how="would be "; fi
  if ((waiting)); then say "run.sh: $submitted of $((submitted + waiting)) ${how-}submitted, $waiting wait for a place: run it again"; fi
  return "$status"
}

report_instead() { # the other words are those of python -m fast_dllm.report
  local word words=()
  for word; do [[ $word == --report ]] || words+=("$word"); done
  if ((${#words[@]} == $#)); then return; fi
  venv_activate && PYTHONPATH=$CODE_ROOT exec python -m fast_dllm.report ${words[@]+"${words[@]}"}
}

main() {
  LOOKED=0
  cd -- "$PROJECT_ROOT"
  report_instead "$@"
  parse_options "$@"
  if [[ $MODE == status ]]; then
    runner status "${REQUEST[@]}" ${SHOW[@]+"${SHOW[@]}"}
    return
  fi
  local words=("${REQUEST[@]}")
  ask_runner request "${words[@]}" "${HOW[@]}"
  REQUEST=("${words[@]}")
  load_cluster_settings
  submit_under_lock
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
