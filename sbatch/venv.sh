#!/usr/bin/env bash
# The venv: built once, however many jobs on however many nodes want it at the same moment.
# Run:     bash sbatch/venv.sh      builds it if it is missing, prints its folder
# Source:  venv_activate            the same, then puts it on PATH
#
#   <venv>.d/<hash>.<attempt>/  one build. A venv cannot be moved, so each is built where it stays.
#       owner, heartbeat        who builds, and whether it lives: see lock.sh
#       complete                the hash of the requirements, written last, by rename
#   <venv>                      a link to the newest complete one, for people: source .venv/bin/activate
#
# The attempt's folder is a claim of lock.sh. A builder that died is not robbed of it: another one makes the next attempt.
# So the worst that a wrong guess about a slow builder can do is a second, equally good venv.

# The folder whose pyproject.toml and constraints.txt count: in a job the snapshot of the submitted code.
CODE_ROOT=${CODE_ROOT:-$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)}
PROJECT_ROOT=${PROJECT_ROOT:-$CODE_ROOT}
# shellcheck source=sbatch/lock.sh
source "$CODE_ROOT/sbatch/lock.sh"
# shellcheck source=sbatch/python.sh
source "$CODE_ROOT/sbatch/python.sh"
# shellcheck source=sbatch/venv_tidy.sh
source "$CODE_ROOT/sbatch/venv_tidy.sh"

venv_say() { printf 'venv: %s\n' "$*" >&2; }

