#!/usr/bin/env bash
# Fetch model, tokenizer and data sets once, on a node with a network (the login node), so that jobs need none.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_options() {
  REQUEST=(--code_tasks)
  while (($#)); do
    case $1 in
      --task | --model) need_value "$1" $#; REQUEST+=("$1=$2"); shift ;;
      -h | --help) runner help; exit ;;
      *) die "unknown option $(shown "$1"); valid: --task --model --help" ;;
    esac
    shift
  done
  ask_runner request "${REQUEST[@]}"
}

check_space() { # the 7B's weights take 15 GB
  local place=${HF_HOME:-$HOME/.cache/huggingface} free
  mkdir -p -- "$place" 2>/dev/null || true
  [[ -w $place ]] || die "the hub's cache $place cannot be written to; set HF_HOME"
  free=$(df -Pk -- "$place" | awk 'NR == 2 { print int($4 / 1048576) }')
  say "cache: $place, $free GiB free on its disk"
  if command -v pace-quota >/dev/null 2>&1; then pace-quota >&2 || true; fi
  if [[ $MODEL == */* && ! -d $MODEL ]] && ((free < 20)); then
    die "20 GiB are needed for $MODEL and data sets; set HF_HOME to a larger disk, such as ~/scratch/hf"
  fi
}

fetch() { # what, command...; says why it failed
  local what=$1 log status=0
  shift
  log=$(mktemp)
  say "== $what"
  "$@" 2>&1 | tee "$log" >&2 || status=$?
  if ((status != 0)); then
    say "$what: $(runner classify "--status=$status" "--log=$log")"
    FAILED+=("$what")
  fi
  rm -f -- "$log"
}

main() {
  cd -- "$PROJECT_ROOT"
  parse_options "$@"
  load_cluster_settings # the cache may be named there
  check_space
  venv_activate || exit 1
  export_environment
  FAILED=()
  local task
  if [[ $MODEL == */* && ! -d $MODEL ]]; then
    fetch "model $MODEL" python -c 'import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))' "$MODEL"
  fi
  if one_of ifeval "${RUN_TASKS[@]}"; then fetch "sentence data" python "$CODE_ROOT/sbatch/nltk_data.py" "$VENV"; fi
  for task in "${RUN_TASKS[@]}"; do
    fetch "task $task" python -c '
import sys
from lm_eval.tasks import TaskManager
found = TaskManager(include_path=sys.argv[2]).load([sys.argv[1]])
print("data of", len(found["tasks"]), "task(s) is here")' "$task" "$CODE_ROOT/tasks"
  done
  if ((${#FAILED[@]})); then
    printf 'prefetch.sh: not fetched: %s\n' "${FAILED[@]}" >&2
    exit 1
  fi
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
