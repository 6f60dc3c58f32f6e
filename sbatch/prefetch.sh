#!/usr/bin/env bash
# Fetch model, tokenizer and data sets once, on a node with a network (the login node), so that jobs need none.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

parse_options() {
  REQUEST=(--code_tasks --several)
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

main() {
  cd -- "$PROJECT_ROOT"
  parse_options "$@"
  load_cluster_settings # the cache may be named there
  runner space "${REQUEST[@]}"
  venv_activate || exit 1
  export_environment
  runner fetch "${REQUEST[@]}" "--text=$VENV"
}

main "$@"; exit # read to here before it starts: a pull may change this file meanwhile
