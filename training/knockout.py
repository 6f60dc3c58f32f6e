"""What each layer of a small model is good for: the loss with that layer taken out, on fresh problems.

    python -m training.knockout --model tiny [--examples 200] [--wording wide] [--output FILE]

The problems are of the training split and drawn for this alone; they are masked as decoding meets them
(training/data.py), and counted are the answer's rows that decoding reads. A layer is taken out by writing nothing
to the residual stream. Prints a table in Markdown: a line a layer, then the thirds that the experiments skip; --output
keeps it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fast_dllm.errors import UsageError
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import load_tokenizer
from tasks.toy.problems import WORDINGS
from training.data import Batch, diffusion_batches, make_examples
from training.recipe import AHEAD_WEIGHT, WINDOW

SEED = "knockout"


@contextmanager
def without(model: FastDLLMForCausalLM, layers: Iterable[int]) -> Iterator[None]:
    """The model with these layers writing nothing to the residual stream: each gives what it got."""
    kept = []
    for layer in layers:
        block = model.model.layers[layer]
        for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            kept.append((matrix, matrix.data))
            matrix.data = torch.zeros_like(matrix)
    try:
        yield
    finally:
        for matrix, data in kept:
            matrix.data = data


@torch.no_grad()
def measure(model: FastDLLMForCausalLM, batches: list[Batch]) -> tuple[float, float]:
    """(mean loss in nats, share predicted right) of the answers' masked rows that decoding reads."""
    loss, right, counted = 0.0, 0.0, 0
    for batch in batches:
        logits = model(batch.ids, batch.mask, batch.positions, rows=batch.rows).logits
        read = (batch.weights >= 1.0).flatten()
        losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss += float(losses[read].sum())
        right += float((logits.flatten(0, 1).argmax(-1) == batch.targets.flatten())[read].sum())
        counted += int(read.sum())
    return loss / counted, right / counted


def thirds(layers: int) -> dict[str, range]:
    """The subsets of the layer-reuse experiments; the first layer belongs to none."""
    third = layers // 3
    return {"first": range(1, third), "middle": range(third, 2 * third), "last": range(2 * third, layers)}


def knock_out(model: FastDLLMForCausalLM, tokenizer, examples: int, wording: str) -> dict[str, tuple[float, float]]:
    """{"none", "0", "1", ..., "first", "middle", "last": (loss, right)} with that much taken out."""
    rng = random.Random(f"{SEED} {wording}")
    drawn = make_examples(tokenizer, rng, examples, 0.0, wide_share=float(wording == "wide"))
    batches = list(
        diffusion_batches(
            drawn, tokenizer, rng, model.config.bd_size, WINDOW, uniform_share=0.0, ahead_weight=AHEAD_WEIGHT
        )
    )
    layers = model.config.num_hidden_layers
    taken = {"none": range(0), **{str(layer): (layer,) for layer in range(layers)}, **thirds(layers)}
    found = {}
    for name, out in taken.items():
        with without(model, out):
            found[name] = measure(model, batches)
    return found


def table(found: dict[str, tuple[float, float]]) -> str:
    lines = ["| without | loss | predicted right |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {loss:.3f} | {right:.1%} |" for name, (loss, right) in found.items()])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.knockout", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a model of training/ (default: the embedded one)")
    parser.add_argument("--examples", type=int, default=200, help="problems (default 200)")
    parser.add_argument("--wording", choices=[name for name in WORDINGS if name != "held_out"], default="classic")
    parser.add_argument("--output", type=Path, help="keep the figures here, as JSON")
    args = parser.parse_args(argv)
    if args.examples < 1:
        print("training.knockout: --examples must be at least 1", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        model, tokenizer = load_model(args.model, device="cpu").float().eval(), load_tokenizer(args.model)
    except UsageError as error:
        print(f"training.knockout: {error}", file=sys.stderr)
        return 2
    found = knock_out(model, tokenizer, args.examples, args.wording)
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
