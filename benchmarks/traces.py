"""What recording traces costs: the same questions with and without, in turns; a JSON line last.

    python -m benchmarks.traces                    # 128 questions of toy_math, the embedded model, 32 rows
    python -m benchmarks.traces --threshold 1      # one token a step: the most steps, and the largest traces

seconds: of the processor, which is what a busy machine can compare. Traces are compressed and written as an evaluation
does it, to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.common import check_options, toy_prompts
from fast_dllm.decode import experiments
from fast_dllm.decode.loaded import LoadedModel
from fast_dllm.decode.tracing import traced
from fast_dllm.errors import OneLineParser
from fast_dllm.record.answers import AnswerStore
from fast_dllm.record.traces import PART_SUFFIX, TraceWriter


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=128, help="of toy_math's test split")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    check_options(arguments, "questions", "batch_size", "runs")
    return arguments


def answer(model: LoadedModel, prompts: list[list[int]], arguments: argparse.Namespace, folder: Path | None) -> list:
    """The answers' tokens. folder: where traces are written; None for none."""
    experiment, writer = experiments.load("00_baseline"), None
    traces: dict[int, dict] = {}
    if folder is not None:
        writer = TraceWriter(AnswerStore(folder, {}))
        experiment = replace(experiment, decode_one=traced(experiment.decode_one, traces.__setitem__))
    tokens = {}
    settings = {"num_rows": arguments.batch_size, "threshold": arguments.threshold, "max_new_tokens": 256}
    for event in experiment.denoise(model, prompts, **settings):
        if event.generation is not None:
            tokens[event.row] = event.generation.tokens
            if writer is not None:
                writer.write({"key": str(event.row), "questions": [["toy_math", event.row]], **traces.pop(event.row)})
    return [tokens[row] for row in range(len(prompts))]


def main() -> None:
    arguments = parse_arguments()
    model = LoadedModel.load("tiny", arguments.device, arguments.dtype, several=arguments.batch_size != 1)
    prompts = toy_prompts(arguments.questions)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    num_bytes = 0
    for run in range(arguments.runs + 1):
        answers = []
        for name, taken in seconds.items():
            with tempfile.TemporaryDirectory(prefix="traces-benchmark-") as temporary:
                folder = Path(temporary) if name == "with" else None
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                began = time.process_time()
                answers.append(answer(model, prompts, arguments, folder))
                taken += [time.process_time() - began] if run else []  # the first run only warms up
                num_bytes = sum(path.stat().st_size for path in Path(temporary).glob(f"answers/*/*{PART_SUFFIX}"))
        if answers[0] != answers[1]:
            sys.exit("benchmarks.traces: the tokens differ")
    ratios = [with_traces / without for without, with_traces in zip(*seconds.values(), strict=True)]
    report = {
        "settings": vars(arguments),
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bytes_per_answer": num_bytes / len(prompts),
    }
    print(f"{arguments.questions} questions, {arguments.batch_size} rows, threshold {arguments.threshold:g}")
    print(f"with traces: {report['ratio']:.3f} times the processor time ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{report['bytes_per_answer'] / 1000:.2f} kB an answer, compressed")
    print(json.dumps(report))


if __name__ == "__main__":
    with one_line():
        main()
