"""The scripts' --help."""

from __future__ import annotations

from pathlib import Path

from fast_dllm.runner.roofline import TYPES
from fast_dllm.spec.defaults import DEFAULT_EXPERIMENT, PUBLISHED_MODELS
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import experiments
from fast_dllm.spec.tasks import baseline_tasks, benchmarks

RUN = """\
Usage: bash sbatch/run.sh [OPTION...] [CONFIG...]
Submits one Slurm job for each configuration that is neither complete, nor queued, nor running.

  --status          show what is complete, running, queued, failed or missing; submits nothing
  --check           with --status: exit status 3 while anything is incomplete
  --json            with --status: the same as JSON
  --dry-run         show what would be submitted and why, and write nothing
  --task T          {tasks} (default gsm8k)
  --experiment E    {experiments} (default {experiment})
  --limit N         only the first N questions (of each subtask); stored apart, as <task>_limit_<N>
  --config C[,C]    only these of the experiment's configurations, plain, or a range of layers such as k2_8-19:
                    {configurations}
  --force           run complete and stale configurations again, from the first question
  --threshold X     confidence above which a token is accepted, 0 to 1
  --model_args A=V[,A=V]
                    any other model argument or knob of the experiment; what is not the configuration's own stands in
                    the name of the results' folder, as in k2_middle+threshold=0.8
  --num_fewshot N   examples in the prompt (default: the task's own)
  --model M         a hub id (published: {models}),
                    a folder or tiny (default the first)
  --continue N      how many further jobs may continue one that Slurm ended: time limit, preemption, node failure
                    (default 3)
  --hours H         wall time of a job, within what its QOS allows; auto: what the evaluation may take, from the
                    speed of a run that is complete or from the GPU's data sheet, with a margin (default 12, or the
                    QOS's limit)
  --gpu TYPE[,TYPE] {gpus}; of several the one that starts soonest;
                    soonest: of all that the model can run on (default rtx_6000)
  --shards N        each configuration's questions in N shares, a job array, and a short job that finishes it; auto: as
                    many that each share ends within a job's wall time
  --gpus P          P GPUs of one node for each job, which share its questions
  --report [--experiment E[,E]] [--task T] [--limit N] [--against E/CONFIG] ...
                    what the results say: verdict, alarms, tables, pictures; all options of python -m fast_dllm.report
  --help

Examples:
  bash sbatch/run.sh --status
  bash sbatch/run.sh --dry-run
  bash sbatch/run.sh                                  the whole matrix on gsm8k
  bash sbatch/run.sh --limit 100 k1_first k2_middle   a quick look
  bash sbatch/run.sh --task minerva_math --experiment {experiment}
"""

LOCAL = """\
Usage: bash sbatch/local.sh [OPTION...]
Evaluates on this machine (makes the venv if it is missing) and writes
results/<experiment>/<task>[_limit_<N>]/<configuration>/{{results.json,summary.json}}. Interrupted, it goes on where it
was.

  --task T          {tasks} (default gsm8k),
                    or {code_tasks}
  --limit N         only the first N questions (of each subtask)
  --experiment E    {experiments} (default {experiment})
  --config C[,C]    plain (the model without layer reuse, the default), a range of layers such as k2_8-19, or one of the
                    experiment's: {configurations}
  --matrix          all of the experiment's; those that are complete are skipped
  --demo            the matrix on toy_math with the tiny model, 200 questions each, its table and report: a few minutes
  --force           answer every question again; with --matrix the complete configurations too
  --model M         tiny, a folder or a hub id (published: {models});
                    default: the first with a CUDA GPU, else tiny
  --threshold X     confidence above which a token is accepted, 0 to 1
  --model_args A=V[,A=V]
                    any other model argument or knob of the experiment; what is not the configuration's own stands in
                    the name of the results' folder, as in k2_middle+threshold=0.8
  --batch_size N    questions decoded side by side (default 1), or auto: what fits
  --num_fewshot N   examples in the prompt (default: the task's own)
  --confirm_run_unsafe_code
                    run the code that the model writes on this machine, as you; {code_task} and the like need it
  --help

Examples:
  bash sbatch/local.sh --demo
  bash sbatch/local.sh --model tiny --task gsm8k --limit 10
  bash sbatch/local.sh --task toy_math --limit 50 --config k2_middle
  bash sbatch/local.sh --task toy_math --limit 50 --matrix
"""

BASELINE = """\
Usage: sbatch sbatch/baseline.sh [OPTION...]
Evaluates the plain model (no layer reuse, threshold 1) on {baseline_tasks},
each with its own number of examples in the prompt. Results: results/00_baseline/<task>[_limit_<N>]/plain/.
A task that fails does not stop the others; the exit status is 1 then. Tasks that are complete are skipped.
Without Slurm: bash sbatch/baseline.sh [OPTION...]

  --task T[,T]   only these: {tasks}
  --limit N      only the first N questions (of each subtask)
  --model M      a hub id (published: {models}),
                 a folder or tiny (default the first)
  --force        run complete ones again, from the first question
  --continue N   how many further jobs may continue one that Slurm ended: time limit, preemption, node failure
                 (default 3)
  --shards N, --gpus P, --gpu TYPE, --hours H
                 without sbatch: submits each task's jobs as run.sh does with these
  --help
"""

PREFETCH = """\
Usage: bash sbatch/prefetch.sh [--task T[,T]] [--model M] [--keep]
Downloads the model and the tasks' data sets into the hub's cache (HF_HOME), after a look at the free space, and says
what is not accessible. Afterwards put HF_HUB_OFFLINE=1 into sbatch/cluster.env.

  --task T[,T]   {tasks} {code_tasks}
                 (default gsm8k)
  --model M      a hub id (published: {models}),
                 a folder or tiny (default the first)
  --keep         download nothing; touch the files of model, data and venv, so that no purge of scratch takes them
"""

TEXTS = {"run.sh": RUN, "local.sh": LOCAL, "baseline.sh": BASELINE, "prefetch.sh": PREFETCH}


def help_text(script: str, root: Path) -> str:
    code_tasks = list(benchmarks(code=True))
    return TEXTS[script].format(
        tasks=" ".join(benchmarks()),
        code_tasks=" ".join(code_tasks),
        code_task=code_tasks[0],
        baseline_tasks=" ".join(baseline_tasks()),
        experiments=" ".join(experiments(root)),
        experiment=DEFAULT_EXPERIMENT,
        configurations=" ".join(matrix_of(DEFAULT_EXPERIMENT, root).names),
        models=", ".join(PUBLISHED_MODELS),
        gpus=" ".join(TYPES),
    )
