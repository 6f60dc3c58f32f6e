#!/usr/bin/env bash
#SBATCH --job-name=baseline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=12:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --output=baseline_%j.log
# The plain model, without layer reuse, at threshold 1, on every task: sbatch sbatch/baseline.sh [OPTION...]
# Submitted from the project's folder. Also runs without Slurm: bash sbatch/baseline.sh --model tiny --limit 2 --task toy_math
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "${BASH_SOURCE[0]}")/..}"
[[ -f sbatch/common.sh ]] || { echo "baseline.sh: no sbatch/common.sh in $PWD: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=sbatch/common.sh
source sbatch/common.sh
# shellcheck source=sbatch/evaluate.sh
source sbatch/evaluate.sh

BASELINE_TASKS=(mmlu gpqa_main_n_shot gsm8k minerva_math ifeval)

usage() {
  cat <<HELP
Usage: sbatch sbatch/baseline.sh [OPTION...]
Evaluates the plain model (no layer reuse, threshold 1) on ${BASELINE_TASKS[*]};
mmlu with 5 examples in the prompt, the others with none. Results: results/$DEFAULT_EXPERIMENT/<task>[_limit_<N>]/plain/.
A task that fails does not stop the others; the exit status is 1 then. Tasks that are complete are skipped.

  --task T[,T]   only these: ${TASKS[*]}
  --limit N      only the first N questions (of each subtask)
  --model M      a hub id, a folder or tiny (default $DEFAULT_MODEL)
  --force        run complete ones again, from the first question
  --help
HELP
}

parse_options() {
  SELECTED=("${BASELINE_TASKS[@]}") EXPERIMENT=$DEFAULT_EXPERIMENT CONFIG=plain THRESHOLD=1 LIMIT="" MODEL=$DEFAULT_MODEL FRESH=0
  # shellcheck disable=SC2034 # read in evaluate.sh and common.sh
  BATCH_SIZE=1 BATCH=${SLURM_JOB_ID:+yes}
  while (($#)); do
    case $1 in
      --task | --limit | --model) need_value "$1" $# ;;&
      --task)
        [[ $2 != *[[:cntrl:]]* ]] || die "no task named $(shown "$2"); valid: ${TASKS[*]}"
        IFS=, read -r -a SELECTED <<<"$2"
        ((${#SELECTED[@]})) || die "--task needs a name; valid: ${TASKS[*]}"
        shift
        ;;
      --limit) check_count "$1" "$2"; LIMIT=$2; shift ;;
      --model) resolve_model "$2"; shift ;;
      --force) FRESH=1 ;;
      -h | --help) usage; exit 0 ;;
      *) die "unknown option $(shown "$1"); valid: --task --limit --model --force --help" ;;
    esac
    shift
  done
  for TASK in "${SELECTED[@]}"; do check_task "$TASK"; done
}

main() {
  parse_options "$@"
  venv_activate || exit 1
  export_environment
  local failed=()
  for TASK in "${SELECTED[@]}"; do
    if ((!FRESH)) && summary_is_complete "$EXPERIMENT" "$TASK" "$LIMIT" "$CONFIG"; then
      say "== $(run_folder) is complete, skipped"
      continue
    fi
    if [[ $TASK == mmlu ]]; then FEWSHOT=5; else FEWSHOT=0; fi
    say "== $(run_folder): model $MODEL, $FEWSHOT examples in the prompt"
    if evaluate; then
      keep_in_artifacts
      print_summary "results/$(run_folder)/summary.json"
    else
      failed+=("$TASK")
    fi
    [[ $TOLD_TO_STOP == no ]] || exit 143
  done
  if ((${#failed[@]})); then
    say "baseline.sh: failed: ${failed[*]}"
    exit 1
  fi
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
