# shellcheck shell=bash
# What is done again, and by whom, when Slurm ends a job: _job.sh and baseline.sh share this. Each job submits at its start
# the one that continues it, waiting for it to fail, because at the end there may be no time left to submit anything.
# Sourced after common.sh. A job's work are RUN_TASKS; its script's successor_command sets SBATCH_COMMAND for
# the same work, from a --dependency for sbatch and further options of the script:
#   --continue N      how many more jobs may follow
#   --after ID[,ID]   the jobs that this one continues, the latest last
#   --progress M      what was done when that one started (work_done), --stalled N: jobs in a row before it that did nothing
# shellcheck source=sbatch/evaluate.sh
source "$CODE_ROOT/sbatch/evaluate.sh"
# shellcheck source=sbatch/submit.sh
source "$CODE_ROOT/sbatch/submit.sh"

RUN_TASKS=() CONTINUE=0 AFTER="" PROGRESS=0+0 STALLED=0 SUCCESSOR=""

continue_option() { # option, value
  case $1 in
    --continue) [[ $2 == 0 ]] || check_count "$1" "$2"; CONTINUE=$2 ;;
    --after) AFTER=$2 ;;
    --progress) PROGRESS=$2 ;;
    --stalled) STALLED=$2 ;;
  esac
}

task_is_complete() { summary_is_complete "$EXPERIMENT" "$TASK" "$LIMIT" "$CONFIG"; }

# The tasks that are complete + the batches of the others that are on disk: two equal ones, and nothing was done between.
work_done() {
  local TASK complete=0 batches=0
  for TASK in "${RUN_TASKS[@]}"; do
    if task_is_complete; then
      complete=$((complete + 1))
    elif [[ ! -e results/$(run_folder)/run_again ]]; then
      batches=$((batches + $(count_answers)))
    fi
  done
  printf '%d+%d\n' "$complete" "$batches"
}

# TASK came to an end of its own in one of the jobs before this one, with an error that would only happen again. Sets ERROR.
task_has_failed() {
  local file job
  file=results/$(run_folder)/failure.json
  load_json "$file"
  job=${JSON["$file:job_id"]-} ERROR=${JSON["$file:class"]-}
  # shellcheck disable=SC2153 # not CONTINUE
  [[ -n $job && ,$AFTER, == *",$job,"* ]] && ! one_of "$ERROR" terminated "${CONTINUED[@]}"
}

tasks_left() { # sets LEFT
  local TASK
  LEFT=()
  for TASK in "${RUN_TASKS[@]}"; do
    if ! task_is_complete && ! task_has_failed; then LEFT+=("$TASK"); fi
  done
}

fail_left() { # class, last lines: the job ends before it evaluates anything
  local TASK
  tasks_left
  for TASK in ${LEFT[@]+"${LEFT[@]}"}; do write_failure "results/$(run_folder)" "$1" 1 "$(log_of_this_job)" "$2"; done
}

# Prints how job $1 ended. The record of the last task that it came to is first; a job that was killed could not write one,
# Slurm knows.
end_of_job() {
  local TASK folder class="" tries
  for TASK in "${RUN_TASKS[@]}"; do
    folder=results/$(run_folder)
    load_json "$folder/job.json" "$folder/failure.json"
    if [[ ${JSON["$folder/failure.json:job_id"]-} == "$1" ]]; then
      class=${JSON["$folder/failure.json:class"]-}
    elif [[ ${JSON["$folder/job.json:job_id"]-} == "$1" ]]; then
      class=""
    fi
  done
  for tries in 1 2 3 4 5 6; do
    if [[ -n $class && $class != terminated && $class != killed ]] || ! command -v sacct >/dev/null 2>&1; then break; fi
    ((tries == 1)) || sleep 5 # the accounting may lag behind
    class=$(class_of_state "$(sacct -X -n -P -j "$1" -o State,ExitCode 2>/dev/null | head -n 1)")
  done
  printf '%s\n' "${class:-killed}"
}

# Ends the script when the job that this one would continue is not one to continue.
continue_after() {
  local before=${AFTER##*,} class now
  class=$(end_of_job "$before")
  if ! one_of "$class" "${CONTINUED[@]}"; then
    say "job $before is not continued: ${FAILURE_TEXT[$class]}"
    exit 0
  fi
  now=$(work_done)
  if [[ $now == "$PROGRESS" ]]; then STALLED=$((STALLED + 1)); else STALLED=0; fi
  say "continues job $before (${FAILURE_TEXT[$class]}); complete tasks + batches: $PROGRESS when that started, now $now"
  if ((STALLED >= 2)); then
    fail_left no_progress "jobs before this one answered nothing, twice"
    say "not continued any more: ${FAILURE_TEXT[no_progress]}"
    exit 1
  fi
}

submit_successor() {
  ((CONTINUE > 0)) || return 0
  successor_command "afternotok:$SLURM_JOB_ID" --continue "$((CONTINUE - 1))" --after "${AFTER:+$AFTER,}$SLURM_JOB_ID" \
    --progress "$(work_done)" --stalled "$STALLED"
  if SUCCESSOR=$(submit); then
    say "job $SUCCESSOR waits to continue this one, should Slurm end it"
  else
    say "no job to continue this one could be submitted: $SUCCESSOR"
    SUCCESSOR=""
  fi
}

begin_job() { # ends the script when there is nothing to continue, or nothing to compute on
  if [[ -n $AFTER ]]; then continue_after; fi
  submit_successor
  if [[ -n ${SLURM_JOB_GPUS:-} ]] && command -v nvidia-smi >/dev/null 2>&1 && ! has_gpu; then
    FAILURE_CLASS=node_failure
    fail_left node_failure "nvidia-smi sees no GPU on $(uname -n)"
    say "Slurm gave this job a GPU, but nvidia-smi sees none on $(uname -n)"
    end_job 1
  fi
}

activate_or_fail() {
  if venv_activate; then export_environment && return 0; fi
  FAILURE_CLASS=venv
  fail_left venv "$(tail -n 20 -- "$(log_of_this_job)")"
  end_job 1
}

end_job() { # exit status
  if [[ -n $SUCCESSOR ]] && { (($1 == 0)) || ! one_of "$FAILURE_CLASS" terminated "${CONTINUED[@]}"; }; then
    scancel "$SUCCESSOR" || true # it would start only to see that there is nothing to continue
  fi
  exit "$1"
}
