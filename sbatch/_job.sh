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
# One configuration's job; submitted by run.sh, with the code that was there at that moment (--snapshot). A job that Slurm
# ends (time limit, preemption, node failure) is followed by one that answers only what is missing: it is submitted here
# at the start, waiting for this one to fail, because at the end there may be no time left to submit anything.
# Options: --snapshot ID --experiment E --task T --limit N --config C --model M --threshold X --fresh
#   --continue N           how many more jobs may follow
#   --after ID             the job that this one continues, --answers N: the batches answered when that one started,
#   --stalled N            jobs in a row before it that answered nothing
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
# shellcheck source=sbatch/evaluate.sh
source "$CODE_ROOT/sbatch/evaluate.sh"
# shellcheck source=sbatch/submit.sh
source "$CODE_ROOT/sbatch/submit.sh"

parse_options() {
  EXPERIMENT=$DEFAULT_EXPERIMENT TASK=gsm8k LIMIT="" CONFIG="" MODEL=$DEFAULT_MODEL THRESHOLD="" FRESH=0 CONTINUE=0
  # shellcheck disable=SC2034 # read in evaluate.sh
  BATCH=yes BATCH_SIZE=1 FEWSHOT=0 AFTER="" ANSWERS=0 STALLED=0
  while (($#)); do
    if [[ $1 != --fresh ]]; then need_value "$1" $#; fi
    case $1 in
      --experiment) check_experiment "$2"; EXPERIMENT=$2 ;;
      --task) check_task "$2"; TASK=$2 ;;
      --limit) check_count "$1" "$2"; LIMIT=$2 ;;
      --config) check_config "$2" plain; CONFIG=$2 ;;
      --model) resolve_model "$2" ;;
      --threshold) check_threshold "$2"; THRESHOLD=$2 ;;
      --continue) CONTINUE=$2 ;;
      --after) AFTER=$2 ;;
      --answers) ANSWERS=$2 ;;
      --stalled) STALLED=$2 ;;
      --fresh) FRESH=1; shift; continue ;;
      *) die "unknown option $(shown "$1")" ;;
    esac
    shift 2
  done
  [[ -n $CONFIG ]] || die "--config is missing; valid: ${CONFIGS[*]} plain"
  THRESHOLD=${THRESHOLD:-$(default_threshold "$CONFIG")}
}

# Prints how job $1 ended. Its own record comes first; a job that was killed could not write one, Slurm knows.
end_of_job() {
  local file class="" tries
  file=results/$(run_folder)/failure.json
  load_json "$file"
  if [[ ${JSON["$file:job_id"]-} == "$1" ]]; then class=${JSON["$file:class"]-}; fi
  for tries in 1 2 3 4 5 6; do
    if [[ -n $class && $class != terminated && $class != killed ]] || ! command -v sacct >/dev/null 2>&1; then break; fi
    ((tries == 1)) || sleep 5 # the accounting may lag behind
    class=$(class_of_state "$(sacct -X -n -P -j "$1" -o State,ExitCode 2>/dev/null | head -n 1)")
  done
  printf '%s\n' "${class:-killed}"
}

# Ends the script when the job that this one would continue is not one to continue.
continue_after() { # job id
  local class now
  class=$(end_of_job "$1")
  if ! one_of "$class" "${CONTINUED[@]}"; then
    say "job $1 is not continued: ${FAILURE_TEXT[$class]}"
    exit 0
  fi
  now=$(count_answers)
  if ((now == ANSWERS)); then STALLED=$((STALLED + 1)); else STALLED=0; fi
  say "continues job $1 (${FAILURE_TEXT[$class]}), $((now - ANSWERS)) batches further"
  if ((STALLED >= 2)); then
    write_failure "results/$(run_folder)" no_progress 1 "$(log_of_this_job)" "jobs before this one answered nothing, twice"
    say "not continued any more: ${FAILURE_TEXT[no_progress]}"
    exit 1
  fi
}

submit_successor() {
  SUCCESSOR=""
  ((CONTINUE > 0)) || return 0
  mkdir -p -- "logs/$(run_folder)"
  sbatch_command "afternotok:$SLURM_JOB_ID" --continue "$((CONTINUE - 1))" --after "$SLURM_JOB_ID" \
    --answers "$(count_answers)" --stalled "$STALLED"
  if SUCCESSOR=$(submit); then
    say "job $SUCCESSOR waits to continue this one, should Slurm end it"
  else
    say "no job to continue this one could be submitted: $SUCCESSOR"
    SUCCESSOR=""
  fi
}

main() {
  parse_options "$@"
  say "job $SLURM_JOB_ID on $(uname -n): $(run_folder), code ${SNAPSHOT:-of the project folder}"
  if ((!FRESH)) && summary_is_complete "$EXPERIMENT" "$TASK" "$LIMIT" "$CONFIG"; then
    say "$(run_folder) is complete, nothing to do"
    keep_in_artifacts # the job before may have been ended between its last answer and this
    exit 0
  fi
  if [[ -n $AFTER ]]; then continue_after "$AFTER"; fi
  if [[ -n ${SLURM_JOB_GPUS:-} ]] && command -v nvidia-smi >/dev/null 2>&1 && ! has_gpu; then
    write_failure "results/$(run_folder)" node_failure 1 "$(log_of_this_job)" "nvidia-smi sees no GPU on $(uname -n)"
    say "Slurm gave this job a GPU, but nvidia-smi sees none on $(uname -n)"
    exit 1
  fi
  submit_successor
  local status=0
  FAILURE_CLASS=venv
  if venv_activate; then
    export_environment
    evaluate || status=$?
  else
    status=1
    write_failure "results/$(run_folder)" venv 1 "$(log_of_this_job)" "$(tail -n 20 -- "$(log_of_this_job)")"
  fi
  if ((status == 0)); then keep_in_artifacts; fi
  if [[ -n $SUCCESSOR ]] && { ((status == 0)) || ! one_of "$FAILURE_CLASS" terminated "${CONTINUED[@]}"; }; then
    scancel "$SUCCESSOR" || true # it would start only to see that there is nothing to continue
  fi
  exit "$status"
}

main "$@"
