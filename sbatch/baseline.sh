#!/usr/bin/env bash
#SBATCH --job-name=baseline
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=08:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --output=baseline_%j.log
# The plain model, without layer reuse, at threshold 1, on every task: sbatch sbatch/baseline.sh
# [OPTION...] Submitted from the project's folder. Also runs without Slurm: bash
# sbatch/baseline.sh --model tiny --limit 2 --task toy_math Its 8 hours are what the free QOS
# allows. What it does: fast_dllm/runner/baseline.py.
set -euo pipefail
# Slurm runs a copy of this script, from a folder of its own; the project is where sbatch was called
if [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; then
  cd -- "$SLURM_SUBMIT_DIR"
  code=.
else
  code=$(readlink -f -- "${BASH_SOURCE[0]}")
  code=${code%/sbatch/baseline.sh}
fi
if [[ ${1:-} == --snapshot ]]; then code=.snapshots/$2; fi
if [[ ! -f $code/sbatch/python.sh ]]; then
  echo "baseline.sh: no sbatch/python.sh in $PWD/$code: submit it from the project's folder" >&2
  exit 2
fi
# shellcheck source=sbatch/python.sh
source "$code/sbatch/python.sh"
start_runner "$code" baseline "$@"
