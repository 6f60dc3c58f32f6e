#!/usr/bin/env bash
#SBATCH --job-name=layer_reuse_array
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --gres=gpu:rtx_6000:1
#SBATCH --time=12:00:00
#SBATCH --qos=inferno
#SBATCH --no-requeue
#SBATCH --output=layer_reuse_%A_%a.log
# Deprecated: an experiment's configurations as one job array. It knows neither what is complete
# nor what is queued, and nothing continues it: bash sbatch/run.sh does. Options: those of _job.sh
# without --config.
set -euo pipefail
cd -- "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the project folder}"
# shellcheck source=sbatch/python.sh
source sbatch/python.sh
start_runner . array "$@"
