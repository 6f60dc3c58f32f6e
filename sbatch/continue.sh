# shellcheck shell=bash
# What is done again, and by whom, when Slurm ends a job: _job.sh and baseline.sh share this. Each job submits at its start
# the one that continues it, waiting for it to fail, because at the end there may be no time left to submit anything.
# Sourced after common.sh. A job's work is REQUEST; its script's ask_successor submits a job for the same work (runner
# successor), from a --dependency for sbatch and further options of the script:
#   --continue N      how many more jobs may follow
#   --after ID[,ID]   the jobs that this one continues, the latest last
#   --progress M      what was done when that one started (runner work), --stalled N: jobs in a row before it that did nothing
# shellcheck source=sbatch/evaluate.sh
source "$CODE_ROOT/sbatch/evaluate.sh"
# shellcheck source=sbatch/submit.sh
source "$CODE_ROOT/sbatch/submit.sh"

CONTINUE=0 AFTER="" PROGRESS=0+0 STALLED=0 SUCCESSOR="" REFUSED=""
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} JOB=${JOB:-${SLURM_JOB_ID-}} # one of an array as 12_3

continue_option() { # option, value
  case $1 in
    --continue) CONTINUE=$2 REQUEST+=("--continue=$2") ;; # looked at by `runner request`
    --after) AFTER=$2 ;;
    --progress) PROGRESS=$2 ;;
    --stalled) STALLED=$2 ;;
  esac
}

fail_left() { # class, last lines or "" for the log's: the job ends before it evaluates anything
  runner fail "${REQUEST[@]}" "--failure=$1" "--text=$2" "--log=$(log_of_this_job)" "--after=$AFTER"
}

submit_successor() {
  ((CONTINUE > 0)) || return 0
  ask_successor "afternotok:$JOB" --continue "$((CONTINUE - 1))" --after "${AFTER:+$AFTER,}$JOB" \
    --progress "$(runner work "${REQUEST[@]}")" --stalled "$STALLED"
  if [[ -n $SUCCESSOR ]]; then
    say "job $SUCCESSOR waits to continue this one, should Slurm end it"
  else
    say "no job to continue this one could be submitted: $REFUSED"
  fi
}

begin_job() { # ends the script when there is nothing to continue, or nothing to compute on
  if [[ -n $AFTER ]]; then
    ask_runner after "${REQUEST[@]}" "--after=$AFTER" "--progress=$PROGRESS" "--stalled=$STALLED" "--log=$(log_of_this_job)"
    [[ $GO_ON != no ]] || exit 0
    [[ $GO_ON == yes ]] || exit 1
  fi
  submit_successor
  if [[ -n ${SLURM_JOB_GPUS:-} ]] && command -v nvidia-smi >/dev/null 2>&1 && ! has_gpu; then
    GOES_ON=yes
    fail_left node_failure "nvidia-smi sees no GPU on $(uname -n)"
    say "Slurm gave this job a GPU, but nvidia-smi sees none on $(uname -n)"
    end_job 1
  fi
}

activate_or_fail() {
  if venv_activate; then export_environment && return 0; fi
  GOES_ON=no
  fail_left venv ""
  end_job 1
}

end_job() { # exit status. GOES_ON: the last evaluation's end, or this one, is one that another job follows
  if [[ -n $SUCCESSOR ]] && { (($1 == 0)) || [[ $GOES_ON == no ]]; }; then
    scancel "$SUCCESSOR" || true # it would start only to see that there is nothing to continue
  fi
  exit "$1"
}
