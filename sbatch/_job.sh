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
# Options: --snapshot ID, then --experiment E --task T --limit N --config C --model M --threshold X --model_args A=V[,A=V]
# --num_fewshot N, --gpus P, --shards N (as an array's: one share; else the job that finishes the run), and those of continue.sh
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
  local config=""
  REQUEST=() WORDS=() SHARDS=""
  while (($#)); do
    need_value "$1" $#
    case $1 in
      --config | --experiment | --task | --limit | --model | --threshold | --model_args | --num_fewshot)
        [[ $1 != --config ]] || config=$2
        REQUEST+=("$1=$2") WORDS+=("$1" "$2")
        ;;
      --shards) SHARDS=$2 WORDS+=("$1" "$2") REQUEST+=("--shard=${SLURM_ARRAY_TASK_ID-}/$2") ;;
      --gpus) GPUS=$2 WORDS+=("$1" "$2") REQUEST+=("--gpus=$2") ;;
      --continue | --after | --progress | --stalled) continue_option "$1" "$2" ;;
      *) die "unknown option $(shown "$1")" ;;
    esac
    shift 2
  done
  [[ -n $config ]] || die "--config is missing: the one configuration of this job"
  ask_runner request "${REQUEST[@]}"
  ((${#CONFIGS[@]} == 1)) || die "a job has one --config, not $(shown "$config")"
  REQUEST+=("--model=$MODEL" "--config=${CONFIGS[0]}")
  RUN=${FOLDER[$TASK/${CONFIGS[0]}]}
  NEXT=("--text=$RUN" "--log=logs/$RUN/slurm_%j.log" "--gpus=$GPUS" "--array=${PART:+$SLURM_ARRAY_TASK_ID}" --script=_job.sh "--snapshot=$SNAPSHOT")
}

ask_successor() { # --dependency for sbatch, further options
  ask_runner successor "${NEXT[@]}" "--dependency=$1" -- "${WORDS[@]}" "${@:2}"
}

main() {
  # shellcheck disable=SC2034 # read in evaluate.sh
  BATCH=yes HOW=(--mode=job --keep)
  parse_options "$@"
  say "job $JOB on $(uname -n): $RUN, code ${SNAPSHOT:-of the project folder}"
  ask_runner left "${REQUEST[@]}"
  if ((${#LEFT[@]} == 0)); then
    say "$RUN is complete, nothing to do"
    runner keep "${REQUEST[@]}" # the job before may have been ended between its last answer and this
    exit 0
  fi
  mkdir -p -- "logs/$RUN" # of the job that continues this one
  begin_job
  if [[ -n $SHARDS && -z $PART ]]; then # it finishes the run; while shares are at work another one is to wait for them
    ask_runner wait_for_shares "${REQUEST[@]}" "${NEXT[@]}" -- "${WORDS[@]}" --continue "$CONTINUE"
    [[ $WAITS == no ]] || end_job 0
  fi
  activate_or_fail
  local status=0
  evaluate "${CONFIGS[0]}" || status=$?
  if ((status == 0)) && [[ -n $PART ]]; then # the last share finishes the run; where it does not get through, the job that waits
    ask_runner last "${REQUEST[@]}"
    if [[ -z $PART ]] && evaluate "${CONFIGS[0]}" && ((${#WAITING[@]})); then scancel "${WAITING[@]}" || true; fi
  fi
  end_job "$status"
}

main "$@"
