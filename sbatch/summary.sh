# shellcheck shell=bash
# Is a summary.json a complete result of what its folder says? Answered with awk alone: no Python, no venv.

# Questions in the full task; `--limit` counts per subtask in the groups.
declare -A TASK_SIZE=([gsm8k]=1319 [mmlu]=14042 [gpqa_main_n_shot]=448 [minerva_math]=5000 [ifeval]=541
  [toy_math]=1200 [toy_choice]=1200)
GROUP_TASKS=(mmlu minerva_math toy_choice)
declare -A JSON=()

load_json() { # files; JSON["file:key"] for each scalar, JSON["file:!"] why it is not valid
  local file key type value
  for key in "${!JSON[@]}"; do # what was read of them before is no longer true
    for file; do if [[ $key == "$file:"* ]]; then unset 'JSON[$key]'; fi; done
  done
  while IFS=$'\t' read -r file key type value; do
    JSON["$file:$key"]=$value
    if [[ $key != *.* && $type == string ]]; then JSON["$file:$key:type"]=string; fi
  done < <(LC_ALL=C awk -f "$CODE_ROOT/sbatch/json.awk" "$@")
}

# The number under a top-level key; of a string, with its quotes
summary_number() { # file, key
  if [[ -n ${JSON["$1:$2:type"]-} ]]; then printf '"%s"' "${JSON["$1:$2"]}"; else printf '%s' "${JSON["$1:$2"]-}"; fi
}

# $1 file (already loaded), $2 experiment, $3 task, $4 limit or "", $5 configuration. Sets REASON when it is not complete.
check_summary() {
  local file=$1 samples expected limit accuracy
  REASON=""
  summary_field() { printf '%s' "${JSON["$file:$1"]-}"; }
  samples=$(summary_number "$file" num_samples) expected=$(summary_number "$file" num_samples_expected)
  limit=$(summary_number "$file" limit) accuracy=$(summary_number "$file" accuracy)
  if [[ -n ${JSON["$file:!"]-} ]]; then
    REASON="not valid JSON, ${JSON["$file:!"]}"
  elif [[ $(summary_field schema_version) != 1 ]]; then
    REASON="schema version '$(summary_field schema_version)', not 1"
  elif [[ $(summary_field experiment) != "$2" ]]; then
    REASON="it is of experiment '$(summary_field experiment)'"
  elif [[ $(summary_field task) != "$3" ]]; then
    REASON="it is of task '$(summary_field task)'"
  elif [[ $limit != "${4:-null}" ]]; then
    REASON="it has limit '$limit'"
  elif [[ $(summary_field config) != "$5" ]]; then
    REASON="it is of configuration '$(summary_field config)'"
  elif [[ ! $samples =~ ^[1-9][0-9]*$ || $samples != "$expected" ]]; then
    REASON="$samples of $expected samples"
  elif ! expected_size "$3" "$4" "$expected"; then
    REASON="$expected samples, the task has $SIZE"
  elif [[ ! $accuracy =~ ^(0|1|0\.[0-9]+|1\.0+|[1-9](\.[0-9]+)?[eE]-[0-9]+)$ ]]; then
    REASON="the accuracy is '$accuracy'"
  fi
  [[ -z $REASON ]]
}

expected_size() { # task, limit, samples. Sets SIZE. A group's limited size depends on its subtasks: not checked.
  SIZE=${TASK_SIZE[$1]-}
  if [[ -n $2 ]] && one_of "$1" "${GROUP_TASKS[@]}"; then SIZE=""; fi
  if [[ -n $2 && -n $SIZE ]] && ((SIZE > $2)); then SIZE=$2; fi
  [[ -z $SIZE || $SIZE == "$3" ]]
}

summary_is_complete() { # experiment, task, limit or "", configuration; under results/, and not to be run again (submit.sh)
  local file
  file=results/$1/$(task_folder "$2" "$3")/$4/summary.json
  [[ ! -e ${file%/*}/run_again ]] || return 1
  load_json "$file"
  [[ -n ${JSON["$file:schema_version"]-} ]] && check_summary "$file" "$@"
}

print_summary() { # file, after a run
  load_json "$1"
  local field
  for field in task limit config experiment metric accuracy accuracy_stderr num_samples \
    throughput.tokens_per_second throughput.tokens_per_forward throughput.seconds_generating \
    throughput.requests_per_second throughput.seconds_scoring; do
    [[ -z ${JSON["$1:$field"]-} ]] || printf '  %-20s %s\n' "${field#throughput.}" "${JSON["$1:$field"]}"
  done
  printf '  %-20s %s\n' "full summary" "$1"
}
