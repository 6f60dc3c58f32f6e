# shellcheck shell=bash
# Who is at work on something, on any node, without flock (which may let everyone in on Lustre and some NFS).
#
# A claim is a folder <base>.<number> that mkdir made: atomic on every file system. Its `owner` names host and pid, its
# `heartbeat` is a counter that changes while the owner lives. No clock of another node is read: a heartbeat changes
# within DEAD_SECONDS, or its owner is dead. A dead owner's claim is not used again; the next number is made, the highest
# number is the one that counts, and the older ones are removed.
#
# An owner that was only cut off or stopped for so long lives on beside the new one. So no file has two writers, files are
# published whole, and an owner looks for its claim (lock_is_ours; AnswerStore) before it writes what others read.

DEAD_SECONDS=${DEAD_SECONDS:-45}

claim_latest() { # base. Prints the claim with the highest number, if there is any
  local claim last=""
  for claim in "$1".[0-9][0-9][0-9][0-9]; do
    if [[ -d $claim ]]; then last=$claim; fi
  done
  printf '%s' "$last"
}

claim_next() { # base, latest claim or "". Makes the next one and sets CLAIM; fails when another process was faster
  local number=0
  [[ -z $2 ]] || number=$((10#${2##*.}))
  CLAIM=$(printf '%s.%04d' "$1" $((number + 1)))
  mkdir -- "$CLAIM" 2>/dev/null || return 1
  printf '%s %s\n' "$(uname -n)" "$$" >"$CLAIM/owner"
}

process_gone() { # pid, on this host. A zombie is gone
  if [[ -d /proc/self ]]; then
    [[ ! -d /proc/$1 || $(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) == [ZX] ]]
  else
    ! ps -p "$1" >/dev/null 2>&1
  fi
}

beat() { # folder, command and arguments to run every 20 s or nothing. Ends with this process, also when that is killed
  local folder=$1 count=0 owner=$$
  shift
  while ! process_gone "$owner" && [[ -d $folder ]]; do
    printf '%s\n' "$((count += 1))" >"$folder/heartbeat.new" && mv -f -- "$folder/heartbeat.new" "$folder/heartbeat"
    sleep 2 >/dev/null 2>&1 # it may outlive this loop, and must not hold the caller's pipe open
    if (($# && count % 10 == 0)); then "$@" $((count * 2)); fi
  done
}

# $1: claim, $2: the file that its owner leaves in it at the end, $3: "forever", or "short": wait no longer than it takes
# to see that the owner lives. Returns 0 when the owner has ended or is dead, 1 when it lives.
wait_for_owner() {
  local claim=$1 host="" pid="" seen="" now since=$SECONDS changes=0
  while [[ -d $claim && ! -e $claim/$2 && ! -e $claim/failed ]]; do
    if [[ -f $claim/owner ]]; then read -r host pid <"$claim/owner" || true; fi
    if [[ $host == "$(uname -n)" && -n $pid ]] && process_gone "$pid"; then return 0; fi
    now=$(cat -- "$claim/heartbeat" 2>/dev/null || true)
    if [[ $now != "$seen" ]]; then seen=$now since=$SECONDS changes=$((changes + 1)); fi
    if ((SECONDS - since >= DEAD_SECONDS)); then return 0; fi
    if [[ $3 == short ]] && ((changes >= 3)); then return 1; fi
    sleep 0.5
  done
}

declare -A LOCK=() LOCK_BEAT=() # by base: the claim that this process holds, and the process that keeps it alive

# $1: base, $2: as wait_for_owner's $3. Fails when a living owner is at work.
lock_acquire() {
  local last older
  mkdir -p -- "$(dirname -- "$1")"
  while :; do
    last=$(claim_latest "$1")
    if [[ -n $last ]]; then wait_for_owner "$last" released "$2" || return 1; fi
    claim_next "$1" "$last" || { [[ -d $CLAIM ]] && continue; return 1; }
    # the number may have been free only because its first owner's claim was cleared away by a later one
    [[ $(claim_latest "$1") == "$CLAIM" ]] && break
    rm -rf -- "$CLAIM"
  done
  for older in "$1".[0-9][0-9][0-9][0-9]; do
    if [[ $older != "$CLAIM" ]]; then rm -rf -- "$older"; fi
  done
  LOCK[$1]=$CLAIM
  beat "$CLAIM" </dev/null >/dev/null 2>&1 &
  LOCK_BEAT[$1]=$!
}

lock_owner() { # base. Prints "host pid" of the latest claim
  cat -- "$(claim_latest "$1")/owner" 2>/dev/null || echo "another process"
}

lock_is_ours() { # base. Opening the file asks the server; that a folder exists may be remembered from before
  { : <"${LOCK[$1]}/owner"; } 2>/dev/null
}

lock_release() { # base. The folder stays: its number must not be given out again
  kill "${LOCK_BEAT[$1]}" 2>/dev/null || true
  wait "${LOCK_BEAT[$1]}" 2>/dev/null || true
  if lock_is_ours "$1"; then : >"${LOCK[$1]}/released"; fi
  unset "LOCK[$1]" "LOCK_BEAT[$1]"
}
