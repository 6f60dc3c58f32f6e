#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=12:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --open-mode=append
# One configuration's job; submitted by run.sh, with the code that was there at that moment (--snapshot).
# Options: --snapshot ID --experiment E --task T --limit N --config C --model M --threshold X, and those of continue.sh
set -euo pipefail

PROJECT_ROOT=$(cd -- "${SLURM_SUBMIT_DIR:?submit this with sbatch}" && pwd -P)
cd -- "$PROJECT_ROOT"
SNAPSHOT=""
if [[ ${1:-} == --snapshot ]]; then
  SNAPSHOT=$2
  shift 2
fi
[[ -f ${SNAPSHOT:+.snapshots/$SNAPSHOT/}sbatch/common.sh ]] || { echo "_job.sh: no sbatch/common.sh in $PROJECT_ROOT/${SNAPSHOT:+.snapshots/$SNAPSHOT}: submit from the project's folder" >&2; exit 2; }
# shellcheck source=sbatch/common.sh
source "${SNAPSHOT:+.snapshots/$SNAPSHOT/}sbatch/common.sh"
# shellcheck source=sbatch/continue.sh
source "$CODE_ROOT/sbatch/continue.sh"

parse_options() {
  EXPERIMENT=$DEFAULT_EXPERIMENT TASK=gsm8k LIMIT="" CONFIG="" MODEL=$DEFAULT_MODEL THRESHOLD=""
  # shellcheck disable=SC2034 # read in evaluate.sh
  BATCH=yes BATCH_SIZE=1 FEWSHOT=0 FRESH=0
  while (($#)); do
    need_value "$1" $#
    case $1 in
      --experiment) check_experiment "$2"; EXPERIMENT=$2 ;;
      --task) check_task "$2"; TASK=$2 ;;
      --limit) check_count "$1" "$2"; LIMIT=$2 ;;
      --config) check_config "$2" plain; CONFIG=$2 ;;
      --model) resolve_model "$2" ;;
      --threshold) check_threshold "$2"; THRESHOLD=$2 ;;
      --continue | --after | --progress | --stalled) continue_option "$1" "$2" ;;
      *) die "unknown option $(shown "$1")" ;;
    esac
    shift 2
  done
  [[ -n $CONFIG ]] || die "--config is missing; valid: ${CONFIGS[*]} plain"
  THRESHOLD=${THRESHOLD:-$(default_threshold "$CONFIG")}
  RUN_TASKS=("$TASK")
}

successor_command() { sbatch_command "$@"; }

main() {
  parse_options "$@"
  say "job $SLURM_JOB_ID on $(uname -n): $(run_folder), code ${SNAPSHOT:-of the project folder}"
  if task_is_complete; then
    say "$(run_folder) is complete, nothing to do"
    keep_in_artifacts # the job before may have been ended between its last answer and this
    exit 0
  fi
  mkdir -p -- "logs/$(run_folder)" # of the job that continues this one
  begin_job
  activate_or_fail
  local status=0
  evaluate || status=$?
  if ((status == 0)); then keep_in_artifacts; fi
  end_job "$status"
}

main "$@"
