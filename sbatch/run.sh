#!/usr/bin/env bash
# The configurations of an experiment on a task: what is done, what runs, and one Slurm job for
# each that is missing. See --help and docs/operations.md.
set -euo pipefail
sbatch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=sbatch/python.sh
source "$sbatch/python.sh"
start_runner "${sbatch%/sbatch}" run "$@"
