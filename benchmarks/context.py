"""What a forward and a token cost against the context's length and the batch: a table, a picture, a JSON line last.

    python -m benchmarks.context                                  # the embedded model
    python -m benchmarks.context --random_weights 36x64 --contexts 512,2048 --batches 1,8
    python -m benchmarks.context --picture docs/pictures/context.png

A forward runs the 32 rows of a block, or the 8 of a sub-block, behind a context of that many tokens in the cache. The
time of a token is that of a full forward over its batch, if each step unmasks one. A straight line a + b x context is
fitted to the times of each batch by least squares of the relative error. b is the cost of one more token of context; it
is printed beside the time of attention's multiplications for it, at the rate of the linear layers' products.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.guard import one_line

# isort: split
import numpy as np
import torch

from benchmarks.common import check_options, median_seconds, model_of
from fast_dllm.errors import OneLineParser, UsageError
from fast_dllm.network.eager import EagerExecutor
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.packing import BlockRows
from fast_dllm.network.threads import fit_threads

KINDS = {"full": 32, "sub": 8}


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder, hub id or tiny")
    parser.add_argument("--random_weights", metavar="SHAPE", help="as in benchmarks.decode")
    parser.add_argument("--contexts", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--batches", default="1,4,16,32")
    parser.add_argument("--most_positions", type=int, default=131072, help="of a batch: larger pairs are left out")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    for name in ("contexts", "batches"):
        words = getattr(arguments, name).split(",")
        if not all(word.isdecimal() and int(word) for word in words):
            raise UsageError(f"--{name} takes whole numbers from 1, with commas, not {getattr(arguments, name)!r}")
        setattr(arguments, name, sorted({int(word) for word in words}))
    check_options(arguments, "runs")
    if arguments.picture and arguments.picture.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--picture must end in .png, .svg or .pdf, not {str(arguments.picture)!r}")
    return arguments


@torch.inference_mode()
def seconds_of(model: FastDLLMForCausalLM, context: int, batch: int, runs: int) -> dict[str, float]:
    """Seconds of a step of each kind: the forward, and what eight of its rows predict."""
    block = model.config.bd_size
    length = max(context // block, 1) * block
    executor = EagerExecutor(model, model.new_cache(batch, length + block, block))
    cache = executor.cache
    cache.keys.normal_(std=0.1)
    cache.values.normal_(std=0.1)
    cache.lengths = [length] * batch
    rows, read = list(range(batch)), [list(range(8))] * batch
    seconds = {}
    for kind, width in KINDS.items():

        def step(width: int = width) -> None:
            logits = executor.run_block(BlockRows(rows, [list(range(3, 3 + width))] * batch, [0] * batch, read))
            executor.greedy(logits.flatten(0, 1), model.config.vocab_size - 1).tolist()

        seconds[kind] = median_seconds(step, runs, model.device)
    return seconds


@torch.inference_mode()
def product_rate(model: FastDLLMForCausalLM, rows: int, runs: int) -> float:
    """Multiplications with addition a second of a layer's gate product at that many rows."""
    gate: Any = model.model.layers[0].mlp
    x = torch.randn(rows, gate.gate_proj.in_features, dtype=model.dtype, device=model.device)
    weight = gate.gate_proj.weight
    return rows * weight.numel() / median_seconds(lambda: x @ weight.T, runs * 5, model.device)


def line_through(contexts: list[int], seconds: list[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * context, by least squares of the relative error."""
    weights = 1 / np.array(seconds)
    design = np.stack([np.ones(len(contexts)), np.array(contexts, dtype=float)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design * weights[:, None], np.ones(len(contexts)), rcond=None)
    return float(a), float(b)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Left ms of a forward, right ms a token, against the context, both axes logarithmic; a line a batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    batches = sorted({row["batch"] for row in rows})
    shades = [str(0.65 * index / max(len(batches) - 1, 1)) for index in range(len(batches))]
    for batch, shade, marker in zip(batches, shades, "osD^vP*X" * len(batches), strict=False):
        rows_of_batch = [row for row in rows if row["batch"] == batch]
        contexts = [row["context"] for row in rows_of_batch]
        for kind, style in (("full", "-"), ("sub", "--")):
            label = f"{batch}" if kind == "full" else None
            left.plot(
                contexts,
                [row[kind] * 1e3 for row in rows_of_batch],
                style,
                marker=marker,
                ms=4,
                color=shade,
                label=label,
            )
        right.plot(
            contexts, [row["full"] * 1e3 / batch for row in rows_of_batch], "-", marker=marker, ms=4, color=shade
        )
    for axes, what in ((left, "ms per forward, 32 rows (dashed: 8)"), (right, "ms per token, one per step")):
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=what)
        axes.set_xticks(sorted({row["context"] for row in rows}))
        axes.set_xticklabels([f"{value / 1024:g}k" for value in sorted({row["context"] for row in rows})])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    names = [f"{label} sequence{'s' if label != '1' else ''}" for label in labels]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def main() -> None:
    arguments = parse_arguments()
    model = model_of(arguments)
    device = model.device
    threads = fit_threads(model)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, *arguments.contexts) + 64
    name = arguments.random_weights or arguments.model
    where = (
        f"a CPU, {threads} thread{'s' if threads > 1 else ''}"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device)
    )
    print(f"{name} on {where}, {str(model.dtype)[6:]}; medians of {arguments.runs}")
    print(f"{'batch':>5} {'context':>8} {'full ms':>9} {'sub ms':>9} {'ms a token':>11}")
    rows: list[dict[str, Any]] = []
    for batch in arguments.batches:
        for context in arguments.contexts:
            if batch * context > arguments.most_positions:
                continue
            row = {"batch": batch, "context": context, **seconds_of(model, context, batch, arguments.runs)}
            rows.append(row)
            full, sub = row["full"] * 1e3, row["sub"] * 1e3
            print(f"{batch:5} {context:8} {full:9.2f} {sub:9.2f} {full / batch:11.3f}", flush=True)
    config = model.config
    lines = {}
    for batch in arguments.batches:
        rows_of_batch = [row for row in rows if row["batch"] == batch]
        if len(rows_of_batch) < 2:
            continue
        a, b = line_through([row["context"] for row in rows_of_batch], [row["full"] for row in rows_of_batch])
        attention = 2 * KINDS["full"] * config.hidden_size * config.num_hidden_layers * batch
        predicted = attention / product_rate(model, KINDS["full"] * batch, arguments.runs)
        lines[batch] = {"at_no_context": a, "per_token_of_context": b, "predicted_per_token": predicted}
        print(
            f"batch {batch}: full forward {a * 1e3:.2f} ms + {b * 1e6:.2f} us a token of context, doubled at "
            f"{a / b:.0f} tokens; attention's multiplications at the products' rate: {predicted * 1e6:.2f} us"
        )
    if arguments.picture:
        draw(rows, f"{name} on {where}", arguments.picture)
    settings = {**vars(arguments), "picture": str(arguments.picture or "")}
    print(json.dumps({"settings": settings, "where": where, "rows": rows, "lines": lines}))


if __name__ == "__main__":
    with one_line():
        main()
