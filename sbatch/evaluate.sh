# shellcheck shell=bash
# One evaluation with its records: what _job.sh, baseline.sh and local.sh share. Sourced after common.sh.
# shellcheck source=sbatch/failure.sh
source "$CODE_ROOT/sbatch/failure.sh"

TOLD_TO_STOP=no

count_answers() { # batches of answers that are on disk for the run
  { find "results/$(run_folder)/answers" -name '*.jsonl' -exec cat -- {} + 2>/dev/null || true; } | wc -l
}

log_of_this_job() { # the file that Slurm writes this script's output to; relative to the project if it is inside
  local file
  file=$(readlink "/proc/$$/fd/2" 2>/dev/null) || true
  if [[ -f $file ]]; then printf '%s' "${file#"$PROJECT_ROOT"/}"; fi
}

# In a batch job: in the background, because bash runs a trap only between commands, and the signal before the end of a
# job must be noticed at once. By hand: in the foreground, where Ctrl-C reaches it.
run_eval() { # log file
  local child="" status
  if [[ ${BATCH:-no} != yes ]]; then
    # both streams go into the log and stay what they are; pipefail makes the status eval.py's
    { { "${EVAL_COMMAND[@]}" 2>&3 | tee -a -- "$1"; } 3>&1 >&4 | tee -a -- "$1" >&2; } 4>&1
    return
  fi
  trap 'TOLD_TO_STOP=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  "${EVAL_COMMAND[@]}" &
  child=$!
  if [[ $TOLD_TO_STOP == yes ]]; then kill -TERM "$child" 2>/dev/null || true; fi # before its number was known
  while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # otherwise only the wait was interrupted
  done
  return "$status"
}

# Reads the run's variables, and FRESH (1: answer everything again, the old summary is set aside; run.sh --force says the
# same with the file run_again). Leaves summary.json, or failure.json and FAILURE_CLASS. Given several configurations, one
# process answers them one after the other and stops at the first that fails; RUNS_DONE, RUNS_FAILED and RUNS_LEFT (not
# begun) tell which are which.
evaluate() { # [configuration...], else CONFIG
  local output log start=0 status=0 held=() claims="" stopped=0
  FAILURE_CLASS="" RUNS_DONE=() RUNS_FAILED=() RUNS_LEFT=()
  (($#)) || set -- "$CONFIG"
  log=$(log_of_this_job)
  if [[ ${BATCH:-no} != yes ]]; then
    log=logs/$EXPERIMENT/$(task_folder "$TASK" "$LIMIT")/$(if (($# == 1)); then printf '%s/' "$1"; fi)local_$$.log
    mkdir -p -- "$(dirname -- "$log")" || return
  fi
  for CONFIG; do
    if run_begin "$log"; then
      held+=("$CONFIG") claims+=${claims:+:}${LOCK["results/$(run_folder)/.lock"]}
    else
      status=$? RUNS_FAILED+=("$CONFIG")
    fi
  done
  ((${#held[@]})) || return "$status"
  [[ ! -f $log ]] || start=$(wc -c <"$log")
  eval_command "${held[@]}"
  FAST_DLLM_CLAIMS=$claims run_eval "$log" || status=$?
  for CONFIG in "${held[@]}"; do
    output=results/$(run_folder)
    # one process's exit status tells of one configuration only when it had one
    if ((status == 0 || ${#held[@]} > 1)) && lock_is_ours "$output/.lock" && has_new_summary "$output"; then
      RUNS_DONE+=("$CONFIG")
      rm -f -- "$output/failure.json" "$output"/progress.rank*.json
    elif ((stopped)); then
      RUNS_LEFT+=("$CONFIG")
    else
      stopped=1 RUNS_FAILED+=("$CONFIG")
      run_failed "$output" "$log" "$start" "$status" || status=$?
    fi
    lock_release "$output/.lock"
  done
  return "$status"
}

run_begin() { # log. Takes CONFIG's folder for this process and clears what an earlier try left
  local output
  output=results/$(run_folder)
  mkdir -p -- "$output" || return
  if ! lock_acquire "$output/.lock" short; then
    say "$(run_folder) is being evaluated by $(lock_owner "$output/.lock"); nothing is done here"
    return 75
  fi
  rm -f -- "$output/failure.json" "$output"/progress.rank*.json
  if ((FRESH)) || [[ -e $output/run_again ]]; then
    rm -rf -- "$output/answers"
    if [[ -f $output/summary.json ]]; then mv -f -- "$output/summary.json" "$output/summary.previous.json"; fi
    rm -f -- "$output/run_again" # last: ended before this, the next evaluation begins again
  fi
  record_job "$output" "${SLURM_JOB_ID:-}" "$1"
}

run_failed() { # folder, log, its size when this process began, exit status. Returns the status that tells the fault
  local status=$4 text=""
  if ! lock_is_ours "$1/.lock"; then
    say "$(run_folder) was taken over by $(lock_owner "$1/.lock") while this process could not be seen to live; it is left to that one"
    return 75
  fi
  if ((status == 0)); then
    say "eval.py ended without an error, but left no complete summary: ${REASON:-no file}"
    status=70
  fi
  if [[ -f $2 ]]; then text=$(tail -c "+$(($3 + 1))" -- "$2" | tail -c 20000 | tr -d '\0'); fi
  # accelerate's launcher turns every exit status into 1; eval.py's own line tells that the input was wrong
  if grep -q '^eval\.py: error: ' <<<"$text"; then status=2; fi
  FAILURE_CLASS=$(classify_failure "$status" "$text" "$TOLD_TO_STOP")
  write_failure "$1" "$FAILURE_CLASS" "$status" "$2" "$text"
  say "$(run_folder): ${FAILURE_TEXT[$FAILURE_CLASS]} (exit status $status)"
  return "$status"
}

has_new_summary() { # folder. Complete, and of this run: job.json was written when it began
  load_json "$1/summary.json"
  check_summary "$1/summary.json" "$EXPERIMENT" "$TASK" "$LIMIT" "$CONFIG" || return 1
  if [[ ! $1/summary.json -nt $1/job.json ]]; then REASON="it is of an earlier run" && return 1; fi
}

keep_in_artifacts() { # the summary is small and tracked; results/ may lie on a disk that is purged
  local folder
  folder=$(run_folder)
  mkdir -p -- "artifacts/$folder" && write_whole "artifacts/$folder/summary.json" <"results/$folder/summary.json"
}
