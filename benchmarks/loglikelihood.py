"""Requests scored per second, shaped like mmlu, beside the straightforward form; a JSON line last.

    python -m benchmarks.loglikelihood --questions 50               # the embedded model, 5-shot, four letters each
    python -m benchmarks.loglikelihood --random_weights 36x128 --batch_size 8 --mode chain --continuation_tokens 6

Straightforward is a forward of every distinct input from its first token on, equal lengths side by side in batches of
the same size: a question's four letters are one input there as well. The two take turns --runs times in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.common import check_options, model_of
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.evaluate.scoring import MaskedInput, SharedContext, batches, masked_inputs, target_scores
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.modes import use_graphs
from fast_dllm.network.threads import fit_threads

Wanted = dict[MaskedInput, dict[int, None]]  # input -> the tokens whose score is asked for
Scores = dict[tuple[MaskedInput, int], tuple[float, bool]]


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder, hub id or tiny")
    parser.add_argument("--random_weights", metavar="LAYERSxHIDDEN", help="a random model of this shape instead")
    parser.add_argument("--mode", choices=("reference", "chain"), default="reference")
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--questions", type=int, default=24, help="of each subject")
    parser.add_argument("--shot_tokens", type=int, default=600, help="what a subject's questions begin with")
    parser.add_argument("--question_tokens", type=int, default=100, help="on average; from half to one and a half")
    parser.add_argument("--continuation_tokens", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--graphs", default="off", help="off (default), or compiled: the shared form's layers, on a CPU"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    check_options(arguments, "subjects", "questions", "question_tokens", "continuation_tokens", "batch_size", "runs")
    return arguments


def requests_of(arguments: argparse.Namespace, model: FastDLLMForCausalLM) -> tuple[Wanted, int]:
    """The inputs to be scored, of random tokens, and the number of requests: four continuations for each question."""
    rng = random.Random(0)
    vocab = min(model.config.vocab_size, 300)
    wanted: Wanted = {}
    for _ in range(arguments.subjects):
        shots = [rng.randrange(3, vocab) for _ in range(arguments.shot_tokens)]
        for _ in range(arguments.questions):
            length = rng.randrange(arguments.question_tokens // 2, arguments.question_tokens * 3 // 2 + 1)
            context = shots + [rng.randrange(3, vocab) for _ in range(length)]
            for letter in range(10, 14):
                continuation = [letter, *(rng.randrange(3, vocab) for _ in range(arguments.continuation_tokens - 1))]
                for masked, target in masked_inputs(
                    context,
                    continuation,
                    chain=arguments.mode == "chain",
                    mask_id=model.config.vocab_size - 1,
                    stop_token=model.config.vocab_size - 2,
                    block_size=model.config.bd_size,
                    max_length=model.config.max_position_embeddings,
                ):
                    wanted.setdefault(masked, {})[target] = None
    return wanted, arguments.subjects * arguments.questions * 4


def shared(model: FastDLLMForCausalLM, wanted: Wanted, batch_size: int) -> Scores:
    """As an evaluation scores."""
    context = SharedContext(model, batch_size, max(len(ids) for _, ids in wanted), model.config.bd_size)
    scores: Scores = {}
    for batch in batches(wanted, block_size=model.config.bd_size, batch_size=batch_size):
        batch_scores = target_scores(context, batch, [wanted[masked] for masked in batch.inputs], pad_id=0)
        for masked, values in zip(batch.inputs, batch_scores, strict=True):
            scores |= {(masked, target): value for target, value in zip(wanted[masked], values, strict=True)}
    return scores


@torch.inference_mode()
def straightforward(model: FastDLLMForCausalLM, wanted: Wanted, batch_size: int) -> Scores:
    """One whole forward for each input."""
    scores: Scores = {}
    inputs = sorted(wanted, key=lambda masked: -len(masked.ids))
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        longest = len(batch[0].ids)
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for _, ids in batch], device=model.device)
        rows = torch.tensor([[row] for row, _ in batch], device=model.device)
        log_probs = model(ids, rows=rows).logits[:, 0].float().log_softmax(dim=-1)
        best = log_probs.argmax(dim=-1).tolist()
        for place, masked in enumerate(batch):
            for target in wanted[masked]:
                scores[masked, target] = (float(log_probs[place, target]), best[place] == target)
    return scores


def main() -> None:
    arguments = parse_arguments()
    model = model_of(arguments)
    fit_threads(model)
    use_graphs(model, arguments.graphs)
    try:
        wanted, num_requests = requests_of(arguments, model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    seconds: dict[str, list[float]] = {"straightforward": [], "shared": []}
    largest, flips = 0.0, 0
    for run in range(arguments.runs + 1):  # the first does not count
        scores = {}
        for name, score in (("straightforward", straightforward), ("shared", shared)):
            began = time.perf_counter()
            scores[name] = score(model, wanted, arguments.batch_size)
            seconds[name] += [time.perf_counter() - began] if run else []
        for key, (value, greedy) in scores["shared"].items():
            plain, best = scores["straightforward"][key]
            largest, flips = max(largest, abs(value - plain)), flips + (greedy != best)
    rates = {name: num_requests / statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(a / b for a, b in zip(seconds["straightforward"], seconds["shared"], strict=True))
    print(f"{num_requests} requests, {len(wanted)} inputs of {max(len(ids) for _, ids in wanted)} tokens at most")
    for name, rate in rates.items():
        print(f"{name:>16} {rate:8.1f} requests/s")
    print(f"shared / straightforward: {ratio:.2f}; scores differ by {largest:.1e} at most, {flips} other argmaxes")
    comparison = {"ratio": ratio, "requests_per_second": rates, "largest_difference": largest, "other_argmaxes": flips}
    print(json.dumps({"settings": vars(arguments), **comparison}))


if __name__ == "__main__":
    with one_line():
        main()
