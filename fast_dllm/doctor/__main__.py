"""Look before GPU hours are spent: would an evaluation work here? One line each, `ok` or what to do.

    python -m fast_dllm.doctor --task gsm8k,mmlu

Exit status: 0 (warnings included), 1 when something would make a job fail, 2 for a wrong option. --quick is what
sbatch/run.sh asks before it submits: no network, no packages needed, a moment.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator

from fast_dllm.doctor.cluster import check_cluster
from fast_dllm.doctor.data_sets import check_data_sets, check_sentences, learn_data_sets
from fast_dllm.doctor.disks import check_disk, check_purge, check_quota, keep
from fast_dllm.doctor.gpu import check_gpu
from fast_dllm.doctor.model_files import check_model
from fast_dllm.doctor.situation import Finding, Situation, read_situation
from fast_dllm.doctor.software import check_python, check_sandbox, check_venv
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.spec.matrix import matrix_of
from fast_dllm.spec.request import experiments


def check_experiments(situation: Situation) -> Iterator[Finding]:
    """That the experiments' own configurations can be read."""
    for name in experiments(situation.root):
        try:
            matrix_of(name, situation.root)
        except UsageError as error:
            yield Finding("warn", f"experiment {name}: {error}; run.sh refuses it")


QUICK_CHECKS = (check_venv, check_model, check_data_sets, check_disk, check_experiments)
THOROUGH_CHECKS = (
    check_python, check_gpu, check_venv, check_model, check_data_sets, check_sentences, check_sandbox, check_disk,
    check_quota, check_cluster, check_purge,
)  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------
def thorough_findings(situation: Situation) -> Iterator[Finding]:
    needed = ["packaging", "torch", "transformers", "lm_eval", "datasets", "huggingface_hub"]
    if sys.version_info < (3, 11):
        needed.append("tomli")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        where = situation.venv or "what bash sbatch/venv.sh prints"
        yield Finding(
            "fail", f"this Python ({sys.prefix}) has no {', '.join(absent)}; source {where}/bin/activate first"
        )
        yield from quick_findings(situation)
        return
    situation = learn_data_sets(situation)
    for check in THOROUGH_CHECKS:
        yield from check(situation)


def quick_findings(situation: Situation) -> Iterator[Finding]:
    for check in QUICK_CHECKS:
        yield from check(situation)


def main() -> None:
    parser = OneLineParser(prog="doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="gsm8k", metavar="T[,T]", help="tasks to be evaluated (default gsm8k)")
    parser.add_argument("--model", default="", help="tiny, a folder or a hub id (default: the published 7B)")
    parser.add_argument("--quick", action="store_true", help="only what needs no network and no packages")
    parser.add_argument("--keep", action="store_true", help="touch the files of model, data and venv against a purge")
    try:
        arguments = parser.parse_args()
        situation = read_situation(arguments.task.split(","), arguments.model)
    except UsageError as error:
        print(f"doctor: error: {error}", file=sys.stderr)
        sys.exit(2)
    os.environ.update(situation.environment)  # cluster.env's, before a library reads them
    failed = False
    look = keep if arguments.keep else quick_findings if arguments.quick else thorough_findings
    for finding in look(situation):
        print(f"{finding.level:4} {finding.text}", flush=True)
        failed = failed or finding.level == "fail"
    sys.exit(failed)


if __name__ == "__main__":
    main()
