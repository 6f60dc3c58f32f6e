#!/usr/bin/env bash
# Makes the venv if it is missing, and prints its folder: source "$(bash
# sbatch/venv.sh)/bin/activate"
set -euo pipefail
sbatch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=sbatch/python.sh
source "$sbatch/python.sh"
start_runner "${sbatch%/sbatch}" venv "$@"
