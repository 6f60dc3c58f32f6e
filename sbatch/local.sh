#!/usr/bin/env bash
# Evaluate on this machine, without Slurm. See --help.
set -euo pipefail
# shellcheck source=sbatch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=sbatch/evaluate.sh
source "$CODE_ROOT/sbatch/evaluate.sh"

parse_options() {
  local named=0 tasked=0 demo=0 defaults=()
  REQUEST=(--code_tasks) HOW=() MODE=named
  while (($#)); do
    case $1 in
      --config) named=1 ;;&
      --task) tasked=1 ;;&
      --task | --limit | --model | --experiment | --threshold | --model_args | --num_fewshot | --config) need_value "$1" $#; REQUEST+=("$1=$2"); shift ;;
      --batch_size | --batch-size) need_value "$1" $#; HOW+=("--batch_size=$2"); shift ;;
      --confirm_run_unsafe_code | --force) HOW+=("$1") ;;
      --matrix) MODE=matrix ;;
      --demo) demo=1 ;;
      -h | --help) runner help; exit ;;
      *) die "unknown option $(shown "$1"); valid: --task --limit --experiment --config --matrix --demo --force --model --threshold --model_args --batch_size --num_fewshot --confirm_run_unsafe_code --help" ;;
    esac
    shift
  done
  # of an option that is there twice the last one counts
  has_gpu || defaults=(--model=tiny)
  if ((demo)); then
    ((!tasked)) || die "--demo has a task of its own, toy_math; leave out --task, or take --matrix in the place of --demo"
    ((!named)) || die "--demo runs all configurations; leave out --config, or take --task toy_math in the place of --demo"
    # an answer does not depend on the batch that it was given in; together the questions take a third of the time
    MODE=demo defaults=(--model=tiny --limit=200) REQUEST+=(--task=toy_math) HOW=(--batch_size=32 ${HOW[@]+"${HOW[@]}"})
  fi
  if [[ $MODE != named ]]; then
    ((!named)) || die "--matrix runs all configurations; leave out --config"
    REQUEST+=(--matrix)
  fi
  HOW+=("--mode=$MODE")
  ask_runner request ${defaults[@]+"${defaults[@]}"} "${REQUEST[@]}" "${HOW[@]}"
  REQUEST+=("--model=$MODEL")
  # a matrix on all questions is a result, as a job's is, and stands in artifacts/; the rest are trials
  if [[ $MODE == matrix && -z $LIMIT ]]; then HOW+=(--keep); fi
}

main() {
  parse_options "$@"
  # data sets given as folders (openai/gsm8k) and the results are found from the project's folder
  cd -- "$PROJECT_ROOT"
  load_cluster_settings
  venv_activate || exit 1
  export_environment
  local pending=("${CONFIGS[@]}") worst=0 status failed=() again
  # One process for all, and the model that it loads. One that fails does not stop the others: they go on in another.
  while ((${#pending[@]})); do
    status=0
    evaluate "${pending[@]}" || status=$?
    if [[ $MODE == named ]] && ((${#RUNS_DONE[@]})); then runner summary "${REQUEST[@]}" "${RUNS_DONE[@]/#/--config=}"; fi
    failed+=(${RUNS_FAILED[@]+"${RUNS_FAILED[@]}"})
    ((status == 0)) || worst=$status
    pending=(${RUNS_LEFT[@]+"${RUNS_LEFT[@]}"})
    if ((status == 130)); then break; fi
    # what was wrong with the input of one is wrong for all; 2 is eval.py's own exit status
    if ((status == 2)); then failed+=(${pending[@]+"${pending[@]}"}) pending=(); fi
  done
  if ((worst == 130)); then
    printf -v again ' %q' "$@"
    runner kept "${REQUEST[@]}" "${CONFIGS[@]/#/--config=}" "--text=bash sbatch/local.sh${again// --force/}"
    exit 130
  fi
  if ((${#failed[@]})); then say "${0##*/}: failed: ${failed[*]}"; fi
  if [[ $MODE != named ]]; then runner status "${REQUEST[@]}" --matrix --table; fi
  if [[ $MODE == demo ]]; then
    python -m fast_dllm.report --brief --experiment "$EXPERIMENT" --task "$TASK" ${LIMIT:+--limit "$LIMIT"} || worst=1
  fi
  exit "$worst"
}

main "$@"
