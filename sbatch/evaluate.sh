# shellcheck shell=bash
# One evaluation with its records: what _job.sh, baseline.sh and local.sh share. Sourced after common.sh.

TOLD_TO_STOP=no GOES_ON=no GPUS=1

log_of_this_job() { # the file that Slurm writes this script's output to; relative to the project if it is inside
  local file
  file=$(readlink "/proc/$$/fd/2" 2>/dev/null) || true
  if [[ -f $file ]]; then printf '%s' "${file#"$PROJECT_ROOT"/}"; fi
}

# In a batch job: in the background, because bash runs a trap only between commands, and the signal before the end of a
# job must be noticed at once. By hand: in the foreground, where Ctrl-C reaches it, with one line a configuration shown.
run_eval() { # log file
  local child="" status
  # every value that a user's `accelerate config` could change is given
  local command=(accelerate launch --quiet --num_processes "$GPUS" --num_machines 1 --mixed_precision no --dynamo_backend no)
  if ! has_gpu; then command+=(--cpu); elif ((GPUS > 1)); then command+=(--multi_gpu --main_process_port 0); fi # a free one
  if ((GPUS > 1)) && ! has_gpu; then command=(torchrun --standalone --nproc_per_node "$GPUS"); fi # --cpu starts one alone
  command+=("$CODE_ROOT/eval.py" "${EVAL_WORDS[@]}")
  if [[ ${BATCH:-no} != yes ]]; then
    runner watch "${REQUEST[@]}" "--task=$TASK" "${RUNS[@]/#/--config=}" "--log=$1" -- "${command[@]}"
    return
  fi
  trap 'TOLD_TO_STOP=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  "${command[@]}" &
  child=$!
  if [[ $TOLD_TO_STOP == yes ]]; then kill -TERM "$child" 2>/dev/null || true; fi # before its number was known
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # otherwise only the wait was interrupted
  done
  return "$status"
}

# Evaluates configurations of TASK, in one process that answers one after the other and stops at the first that fails.
# Leaves summary.json, or failure.json and FAILURE_CLASS; RUNS_DONE, RUNS_FAILED and RUNS_LEFT (not begun) tell which are
# which. What is complete is decided under the lock (`runner begin`): a run that another process finished a moment before
# is not made again. HOW are further options of that question: --mode, --force, --keep, --batch_size.
evaluate() { # configuration...
  local log start=0 status=0 code=0 config base held=() claims="" lost=() words=("${REQUEST[@]}" "--task=$TASK")
  # shellcheck disable=SC2034 # set by `runner end`, read by the scripts
  GOES_ON=no FAILURE_CLASS="" RUNS_DONE=() RUNS_FAILED=() RUNS_LEFT=()
  log=$(log_of_this_job)
  if [[ ${BATCH:-no} != yes ]]; then
    log=logs/${FOLDER[$TASK/$1]}
    if (($# > 1)); then log=${log%/*}; fi
    mkdir -p -- "$log" || return
    log+=/local_$$.log
  fi
  for config; do
    base=results/${FOLDER[$TASK/$config]}/${PART}.lock
    if lock_acquire "$base" short; then
      held+=("--config=$config")
    else
      say "${FOLDER[$TASK/$config]} is being evaluated by $(lock_owner "$base"); nothing is done here"
      status=75 RUNS_FAILED+=("$config")
    fi
  done
  ((${#held[@]})) || return "$status"
  ask_runner begin "${words[@]}" "${held[@]}" "--log=$log" ${HOW[@]+"${HOW[@]}"}
  ((${#REFUSED[@]} == 0)) || { status=1 && RUNS_FAILED+=("${REFUSED[@]}"); }
  held=(${RUNS[@]+"${RUNS[@]/#/--config=}"})
  for config; do
    base=results/${FOLDER[$TASK/$config]}/${PART}.lock
    [[ -z ${LOCK[$base]-} || " ${RUNS[*]-} " == *" $config "* ]] || lock_release "$base"
  done
  ((${#held[@]})) || return "$status"
  for config in "${RUNS[@]}"; do claims+=${claims:+:}${LOCK["results/${FOLDER[$TASK/$config]}/${PART}.lock"]}; done
  [[ ! -f $log ]] || start=$(wc -c <"$log")
  FAST_DLLM_CLAIMS=$claims run_eval "$log" || code=$?
  for config in "${RUNS[@]}"; do
    lock_is_ours "results/${FOLDER[$TASK/$config]}/${PART}.lock" || lost+=("--lost=$config")
  done
  if [[ $TOLD_TO_STOP == yes ]]; then words+=(--told_to_stop); fi
  ask_runner end "${words[@]}" "${held[@]}" "--log=$log" "--start=$start" "--status=$code" ${lost[@]+"${lost[@]}"} ${HOW[@]+"${HOW[@]}"}
  RUNS_FAILED+=(${NOT_DONE[@]+"${NOT_DONE[@]}"})
  for config in "${RUNS[@]}"; do lock_release "results/${FOLDER[$TASK/$config]}/${PART}.lock"; done
  ((END_STATUS == 0)) || status=$END_STATUS
  return "$status"
}
