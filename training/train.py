"""Train models/tiny: autoregressive start, block diffusion in a shallow network, then wider words and a deep one.

    python -m training.train --out DIR              # the first stages; the same command again resumes
    python -m training.train --out DIR --export FOLDER
    python -m training.train --out DIR2 --start FOLDER      # the further stages: wider words, layers that all work
    python -m training.train --out DIR2 --start FOLDER --export models/tiny

Deterministic: step n of a stage draws its examples from the seed, the stage and n, so an interrupted run goes on as if
it had not been. On a GPU it uses the GPU. DIR holds checkpoint.pt, one STAGE.pt for each finished stage and log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fast_dllm.errors import UsageError
from fast_dllm.network.loading import load_model
from fast_dllm.network.model import FastDLLMForCausalLM
from fast_dllm.network.tokenizer import load_tokenizer
from training.data import Batch, autoregressive_batches, diffusion_batches, make_examples
from training.optim import make_optimizers
from training.recipe import FURTHER, RECIPES, SEED, WINDOW, Stage, tiny_config
from training.tokenizer import build_tokenizer

EMA_DECAY = 0.99  # of the weight average; the averaged weights are what a stage hands on and what is exported
LOG_EVERY, SAVE_EVERY = 10, 100
MAX_LENGTH = 2048


def initialise(model: FastDLLMForCausalLM, seed: int) -> None:
    """Normal weights of 1 / sqrt(inputs); what is written to the residual stream is smaller the deeper the network."""
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale *= depth_scale
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        elif name.endswith("bias"):
            parameter.data.zero_()


def grown_position(layer: int, layers: int, new_layers: int) -> int:
    """Where layer `layer` of a network stands after growth: spread evenly, the last one last."""
    return (layer + 1) * new_layers // layers - 1


def grow(weights: dict[str, Tensor], layers: int, model: FastDLLMForCausalLM, seed: int) -> None:
    """Load the weights of a network of `layers` layers into a deeper one that computes the same.

    An inserted layer is initialised like any other except that what it writes to the residual stream is zero, so the
    function is preserved exactly and all of its weights still receive a gradient once the zeros have moved.
    """
    new_layers = model.config.num_hidden_layers
    initialise(model, seed)
    state = model.state_dict()
    kept = {grown_position(layer, layers, new_layers): layer for layer in range(layers)}
    for name, parameter in state.items():
        parts = name.split(".")
        if "layers" not in parts:
            parameter.copy_(weights[name])
            continue
        index = parts.index("layers") + 1
        source = kept.get(int(parts[index]))
        if source is not None:
            parts[index] = str(source)
            parameter.copy_(weights[".".join(parts)])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()


def split(weights: dict[str, Tensor], layers: int, model: FastDLLMForCausalLM) -> None:
    """Load the weights of a network of `layers` layers into one of a multiple of them, all of which work.

    Each layer becomes several equal ones, each of which writes its share of the output to the residual stream. That
    preserves the function as far as they see the same input, which they do not quite: a short training heals it.
    """
    parts, rest = divmod(model.config.num_hidden_layers, layers)
    if rest:
        raise ValueError(f"{model.config.num_hidden_layers} layers are no multiple of {layers}")
    for name, parameter in model.state_dict().items():
        words = name.split(".")
        if "layers" in words:
            index = words.index("layers") + 1
            words[index] = str(int(words[index]) // parts)
        share = parts if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        parameter.copy_(weights[".".join(words)] / share)


def shrink(weights: dict[str, Tensor], layers: int, fewer: int) -> dict[str, Tensor]:
    """The layers of a network of `layers` that `grow` kept when it made them of `fewer`: the trained ones alone."""
    kept = {grown_position(layer, fewer, layers): layer for layer in range(fewer)}
    found = {}
    for name, value in weights.items():
        words = name.split(".")
        if "layers" in words:
            index = words.index("layers") + 1
            if int(words[index]) not in kept:
                continue
            words[index] = str(kept[int(words[index])])
        found[".".join(words)] = value
    return found


def read_start(directory: Path, tokenizer, layers: int, seed: int) -> dict[str, Tensor]:
    """The trained layers of a finished checkpoint, as `layers` layers, its vocabulary made that of `tokenizer`.

    A word that the checkpoint does not know begins near the mean of those that it knows.
    """
    model = load_model(str(directory), device="cpu").float()
    old = load_tokenizer(str(directory)).get_vocab()
    weights = shrink(model.state_dict(), model.config.num_hidden_layers, layers)
    known = weights["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(seed)
    rows = known.mean(0) + 0.5 * known.std(0) * torch.randn(len(tokenizer), known.shape[1], generator=generator)
    for word, index in tokenizer.get_vocab().items():
        if word in old:
            rows[index] = known[old[word]]
    return {name: rows if "embed_tokens" in name or "lm_head" in name else value for name, value in weights.items()}


def stage_batches(stage: Stage, step: int, tokenizer, seed: int, block_size: int) -> Iterator[Batch]:
    """The micro-batches of one step."""
    rng = random.Random(f"{seed} {stage.name} {step}")
    examples = make_examples(tokenizer, rng, stage.batch, stage.choice_share, stage.num_steps_shares, stage.wide_share)
    if stage.objective == "ar":
        return autoregressive_batches(examples, tokenizer.eos_token_id)
    return diffusion_batches(examples, tokenizer, rng, block_size, WINDOW, stage.uniform_share, stage.ahead_weight)


def backward(model: FastDLLMForCausalLM, batches: list[Batch]) -> tuple[float, float]:
    """Accumulate the gradient of the weighted mean loss; returns it and the share of right predictions (weight 1)."""
    device = model.device
    total = sum(float(batch.weights.sum()) for batch in batches)
    loss_sum, right, counted = 0.0, 0.0, 0.0
    for batch in (batch.to(device) for batch in batches):
        logits = model(batch.ids, batch.mask, batch.positions, rows=batch.rows).logits
        losses = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.weights.flatten()).sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
        read = batch.weights >= 1.0
        right += float((logits.argmax(-1) == batch.targets)[read].sum())
        counted += float(read.sum())
    return loss_sum, right / max(1.0, counted)


def tokenizer_of(stages: tuple[Stage, ...], max_length: int):
    """The tokenizer of a model that these stages train."""
    return build_tokenizer(max_length, wide=any(stage.wide_share for stage in stages))


class Trainer:
    """The state of a run: which stage and step, the network, its optimizers and the average of its weights."""

    def __init__(
        self,
        out: Path,
        stages: tuple[Stage, ...],
        seed: int,
        device: str,
        optimizer: str,
        max_length: int,
        start: Path | None = None,
    ):
        """start: a finished checkpoint whose trained layers the first stage goes on from (None: fresh weights)."""
        self.out, self.stages, self.seed, self.device = out, stages, seed, device
        self.optimizer_name = optimizer
        self.tokenizer = tokenizer_of(stages, max_length)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location=device, weights_only=True)
            self.start_stage(saved["stage"])
            self.step = saved["step"]
            self.model.load_state_dict(saved["model"])
            self.average = saved["average"]
            for own, state in zip(self.optimizers, saved["optimizers"], strict=True):
                own.load_state_dict(state)
        elif start is not None:
            self.start_stage(0, read_start(start, self.tokenizer, stages[0].layers, seed), stages[0].layers)
        else:
            self.start_stage(0)

    def start_stage(self, index: int, weights: dict[str, Tensor] | None = None, layers: int = 0) -> None:
        """Begin stage `index` from the weights of a network of `layers` (None: fresh, or about to be loaded)."""
        self.stage_index, self.step = index, 0
        stage = self.stages[index]
        self.model = FastDLLMForCausalLM(tiny_config(self.tokenizer, stage.layers)).to(self.device).train()
        if weights is None:
            initialise(self.model, self.seed)
        elif stage.growth == "split":
            split(weights, layers, self.model)
        else:
            grow(weights, layers, self.model, self.seed)
        self.optimizers = make_optimizers(self.model, self.optimizer_name, stage.lr)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns loss and share of right predictions."""
        stage = self.stages[self.stage_index]
        batches = list(stage_batches(stage, self.step, self.tokenizer, self.seed, self.model.config.bd_size))
        loss, accuracy = backward(self.model, batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.lr_at(self.step)
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        self.step += 1
        return loss, accuracy

    def save(self) -> None:
        """Write checkpoint.pt so that an interruption leaves either the old or the new one."""
        state = {
            "stage": self.stage_index,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def run(self) -> None:
        """All remaining steps of all remaining stages."""
        while True:
            stage = self.stages[self.stage_index]
            self.run_stage(stage)
            torch.save(self.average, self.out / f"{stage.name}.pt")
            if self.stage_index + 1 == len(self.stages):
                self.save()
                return
            self.start_stage(self.stage_index + 1, self.average, stage.layers)
            self.save()

    def run_stage(self, stage: Stage) -> None:
        started, first, loss_sum, accuracy_sum, counted = time.monotonic(), self.step, 0.0, 0.0, 0
        while self.step < stage.steps:
            loss, accuracy = self.train_step()
            loss_sum, accuracy_sum, counted = loss_sum + loss, accuracy_sum + accuracy, counted + 1
            if self.step % LOG_EVERY == 0 or self.step == stage.steps:
                seconds = (time.monotonic() - started) / (self.step - first)
                entry = {"stage": stage.name, "step": self.step, "loss": round(loss_sum / counted, 5),
                         "accuracy": round(accuracy_sum / counted, 5), "lr": stage.lr_at(self.step - 1),
                         "seconds_per_step": round(seconds, 3)}  # fmt: skip
                loss_sum, accuracy_sum, counted = 0.0, 0.0, 0
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(entry) + "\n")
                minutes = seconds * (stage.steps - self.step) / 60
                print(f"{stage.name} {self.step}/{stage.steps}  loss {entry['loss']:.4f}  right {entry['accuracy']:.4f}"
                      f"  lr {entry['lr']:.2e}  {seconds:.2f} s/step  {minutes:.0f} min left", flush=True)  # fmt: skip
            if self.step % SAVE_EVERY == 0:
                self.save()


def export(out: Path, directory: Path, stages: tuple[Stage, ...], max_length: int) -> None:
    """Write the averaged weights of the finished last stage as a checkpoint in bfloat16, with its tokenizer."""
    stage = stages[-1]
    weights = out / f"{stage.name}.pt"
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist: the last stage is not finished")
    tokenizer = tokenizer_of(stages, max_length)
    model = FastDLLMForCausalLM(tiny_config(tokenizer, stage.layers))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of checkpoints and log.jsonl")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the finished model here instead of training")
    parser.add_argument("--recipe", choices=RECIPES, default="tiny", help="which stages of recipe.py (default tiny)")
    parser.add_argument("--start", type=Path, metavar="MODEL", help="go on from this model by tiny's further stages")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every stage's number of steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads < 1 or args.scale <= 0:
        print("training.train: --threads must be at least 1 and --scale positive", file=sys.stderr)
        return 2
    if args.start and args.recipe != "tiny":
        print("training.train: --start goes on with the further stages of the recipe tiny alone", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    recipe = FURTHER if args.start else RECIPES[args.recipe]
    stages = tuple(replace(stage, steps=max(1, round(stage.steps * args.scale))) for stage in recipe)
    try:
        if args.export:
            export(args.out, args.export, stages, MAX_LENGTH)
        else:
            Trainer(args.out, stages, args.seed, args.device, args.optimizer, MAX_LENGTH, args.start).run()
    except (FileNotFoundError, UsageError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
