#!/usr/bin/env bash
# Fetches model, tokenizer and data sets once, on a node with a network (the login node), so that
# jobs need none. See --help.
set -euo pipefail
sbatch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source=sbatch/python.sh
source "$sbatch/python.sh"
start_runner "${sbatch%/sbatch}" prefetch "$@"
