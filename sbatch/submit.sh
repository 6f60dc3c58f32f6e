# shellcheck shell=bash
# The code that is submitted is the code that runs: a copy of it, from which a job runs.

snapshot_files() { # everything that EXPERIMENT's evaluation reads, except data and downloaded models; nul-terminated
  local paths=(eval.py pyproject.toml constraints.txt fast_dllm tasks sbatch "experiments/$EXPERIMENT") file
  for file in generation_functions.py experiments/replays.json; do
    if [[ -f $file ]]; then paths+=("$file"); fi
  done
  if [[ $MODEL == tiny ]]; then paths+=(models/tiny); fi
  find "${paths[@]}" -name __pycache__ -prune -o -type f ! -name cluster.env ! -name '*.pyc' -print0 | LC_ALL=C sort -z
}

# Sets SNAPSHOT (a hash of the files and of the git state) and SNAPSHOT_STATE, without writing anything.
snapshot_name() {
  local commit="" branch="" dirty=null
  if commit=$(git rev-parse HEAD 2>/dev/null); then
    branch=$(git rev-parse --abbrev-ref HEAD)
    # of files that are not tracked, those that an evaluation may read
    if [[ -n $(git status --porcelain --untracked-files=no)$(git status --porcelain -- experiments fast_dllm tasks) ]]; then dirty=true; else dirty=false; fi
  fi
  SNAPSHOT_STATE=$(printf '{\n  "git_commit": "%s",\n  "git_branch": "%s",\n  "git_dirty": %s\n}' "$commit" "$branch" "$dirty")
  SNAPSHOT=$({ snapshot_files | xargs -0 sha256sum; printf '%s' "$SNAPSHOT_STATE"; } | sha256sum | cut -c 1-16)
}

snapshot_make() {
  local new
  new=.snapshots/.new.$(uname -n).$$
  if [[ -d .snapshots/$SNAPSHOT ]]; then return 0; fi
  mkdir -p -- "$new" && snapshot_files | xargs -0 cp -p --parents -t "$new" -- && printf '%s\n' "$SNAPSHOT_STATE" >"$new/snapshot.json"
  # a file that was edited while it was copied would not be the one that was hashed
  if [[ $({ (cd -- "$new" && snapshot_files | xargs -0 sha256sum); printf '%s' "$SNAPSHOT_STATE"; } | sha256sum | cut -c 1-16) != "$SNAPSHOT" ]]; then
    rm -rf -- "$new"
    say "a file changed while the code was copied: $PROJECT_ROOT"
    return 1
  fi
  mv -T -- "$new" ".snapshots/$SNAPSHOT" 2>/dev/null || rm -rf -- "$new" # another run.sh was faster with the same files
  [[ -d .snapshots/$SNAPSHOT ]]
}
