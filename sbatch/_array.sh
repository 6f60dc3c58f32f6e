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
# Deprecated: an experiment's configurations as one job array. It knows neither what is complete nor what is queued, and
# nothing continues it: bash sbatch/run.sh does. Options: _job.sh's without --config: sbatch sbatch/_array.sh --limit 100
set -euo pipefail
echo "_array.sh is deprecated: use bash sbatch/run.sh, which skips what is complete and continues what was interrupted" >&2
cd -- "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the project folder}"
# shellcheck source=sbatch/common.sh
source sbatch/common.sh
ask_runner request --matrix "$@"
config=${CONFIGS[${SLURM_ARRAY_TASK_ID:?this is a job array: sbatch sbatch/_array.sh}]-}
[[ -n $config ]] || die "no configuration number $SLURM_ARRAY_TASK_ID; valid: 0 to $((${#CONFIGS[@]} - 1)) (${CONFIGS[*]})"
exec bash sbatch/_job.sh "$@" --config "$config"
