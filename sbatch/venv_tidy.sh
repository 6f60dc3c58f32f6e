# shellcheck shell=bash
# What is done with builds of the venv that nobody needs, and the link to the one that is used. Sourced by venv.sh.

# Away at once, then file by file: a builder that was wrongly taken for dead must not complete what is half removed.
venv_remove() {
  local away
  away=$(dirname -- "$1")/.removed.$(basename -- "$1").$(uname -n).$$
  if mv -T -- "$1" "$away" 2>/dev/null; then rm -rf -- "$away"; fi
}

# Dead, failed and broken attempts at this hash, and other builds that nothing has used for two weeks.
venv_tidy() { # $1: the builds' folder, $2: hash, $3: the build to keep
  local other
  for other in "$1/$2".[0-9][0-9][0-9][0-9]; do
    if [[ $other < $3 && ! (-f $other/complete && -x $other/bin/python) ]]; then venv_remove "$other"; fi
  done
  find "$1" -mindepth 2 -maxdepth 2 -name complete -mtime +14 ! -path "$3/*" -print 2>/dev/null | while IFS= read -r other; do
    venv_remove "${other%/complete}"
  done
}

venv_publish() { # $1: the location people know, $2: the build
  if [[ -L $1 || ! -e $1 ]] || rmdir -- "$1" 2>/dev/null; then
    ln -sfn -- "$2" "$1"
  else
    venv_say "$1 was not made by these scripts and is left alone; they use $2"
  fi
}