venv_location() {
  if [[ -n ${FAST_DLLM_VENV:-} ]]; then
    case $FAST_DLLM_VENV in /*) printf '%s\n' "${FAST_DLLM_VENV%/}" ;; *) printf '%s\n' "$PWD/${FAST_DLLM_VENV%/}" ;; esac
  elif [[ -n ${HOME:-} && -d $HOME/scratch ]]; then
    printf '%s\n' "$HOME/scratch/Fast-dLLM/v2/.venv"
  else
    printf '%s\n' "$PROJECT_ROOT/.venv"
  fi
}

# Of what decides about the venv's content: constraints.txt and the [project] tables of pyproject.toml. A changed lint rule
# is no reason to build again.
venv_hash() {
  { awk '/^\[/ { wanted = /^\[project/ } wanted' "$CODE_ROOT/pyproject.toml" && cat -- "$CODE_ROOT/constraints.txt"; } |
    sha256sum | cut -c 1-16
}

# $1: the builds' folder, $2: the hash. Prints a complete build whose interpreter still exists (a scratch purge or a
# removed Python module can leave the mark without it).
venv_complete() {
  local build
  for build in "$1/$2".[0-9][0-9][0-9][0-9]; do
    if [[ -x $build/bin/python && -f $build/complete && $(<"$build/complete") == "$2" ]]; then
      printf '%s\n' "$build"
      return 0
    fi
  done
  return 1
}

venv_report() { venv_say "building, $2 s: $(tail -n 1 -- "$1/build.log" 2>/dev/null | cut -c 1-100)"; }

# The uv that builds: PATH's; where a Python >= 3.10 can do it, none; else one of our own, which brings a Python as well.
venv_uv() { # the builds' folder; sets UV, PYTHON
  local python
  UV=$(command -v uv) || UV=""
  PYTHON='>=3.10'
  if [[ -n $UV ]] || python_from 10 venv >/dev/null; then return 0; fi
  PYTHON=3.12
  # not in a home of 20 GB, which torch alone would half fill
  export UV_PYTHON_INSTALL_DIR=${UV_PYTHON_INSTALL_DIR:-$1/python} UV_CACHE_DIR=${UV_CACHE_DIR:-$1/cache}
  python=$(python_from 8 sys) && UV=$("$python" -B "$CODE_ROOT/sbatch/own_uv.py" "$1")
}

# Dependencies only, with a .pth line to the project: an editable install would write into the folder that it points to,
# and a job's is a snapshot.
venv_fill() { # $1: folder
  local python requirements=$1/requirements.txt
  venv_uv "$(dirname -- "$1")" || return 1
  if [[ -n $UV ]]; then
    "$UV" venv --allow-existing --python "$PYTHON" "$1" || {
      echo "uv could not bring Python $PYTHON; what helps: module load python (3.10 or newer), or a node with a network"
      return 1
    }
    UV_LINK_MODE=copy "$UV" pip install --python "$1/bin/python" -r "$CODE_ROOT/pyproject.toml" --extra dev -c "$CODE_ROOT/constraints.txt"
  else
    python=$(python_from 10 venv) && "$python" -m venv "$1" &&
      "$1/bin/python" "$CODE_ROOT/sbatch/requirements.py" "$CODE_ROOT/pyproject.toml" >"$requirements" &&
      # modules are compiled when they are first imported: most never are, and that halves the build and the files
      "$1/bin/python" -m pip install --no-input --no-compile -r "$requirements" -c "$CODE_ROOT/constraints.txt"
  fi || return 1
  local packages
  packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 1
  printf '%s\n' "$PROJECT_ROOT" >"$packages/fast_dllm_project.pth"
}

venv_build() { # $1: the claimed folder, $2: hash
  local build=$1 beat status=0
  venv_say "building $build with $(command -v uv || python_from 10 venv || echo "a uv and a Python of its own"), a few minutes (log: $build/build.log)"
  beat "$build" venv_report "$build" </dev/null >/dev/null &
  beat=$!
  venv_fill "$build" >"$build/build.log" 2>&1 </dev/null || status=$?
  if ((status == 0)) && ! "$build/bin/python" "$CODE_ROOT/sbatch/nltk_data.py" "$build" >>"$build/build.log" 2>&1 </dev/null; then
    venv_say "$(tail -n 1 -- "$build/build.log"); before ifeval run: bash sbatch/prefetch.sh --task ifeval"
  fi
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  if ((status != 0)); then
    tail -n 15 -- "$build/build.log" >&2 || true
    echo "$status" >"$build/failed" || true
    return 1
  fi
  printf '%s\n' "$2" >"$build/complete.new" && mv -f -- "$build/complete.new" "$build/complete"
}

venv_ensure() { # sets VENV
  local place builds hash last
  place=$(venv_location) && hash=$(venv_hash) || return 1
  builds=$place.d
  mkdir -p -- "$builds" || return 1
  while ! VENV=$(venv_complete "$builds" "$hash"); do
    last=$(claim_latest "$builds/$hash")
    if [[ -n $last && ! -e $last/failed && ! -e $last/complete ]]; then
      venv_say "waiting for $last, which is being built by $(lock_owner "$builds/$hash")"
      wait_for_owner "$last" complete forever
    fi
    # the last builder may have finished between the two looks
    if VENV=$(venv_complete "$builds" "$hash"); then break; fi
    claim_next "$builds/$hash" "$last" || { [[ -d $CLAIM ]] && continue; venv_say "cannot write to $builds"; return 1; }
    if venv_build "$CLAIM" "$hash"; then
      venv_tidy "$builds" "$hash" "$CLAIM"
    elif ! VENV=$(venv_complete "$builds" "$hash"); then
      venv_say "the build failed; its log is $CLAIM/build.log"
      return 1
    fi
  done
  touch -c -- "$VENV/complete" 2>/dev/null || true
  [[ -L $place && $(readlink -- "$place") == "$VENV" ]] || venv_publish "$place" "$VENV"
}

venv_activate() {
  venv_ensure || return 1
  export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH
  # ~/.local and a caller's PYTHONHOME would put other versions in front of the venv's
  export PYTHONNOUSERSITE=1
  unset PYTHONHOME
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  venv_ensure
  printf '%s\n' "$VENV"
  exit # this file may have changed meanwhile
fi
