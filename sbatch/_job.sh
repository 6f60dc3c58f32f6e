#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=12:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --open-mode=append
# One configuration's job. run.sh submits it, with the code of that moment (--snapshot ID comes
# first then). What it does: fast_dllm/runner/job.py.
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
code=.
if [[ ${1:-} == --snapshot ]]; then code=.snapshots/$2; fi
if [[ ! -f $code/sbatch/python.sh ]]; then
  echo "_job.sh: no sbatch/python.sh in $PWD/$code: submit from the project's folder" >&2
  exit 2
fi
# shellcheck source=sbatch/python.sh
source "$code/sbatch/python.sh"
start_runner "$code" job "$@"
