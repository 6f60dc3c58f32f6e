"""Plain decoding beside 06_lookahead: forwards, processor seconds and equal answers, on the embedded model.

    python -m benchmarks.lookahead                          # 100 questions of toy_math, threshold 0.9, 32 sequences
    python -m benchmarks.lookahead --threshold 1 --batch_size 1 --questions 20
    python -m benchmarks.lookahead --blocks 8 --questions 20     # answers that go on for eight blocks
    python -m benchmarks.lookahead --blocks 8 --questions 8 --golden    # of random weights, to random prompts

forwards: of one sequence each, commits included, prefills not; plain / forwards is what lookahead saves. seconds: of
the processor, of the fastest of `--runs` runs, in turns. guesses: accepted of offered, by what was guessed.
forwards per block: over the blocks that were committed, which an answer's last one is not.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import torch

from benchmarks.common import check_options, tiny_settings, toy_prompts
from fast_dllm.decode import experiments
from fast_dllm.decoding import Generation
from fast_dllm.errors import OneLineParser
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.transcripts import golden_model

NO_TOKEN = -1  # a stop token that no answer has
GOLDEN_MASK = 319  # the mask's token id, the last one, of the golden model tiny36


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, GOLDEN_MASK - 1) for _ in range(rng.randrange(5, 60))] for _ in range(count)]


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100, help="of toy_math's test split")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--small_block_size", type=int, default=8)
    parser.add_argument("--states", default="1,2,4", help="numbers of states beside plain decoding")
    parser.add_argument("--blocks", type=int, help="answers go on for so many blocks: nothing stops them before")
    parser.add_argument("--golden", action="store_true", help="the golden model tiny36 instead of the embedded model")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    check_options(arguments, "questions", "batch_size", "runs", "blocks")
    return arguments


def answers(model: FastDLLMForCausalLM, prompts: list[list[int]], name: str | None, **knobs: Any) -> list[Generation]:
    return experiments.load(name).generate(model, prompts, **tiny_settings() | knobs)


def main() -> None:
    arguments = parse_arguments()
    knobs: dict[str, Any] = {
        "num_rows": arguments.batch_size,
        "threshold": arguments.threshold,
        "small_block_size": arguments.small_block_size,
    }
    if arguments.golden:
        model, prompts = golden_model("tiny36"), random_prompts(arguments.questions)
        knobs |= {"mask_id": GOLDEN_MASK, "stop_token": NO_TOKEN}
    else:
        model, prompts = load_model("tiny", arguments.device, arguments.dtype).fuse(), toy_prompts(arguments.questions)
    if arguments.blocks:
        knobs |= {"stop_token": NO_TOKEN, "max_new_tokens": arguments.blocks * model.config.bd_size}
    ways: dict[str, tuple[str | None, dict]] = {"plain": (None, {})}
    ways |= {f"{states} states": ("06_lookahead", {"states": int(states)}) for states in arguments.states.split(",")}
    seconds: dict[str, float] = {}
    answers_of: dict[str, list[Generation]] = {}
    for _ in range(arguments.runs):
        for way, (name, more) in ways.items():
            began = time.process_time()
            answers_of[way] = answers(model, prompts, name, **knobs, **more)
            seconds[way] = min(seconds.get(way, float("inf")), time.process_time() - began)
    plain = forwards_of(answers_of["plain"])
    for way, generations in answers_of.items():
        offered, accepted = Counter[str](), Counter[str]()
        for each in generations:
            offered += Counter(each.guesses_offered)
            accepted += Counter(each.guesses_accepted)
        guesses = ", ".join(f"{kind} {accepted[kind]} of {offered[kind]}" for kind in offered)
        same = sum(a.tokens == b.tokens for a, b in zip(generations, answers_of["plain"], strict=True))
        print(
            f"{way:>9}: {forwards_of(generations)} forwards, plain / forwards {plain / forwards_of(generations):.2f}, "
            f"{seconds[way]:.1f} s ({seconds[way] / seconds['plain']:.2f} of plain), "
            f"{forwards_of(generations) / max(blocks_of(generations), 1):.2f} forwards per block, "
            f"{same} of {len(prompts)} answers equal; guesses: {guesses or 'none'}",
            flush=True,
        )


def forwards_of(generations: list[Generation]) -> int:
    return sum(each.forwards["full"] + each.forwards["commit"] for each in generations)


def blocks_of(generations: list[Generation]) -> int:
    """Blocks that were committed, guessed or not."""
    return sum(each.forwards["commit"] + each.forwards["guessed_commit"] for each in generations)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with one_line():
        main()
