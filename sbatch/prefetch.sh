#!/usr/bin/env bash
# Fetch model, tokenizer and data sets once, on a node with a network (the login node), so that jobs need none.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_options() {
  REQUEST=(--code_tasks --several) KEEP=0 LOOK=()
  while (($#)); do
    case $1 in
      --task | --model) need_value "$1" $#; REQUEST+=("$1=$2") LOOK+=("$1" "$2"); shift ;;
      --keep) KEEP=1 ;;
      -h | --help) runner help; exit ;;
      *) die "unknown option $(shown "$1"); valid: --task --model --keep --help" ;;
    esac
    shift
  done
  ask_runner request "${REQUEST[@]}"
}

main() {
  cd -- "$PROJECT_ROOT"
  parse_options "$@"
  if ((KEEP)); then
    find_python
    exec "$RUNNER_PYTHON" -m fast_dllm.doctor --keep ${LOOK[@]+"${LOOK[@]}"}
  fi
  load_cluster_settings # the cache may be named there
  runner space "${REQUEST[@]}"
  venv_activate || exit 1
  export_environment
  runner fetch "${REQUEST[@]}" "--text=$VENV"
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
