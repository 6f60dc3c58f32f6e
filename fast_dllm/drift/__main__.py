"""python -m fast_dllm.drift: how much each layer changes between denoising steps, and which layers could be skipped.

Decodes real questions plainly (04_threshold, the whole block on each step) and records how much the output of each
layer changes from one step to the next. Writes drift.json (sums: --merge adds several up), pictures and ranges.md, the
predicted error of skipping each range of layers. Exit status 2: wrong input.

    python -m fast_dllm.drift --model tiny --task toy_math --limit 100
    python -m fast_dllm.drift --merge one/drift.json two/drift.json --output both
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import reduce
from operator import add
from pathlib import Path

from fast_dllm.guard import one_line

# isort: split
import matplotlib

from fast_dllm.drift.sums import DriftSums
from fast_dllm.errors import OneLineParser, UsageError, line_of
from fast_dllm.spec.defaults import DEFAULT_MODEL
from fast_dllm.spec.tasks import ROOT, check_task, task_folder

FOLDER = "results/drift"
EXPERIMENT = "04_threshold"


def parser() -> argparse.ArgumentParser:
    options = OneLineParser(
        prog="python -m fast_dllm.drift", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default=DEFAULT_MODEL, help="folder, hub id or tiny (default %(default)s)")
    options.add_argument("--task", default="gsm8k", help="a task whose answers are generated (default %(default)s)")
    options.add_argument(
        "--limit", metavar="N", type=int, default=100, help="the first N questions (default %(default)s)"
    )
    options.add_argument("--threshold", metavar="X", type=float, default=0.9, help="default %(default)s")
    options.add_argument(
        "--sub_block", metavar="S", type=int, default=8, help="rows of a sub-block (default %(default)s)"
    )
    options.add_argument("--width", metavar="W", type=int, help="layers of a range in the table (default 12)")
    options.add_argument("--merge", metavar="FILE", type=Path, nargs="+", help="add up these maps instead of decoding")
    options.add_argument("--output", metavar="DIR", type=Path, help=f"default {FOLDER}/<task>_limit_<N>")
    return options


def record(options: argparse.Namespace) -> DriftSums:
    """Decode the questions as an evaluation does, one at a time, and record them. Raises UsageError."""
    task = check_task(options.task)
    if task.choices > 1:
        raise UsageError(f"{task.name} is scored by log-likelihood, without denoising steps; give a generated task")
    if options.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {options.limit}")
    from lm_eval import simple_evaluate  # torch and lm_eval are loaded once the input is known to be good
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from fast_dllm.decode.arguments import ModelArguments
    from fast_dllm.drift.recorder import Recorder
    from fast_dllm.evaluate.harness import FastDLLM
    from fast_dllm.evaluate.task_loading import find_tasks, prepare

    arguments = ModelArguments.parse(
        model_path=options.model,
        experiment_name=EXPERIMENT,
        threshold=options.threshold,
        small_block_size=options.sub_block,
    )
    lm = FastDLLM(arguments, chat_template=True)
    config = EvaluatorConfig(tasks=[task.name])
    manager = prepare(find_tasks(config), config.tasks, confirm_run_unsafe_code=False, seed=0)
    sums = DriftSums.empty(
        lm.model.config.num_hidden_layers,
        lm.loaded.block_size,
        model=options.model,
        task=task.name,
        threshold=options.threshold,
        small_block_size=options.sub_block,
    )
    with Recorder(lm.model, sums, lm.loaded.ids.mask):
        simple_evaluate(
            model=lm,
            tasks=[task.name],
            num_fewshot=task.num_fewshot,
            limit=options.limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            task_manager=manager,
            bootstrap_iters=0,
        )
    sums.questions = int(lm.cost.requests)
    return sums


def write(sums: DriftSums, folder: Path, width: int | None) -> str:
    """Write the map, its table and its pictures; returns the table."""
    from fast_dllm.drift.pictures import PICTURES
    from fast_dllm.report.drawing import STYLE, png

    table = sums.table(width)
    sums.write(folder / "drift.json")
    (folder / "ranges.md").write_text(table)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            (folder / f"{name}.png").write_bytes(png(draw(sums)))
    return table


def main(words: list[str] | None = None) -> int:
    try:
        options = parser().parse_args(words)
        began = time.perf_counter()
        if options.merge:
            if options.output is None:
                raise UsageError("--merge needs --output, a folder for the sum")
            sums = reduce(add, (DriftSums.read(path) for path in options.merge))
        else:
            sums = record(options)
        if not sums.steps:
            raise UsageError("no two steps in one block: nothing drifts here; a higher --threshold takes more steps")
        folder = options.output or ROOT / FOLDER / task_folder(options.task, options.limit)
        table = write(sums, folder, options.width)
    except UsageError as error:
        print(f"fast_dllm.drift: error: {line_of(error)}", file=sys.stderr)
        return 2
    print(f"{sums.questions} questions, {sums.steps} pairs of steps, {time.perf_counter() - began:.0f} s")
    print(f"predicted error of what leaves the layers at rest, threshold {sums.threshold:g}\n\n{table}\nwrote {folder}")
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
