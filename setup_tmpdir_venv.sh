# shellcheck shell=bash
# A fast venv on the node's own disk for interactive work: source setup_tmpdir_venv.sh To be
# sourced by bash or zsh: it activates the venv in the shell that it is called from, and changes
# nothing else there.

_fast_dllm_setup() {
  local here=$1 place venv
  place=${TMPDIR:-/tmp}/fast-dllm-venv-$(id -u)
  # /tmp is shared: a folder that somebody else made there would be somebody else's code
  mkdir -m 700 -- "$place" 2>/dev/null || true
  if ! [ -d "$place" ] || ! [ -O "$place" ]; then
    echo "setup_tmpdir_venv.sh: $place cannot be made, or is not yours" >&2
    return 1
  fi
  venv=$(FAST_DLLM_VENV="$place/venv" bash "$here/sbatch/venv.sh") || return 1
  # shellcheck disable=SC1091 # made a moment ago
  . "$venv/bin/activate" || return 1
  echo "venv: $venv is active (deactivate ends that; the node's disk is cleared after the job)"
}

if [ -n "${ZSH_VERSION:-}" ]; then
  # zsh: the file being read, and how the shell came to read it
  # shellcheck disable=SC2154,SC2296,SC2298
  case $ZSH_EVAL_CONTEXT in *:file*) _fast_dllm_file=${(%):-%x} ;; *) _fast_dllm_file="" ;; esac
elif [ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE[0]}" != "$0" ]; then
  _fast_dllm_file=${BASH_SOURCE[0]}
else
  _fast_dllm_file=""
fi

if [ -z "$_fast_dllm_file" ]; then
  echo "setup_tmpdir_venv.sh: source it, so that it can activate the venv:" \
    "source setup_tmpdir_venv.sh" >&2
  exit 2
fi
if _fast_dllm_setup "$(CDPATH='' cd -- "$(dirname -- "$_fast_dllm_file")" && pwd -P)"; then
  unset -f _fast_dllm_setup
  unset _fast_dllm_file
else
  unset -f _fast_dllm_setup
  unset _fast_dllm_file
  return 1
fi
