#!/usr/bin/env bash
# Evaluates on this machine, without Slurm. See --help.
set -euo pipefail
sbatch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=sbatch/python.sh
source "$sbatch/python.sh"
start_runner "${sbatch%/sbatch}" local "$@"
