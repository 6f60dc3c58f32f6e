#!/usr/bin/env bash
#SBATCH --job-name=baseline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=08:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --output=baseline_%j.log
# The plain model, without layer reuse, at threshold 1, on every task: sbatch sbatch/baseline.sh [OPTION...]
# Submitted from the project's folder. Also runs without Slurm: bash sbatch/baseline.sh --model tiny --limit 2 --task toy_math
# As a job it first copies the code and goes on from the copy (--snapshot), so that what is edited or pulled during the
# next hours changes nothing; and it is continued as _job.sh is (continue.sh). Its 8 h are what the free QOS allows.
set -euo pipefail
# the script of a batch job, and not one that somebody starts by hand within an allocation
if [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; then BATCH=yes; else BATCH=no; fi
if [[ $BATCH == yes ]]; then cd -- "$SLURM_SUBMIT_DIR"; else cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."; fi
PROJECT_ROOT=$(pwd -P) SNAPSHOT=""
if [[ ${1:-} == --snapshot ]]; then
  SNAPSHOT=$2
  shift 2
fi
[[ -f ${SNAPSHOT:+.snapshots/$SNAPSHOT/}sbatch/common.sh ]] || { echo "baseline.sh: no sbatch/common.sh in $PROJECT_ROOT/${SNAPSHOT:+.snapshots/$SNAPSHOT}: submit it from the project's folder" >&2; exit 2; }
# shellcheck source=sbatch/common.sh
source "${SNAPSHOT:+.snapshots/$SNAPSHOT/}sbatch/common.sh"
# shellcheck source=sbatch/continue.sh
source "$CODE_ROOT/sbatch/continue.sh"

parse_options() {
  REQUEST=() FORCE=0 CONTINUE=3 SHARED=()
  while (($#)); do
    case $1 in
      --task | --limit | --model) need_value "$1" $#; REQUEST+=("$1=$2"); shift ;;
      --force) FORCE=1 ;;
      --shards | --gpus | --gpu | --hours) need_value "$1" $#; SHARED+=("$1" "$2"); shift ;;
      --continue | --after | --progress | --stalled) need_value "$1" $#; continue_option "$1" "$2"; shift ;;
      -h | --help) runner help; exit ;;
      *) die "unknown option $(shown "$1"); valid: --task --limit --model --force --continue --shards --gpus --gpu --hours --help" ;;
    esac
    shift
  done
  ask_runner request --several --baseline --config=plain "${REQUEST[@]}"
  REQUEST+=("--model=$MODEL")
}

go_on_from_snapshot() { # this script's options
  local tries=1
  until snapshot_name && snapshot_make; do
    ((tries++ < 3)) || exit 1
    sleep 1
  done
  exec bash ".snapshots/$SNAPSHOT/sbatch/baseline.sh" --snapshot "$SNAPSHOT" "$@"
}

ask_successor() { # --dependency for sbatch, further options
  ask_runner successor "--text=${SLURM_JOB_NAME:-baseline}" --resources --script=baseline.sh "--snapshot=$SNAPSHOT" "--dependency=$1" -- \
    --task "$(IFS=,; echo "${RUN_TASKS[*]}")" ${LIMIT:+--limit "$LIMIT"} --model "$MODEL" "${@:2}"
}

submit_in_shares() { # each task as run.sh submits its plain configuration
  local status=0 more=(--model "$MODEL" ${LIMIT:+--limit "$LIMIT"} --continue "$CONTINUE" "${SHARED[@]}")
  [[ $BATCH == no ]] || die "${SHARED[0]} submits jobs of its own: bash sbatch/baseline.sh, not sbatch"
  if ((FORCE)); then more+=(--force); fi
  for TASK in "${RUN_TASKS[@]}"; do bash "$CODE_ROOT/sbatch/run.sh" --task "$TASK" "${more[@]}" plain || status=$?; done
  exit "$status"
}

run_task() { # TASK
  local status=0
  evaluate plain || status=$?
  if ((${#RUNS_DONE[@]})); then runner summary "${REQUEST[@]}" "--task=$TASK"; fi
  if [[ $TOLD_TO_STOP == yes ]]; then
    [[ -n $FAILURE_CLASS ]] || GOES_ON=yes # a task that ended well in that moment is not the last one
    end_job 143
  fi
  return "$status"
}

main() {
  local status failed=() elsewhere=()
  parse_options "$@"
  if ((${#SHARED[@]})); then submit_in_shares; fi
  load_cluster_settings # sbatch itself has not read them: of this job they set the hub's cache and the like
  if [[ $BATCH == yes && -z $SNAPSHOT ]]; then go_on_from_snapshot "$@"; fi
  if ((FORCE)); then runner force "${REQUEST[@]}"; fi
  HOW=(--mode=job --keep "--after=$AFTER")
  ask_runner left "${REQUEST[@]}" "--after=$AFTER"
  if ((${#LEFT[@]})); then
    if [[ $BATCH == yes ]]; then
      say "job $SLURM_JOB_ID on $(uname -n): ${RUN_TASKS[*]}, code $SNAPSHOT"
      begin_job
    fi
    activate_or_fail
  fi
  for TASK in "${RUN_TASKS[@]}"; do
    status=0
    run_task || status=$?
    case $status in
      0) ;;
      75) elsewhere+=("$TASK") ;;
      *) failed+=("$TASK") ;;
    esac
  done
  # another job or local.sh was at them; by now it may be done, or dead
  for TASK in ${elsewhere[@]+"${elsewhere[@]}"}; do run_task || failed+=("$TASK"); done
  if ((${#failed[@]})); then
    say "baseline.sh: failed: ${failed[*]}"
    end_job 1
  fi
  end_job 0
}

main "$@" # it ends there, and was read to here before it starts: a pull may change this file meanwhile
