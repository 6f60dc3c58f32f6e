# shellcheck shell=bash
# Why a run ended: a class from what Slurm, Python and the kernel left behind, and its record, failure.json.

declare -A FAILURE_TEXT=(
  [time_limit]="time limit reached" [preemption]="preempted" [node_failure]="node failure" [cancelled]="cancelled"
  [terminated]="told to stop" [killed]="killed by signal 9" [host_oom]="out of host memory" [gpu_oom]="out of GPU memory"
  [disk_quota]="disk full or over quota" [dataset_access]="no access to the data set or model (gated: ask for it on its page of the hub, then: hf auth login)"
  [hub_network]="hub not reachable, or not in the local cache" [wrong_input]="wrong input" [venv]="no venv"
  [code_error]="code error" [no_progress]="no progress in two jobs" [no_result]="ended without a result"
)
# Followed by another job without anyone typing. A code error would only happen again.
# shellcheck disable=SC2034 # read by _job.sh
CONTINUED=(time_limit preemption node_failure)

# First match wins; looked for in the last lines of the run's log. The data set's patterns stand before the network's,
# because a refused download also says HTTP; memory stands first, because it breaks other things.
FAILURE_PATTERNS=(
  'gpu_oom:CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|torch\.(cuda\.)?OutOfMemoryError'
  'host_oom:oom.kill|Out Of Memory|^MemoryError|Cannot allocate memory|DefaultCPUAllocator: .*allocate memory'
  'disk_quota:No space left on device|Disk quota exceeded'
  'dataset_access:GatedRepoError|gated (dataset|repo)|(401|403) Client Error|Access to (dataset|model) .* is restricted'
  'hub_network:Max retries exceeded|Name or service not known|name resolution|Connection(Error| refused| reset)|ConnectTimeout|OfflineMode|LocalEntryNotFoundError|LocalEntryNotFound|Couldn.t reach|couldn.t connect to|Network is unreachable|could not be fetched'
)

class_of_state() { # "state|exit code:signal", as sacct writes it
  case $1 in
    FAILED*:9) echo killed ;;
    TIMEOUT* | DEADLINE*) echo time_limit ;;
    PREEMPTED*) echo preemption ;;
    NODE_FAIL* | BOOT_FAIL*) echo node_failure ;;
    OUT_OF_MEMORY*) echo host_oom ;;
    CANCELLED*) echo cancelled ;;
    FAILED*) echo code_error ;;
    COMPLETED*) echo no_result ;;
    *) echo "" ;;
  esac
}

# The kernel killed something in this job's memory cgroup (version 2, then 1).
cgroup_oom() {
  local group
  group=$(sed -n 's/^0:://p' /proc/self/cgroup 2>/dev/null)
  if [[ -n ${SLURM_JOB_ID:-} && -n $group && -r /sys/fs/cgroup$group/memory.events ]]; then
    grep -Eq '^oom_kill [1-9]' "/sys/fs/cgroup$group/memory.events"
  else
    group=$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup 2>/dev/null)
    [[ -n ${SLURM_JOB_ID:-} && -n $group ]] &&
      grep -Eq '^oom_kill [1-9]' "/sys/fs/cgroup/memory$group/memory.oom_control" 2>/dev/null
  fi
}

# $1 exit status, $2 the run's part of the log, $3 yes when the shell was told to stop (SIGTERM)
classify_failure() {
  local ended pattern
  # slurmstepd says why before it sends the signal, often in the middle of a progress bar's line:
  # "slurmstepd-n1: error: *** JOB 12 ON n1 CANCELLED AT ... DUE TO TIME LIMIT ***"
  ended=$(grep -Eo "slurmstepd[^ ]*: error: \*\*\* (JOB|STEP) ${SLURM_JOB_ID:-none}[ .].*" <<<"$2" | tail -n 1)
  case $ended in
    *"DUE TO TIME LIMIT"*) echo time_limit && return ;;
    *"DUE TO PREEMPTION"*) echo preemption && return ;;
    *"DUE TO NODE FAIL"*) echo node_failure && return ;;
    *CANCELLED*) echo cancelled && return ;;
  esac
  if [[ $3 == yes ]]; then echo terminated && return; fi
  if [[ $1 == 2 ]]; then echo wrong_input && return; fi
  for pattern in "${FAILURE_PATTERNS[@]}"; do
    if grep -Eq -- "${pattern#*:}" <<<"$2"; then echo "${pattern%%:*}" && return; fi
  done
  # accelerate's launcher turns the death of eval.py into a silent status 1
  if [[ $1 == 137 ]] || ! grep -Eq 'Traceback|[Ee]rror' <<<"$2"; then
    if cgroup_oom; then echo host_oom; else echo killed; fi
  else
    echo code_error
  fi
}

json_string() { # any text, as a JSON string
  printf '%s' "$1" | iconv -c -f utf-8 -t utf-8 | LC_ALL=C tr '\t' ' ' | LC_ALL=C tr -d '\000-\011\013-\037\177' |
    LC_ALL=C sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' | awk 'BEGIN { printf "\"" } NR > 1 { printf "\\n" } { printf "%s", $0 } END { printf "\"" }'
}

write_whole() { # file; the content from stdin. Whole or not at all, and on the disk
  local new
  new=$1.$(uname -n).$$.new
  cat >"$new" && sync -- "$new" && mv -f -- "$new" "$1"
}

record_job() { # folder, job id or "", log. What status asks sacct about when the job had no chance to write failure.json
  printf '{\n  "schema_version": 1,\n  "job_id": %s,\n  "log": %s\n}\n' "$(json_string "$2")" "$(json_string "$3")" |
    write_whole "$1/job.json"
}

# $1 folder of the run, $2 class, $3 exit status, $4 log path or "", $5 last part of the log
write_failure() {
  mkdir -p -- "$1"
  {
    printf '{\n  "schema_version": 1,\n  "class": "%s",\n  "message": %s,\n' "$2" "$(json_string "${FAILURE_TEXT[$2]}")"
    printf '  "exit_code": %d,\n  "job_id": %s,\n' "$3" "$(json_string "${SLURM_JOB_ID:-}")"
    printf '  "host": %s,\n  "time": "%s",\n' "$(json_string "$(uname -n)")" "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    printf '  "log": %s,\n' "$(json_string "$4")"
    printf '  "last_lines": %s\n}\n' "$(json_string "$(tr '\r' '\n' <<<"$5" | grep -v '^ *$' | tail -n 15)")"
  } | write_whole "$1/failure.json"
}
