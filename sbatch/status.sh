# shellcheck shell=bash
# What each configuration's state is, from files and one look at the queue. No Python, no venv.
# shellcheck source=sbatch/failure.sh
source "$CODE_ROOT/sbatch/failure.sh"

# By configuration: STATE (complete stale running queued corrupt failed pending), DETAIL for people, JOB id or "".
declare -A STATE DETAIL JOB QUEUED ENDED
QUEUE_FAULT=""

# shellcheck disable=SC2034,SC2153 # set and read across these files
# Sets QUEUED[configuration]="id|state|reason" from one squeue call; a running job hides the one that waits to continue
# it. Fails when the queue cannot be known. Jobs of other folders with the same names are not ours.
read_queue() {
  local names="" config id state reason name folder lines
  QUEUED=()
  command -v squeue >/dev/null 2>&1 || return 0
  for config in "${CONFIGS[@]}"; do names+=${names:+,}$(CONFIG=$config run_folder); done
  lines=$(timeout 30 squeue --noheader "--name=$names" '--format=%i|%T|%r|%j|%Z' 2>&1) || { QUEUE_FAULT=${lines//$'\n'/ }; return 1; }
  while IFS='|' read -r id state reason name folder; do
    [[ -n $id && $folder == "$PROJECT_ROOT" ]] || continue
    config=${name##*/}
    if [[ -z ${QUEUED[$config]-} || $state != PENDING ]]; then QUEUED[$config]="$id|$state|$reason"; fi
  done <<<"$lines"
}

# Sets ENDED[job]="state|exit code" for jobs that are gone and left no record, from one sacct call.
read_ended() {
  local ids="" config folder recorded id state
  ENDED=()
  for config in "${SELECTED[@]}"; do
    folder=results/$(CONFIG=$config run_folder)
    recorded=${JSON["$folder/job.json:job_id"]-}
    if [[ -n $recorded && -z ${QUEUED[$config]-} && ${JSON["$folder/failure.json:job_id"]-} != "$recorded" ]] &&
      [[ -z ${JSON["$folder/summary.json:accuracy"]-} || -e $folder/run_again ]]; then ids+=${ids:+,}$recorded; fi
  done
  [[ -n $ids ]] && command -v sacct >/dev/null 2>&1 || return 0
  while IFS='|' read -r id state; do
    if [[ -n $id ]]; then ENDED[$id]=$state; fi
  done < <(timeout 30 sacct -X -n -P -j "$ids" -o JobIDRaw,State,ExitCode 2>/dev/null)
}

read_files() {
  local files=() folder config
  for config in "${SELECTED[@]}"; do
    folder=$(CONFIG=$config run_folder)
    files+=("artifacts/$folder/summary.json" "results/$folder/"{summary,failure,job,progress.rank0}.json)
  done
  load_json "${files[@]}"
  CODE_HASH=$(sha256sum <"experiments/$EXPERIMENT/generation_functions.py")
  CODE_HASH=${CODE_HASH%% *}
}

progress() { # folder. ", 412/1319, 48.9 tok/s, ~25 min left", or nothing
  local file=$1/progress.rank0.json
  awk -v done="${JSON["$file:answered"]-}" -v all="${JSON["$file:total"]-}" -v tokens="${JSON["$file:new_tokens"]-}" \
    -v seconds="${JSON["$file:seconds_generating"]-}" -v own="${JSON["$file:segment_answered"]-}" \
    -v lasted="${JSON["$file:segment_seconds"]-}" 'BEGIN {
      if (all == "") exit
      printf ", %d/%d", done, all
      if (tokens > 0 && seconds > 0) printf ", %.1f tok/s", tokens / seconds
      if (own > 0 && all > done) printf ", ~%d min left", int((all - done) * lasted / own / 60) + 1
    }'
}

failure_detail() { # class or text, job id, log
  printf '%s%s%s' "${FAILURE_TEXT[$1]-$1}" "${2:+, job $2}" "${3:+, log: $3}"
}

# The state of CONFIG, whose files, queue entry and ended jobs have been read.
examine() {
  local folder summary artifact failure job queue_state reason class
  folder=results/$(run_folder)
  summary=$folder/summary.json artifact=artifacts/$(run_folder)/summary.json failure=$folder/failure.json
  STATE[$CONFIG]=pending DETAIL[$CONFIG]=pending JOB[$CONFIG]=""
  if [[ -e $folder/run_again ]]; then
    DETAIL[$CONFIG]="pending: to be run again (--force)"
  elif [[ -n ${JSON["$summary:schema_version"]-}${JSON["$summary:!"]-} || -e $summary ]]; then
    judge "$summary" "" # also a file without a single scalar
  elif [[ -e $artifact ]]; then
    judge "$artifact" "only in artifacts/"
  fi
  IFS='|' read -r job queue_state reason <<<"${QUEUED[$CONFIG]-}" || true
  # a job that waits to continue one that needs no continuation is about to be removed
  if [[ ${STATE[$CONFIG]} == complete && $queue_state == PENDING && $reason == Dependency* ]]; then job=""; fi
  if [[ -n $job ]]; then
    JOB[$CONFIG]=$job
    if [[ $queue_state == PENDING ]]; then
      STATE[$CONFIG]=queued DETAIL[$CONFIG]="queued, job $job, $reason"
    else
      STATE[$CONFIG]=running DETAIL[$CONFIG]="running, job $job$(progress "$folder")"
    fi
  elif lock_is_held "$folder/.lock"; then
    STATE[$CONFIG]=running DETAIL[$CONFIG]="running, no job: process $(lock_owner "$folder/.lock" | tail -n 1)$(progress "$folder")"
  elif [[ ${STATE[$CONFIG]} == pending ]]; then
    job=${JSON["$folder/job.json:job_id"]-}
    class=${JSON["$failure:class"]-}
    if [[ -n $class && ${JSON["$failure:job_id"]-} == "$job" ]]; then
      # signal 9 can be the kernel's answer to too much memory; only Slurm knows
      STATE[$CONFIG]=failed
      DETAIL[$CONFIG]="failed: $(failure_detail "$class" "$job" "${JSON["$failure:log"]-}")"
    elif [[ -n ${JSON["$folder/job.json:schema_version"]-} ]]; then
      class=$(class_of_state "${ENDED[${job:-none}]-}")
      STATE[$CONFIG]=failed
      DETAIL[$CONFIG]="failed: $(failure_detail "${class:-no_result}" "$job" "${JSON["$folder/job.json:log"]-}")"
    fi
    JOB[$CONFIG]=$job
  fi
}

# shellcheck disable=SC2153 # REASON is check_summary's
judge() { # summary file, remark. Sets STATE and DETAIL of CONFIG
  local hash=${JSON["$1:generation_code_sha256"]-} threshold=${JSON["$1:model_args.threshold"]-} model=${JSON["$1:model_args.model_path"]-}
  DETAIL[$CONFIG]=$2
  if ! check_summary "$1" "$EXPERIMENT" "$TASK" "$LIMIT" "$CONFIG"; then
    STATE[$CONFIG]=corrupt DETAIL[$CONFIG]="corrupt: $REASON"
  elif [[ $hash != "$CODE_HASH" ]]; then
    STATE[$CONFIG]=stale DETAIL[$CONFIG]="stale: generation code changed since it ran"
  elif [[ -n $THRESHOLD ]] && ! awk -v a="$threshold" -v b="$THRESHOLD" 'BEGIN { exit a == "" || a + 0 != b + 0 }'; then
    STATE[$CONFIG]=stale DETAIL[$CONFIG]="stale: it ran with threshold $threshold, not $THRESHOLD"
  elif [[ -n $MODEL && $model != "$MODEL" ]]; then
    STATE[$CONFIG]=stale DETAIL[$CONFIG]="stale: it ran with model $model, not $MODEL"
  elif [[ $model == tiny && $1 == results/* && models/tiny/model.safetensors -nt $1 ]]; then
    STATE[$CONFIG]=stale DETAIL[$CONFIG]="stale: models/tiny changed since it ran"
  else
    STATE[$CONFIG]=complete
    # not what these scripts run unless told to, and nobody asked for another here: say so
    if [[ -z $MODEL && $model != "$DEFAULT_MODEL" ]]; then DETAIL[$CONFIG]+=${2:+, }"model $model"; fi
    if [[ -z $THRESHOLD ]] && awk -v a="$threshold" 'BEGIN { exit a + 0 == 0.9 }'; then
      DETAIL[$CONFIG]+=${DETAIL[$CONFIG]:+, }"threshold $threshold"
    fi
  fi
}

examine_all() { # of SELECTED. Fails when the queue cannot be known; the rest is set all the same
  local status=0
  read_files
  read_queue || status=1
  read_ended
  for CONFIG in "${SELECTED[@]}"; do examine; done
  return "$status"
}

print_frame() {
  local config line completed=0
  line=$(printf '=%.0s' {1..77})
  printf '%s\nExperiment Status: %s / %s\n%s\n' "$line" "$EXPERIMENT" "$(task_folder "$TASK" "$LIMIT")" "$line"
  for config in "${SELECTED[@]}"; do
    if [[ ${STATE[$config]} == complete ]]; then
      completed=$((completed + 1))
      printf '  ✓ %s%s\n' "$config" "${DETAIL[$config]:+ (${DETAIL[$config]})}"
    else
      printf '  ✗ %s (%s)\n' "$config" "${DETAIL[$config]}"
    fi
  done
  printf '%s\nCompleted: %d / %d\n%s\n' "$line" "$completed" "${#SELECTED[@]}" "$line"
}

# Accuracy with its standard error, tokens/s and tokens a forward of what is complete, as the matrix
print_table() {
  local k subset file
  printf '%-6s | %-33s | %-33s | %s\n' "" first middle last
  for k in 1 2 3; do
    printf 'k = %d ' "$k"
    for subset in first middle last; do
      CONFIG=k${k}_$subset
      file=results/$(run_folder)/summary.json
      if [[ ${STATE[$CONFIG]-} == complete && -e $file ]]; then
        awk -v a="${JSON["$file:accuracy"]}" -v e="${JSON["$file:accuracy_stderr"]}" -v s="${JSON["$file:throughput.tokens_per_second"]-}" \
          -v f="${JSON["$file:throughput.tokens_per_forward"]-}" \
          'BEGIN { printf " | %5.1f%% ± %3.1f %6.1f tok/s %5.2f/fwd", 100 * a, 100 * e, s, f }'
      else
        printf ' | %-33s' -
      fi
    done
    printf '\n'
  done
}

print_json() {
  local config comma="" completed=0 summary
  for config in "${SELECTED[@]}"; do if [[ ${STATE[$config]} == complete ]]; then completed=$((completed + 1)); fi; done
  printf '{\n  "schema_version": 1,\n  "experiment": "%s",\n  "task": "%s",\n  "limit": %s,\n' "$EXPERIMENT" "$TASK" "${LIMIT:-null}"
  printf '  "completed": %d,\n  "total": %d,\n  "configurations": [' "$completed" "${#SELECTED[@]}"
  for config in "${SELECTED[@]}"; do
    summary=results/$(CONFIG=$config run_folder)/summary.json
    [[ -e $summary ]] || summary=artifacts/${summary#results/}
    printf '%s\n    {"config": "%s", "state": "%s", "detail": %s, "job": %s, "accuracy": %s}' "$comma" "$config" \
      "${STATE[$config]}" "$(json_string "${DETAIL[$config]}")" "$(json_string "${JOB[$config]}")" \
      "$(if [[ ${STATE[$config]} == complete ]]; then printf '%s' "${JSON["$summary:accuracy"]}"; else printf null; fi)"
    comma=,
  done
  printf '\n  ]\n}\n'
}
