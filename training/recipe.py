"""The recipes: sizes, stages, learning rates. train.py without options, then with `--start`, makes models/tiny."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fast_dllm.network.config import FastDLLMConfig

SEED = 1
EVERY_LAYER = 36  # so that the subsets 1-11, 12-23 and 24-35 of the layer-reuse experiment apply
WINDOW = 8  # rows of a sub-block when decoding
AHEAD_WEIGHT = 0.05  # masked rows right of the current sub-block: decoding with sub-blocks does not read them yet


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` of `batch` fresh examples each, in a network of `layers`.

    The learning rate rises from 0 to `lr` over `warmup` steps, holds, and falls linearly to `lr * final_lr` over the
    last `decay` share of the steps. `objective` is "ar" (autoregressive) or "bd" (block diffusion); `uniform_share`
    is the share of blocks masked by the paper's uniform ratio, the others are masked as decoding meets them;
    `choice_share` is the share of multiple-choice questions among the examples; `num_steps_shares` weighs the problems
    of one, two, ... steps in classic words (None: as in the test); `wide_share` of the problems are told in wide words.
    `growth` is how the stage before's network becomes a deeper one: "insert" (layers that write nothing yet) or "split"
    (each layer becomes equal parts that write a share each). `ahead_weight` is the loss weight of masked rows right of
    the current sub-block; 1 trains them like all others.
    """

    name: str
    objective: str
    layers: int
    steps: int
    batch: int
    lr: float
    warmup: int
    decay: float
    final_lr: float
    uniform_share: float = 0.3
    choice_share: float = 0.2
    num_steps_shares: tuple[float, ...] | None = None
    wide_share: float = 0.0
    growth: str = "insert"
    ahead_weight: float = AHEAD_WEIGHT

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * min(1.0, left))


# From here on one-step problems are always right: fewer of them, and fewer masks that decoding never meets.
HARD = {"choice_share": 0.2, "uniform_share": 0.15, "num_steps_shares": (1, 3, 5)}
STAGES = (
    Stage("ar", "ar", 9, steps=1100, batch=64, lr=6e-3, warmup=40, decay=0.4, final_lr=0.3),
    Stage("choice", "ar", 9, steps=900, batch=64, lr=4e-3, warmup=20, decay=0.3, final_lr=0.5, choice_share=0.6),
    Stage("bd", "bd", 9, steps=200, batch=64, lr=3e-3, warmup=40, decay=0.4, final_lr=1.0, choice_share=0.3),
    Stage("bd-long", "bd", 9, steps=300, batch=64, lr=5e-3, warmup=10, decay=0.5, final_lr=1.0, choice_share=0.25),
    Stage("bd-hard", "bd", 9, steps=850, batch=64, lr=5e-3, warmup=10, decay=0.7, final_lr=0.1, **HARD),
    Stage("bd-anneal", "bd", 9, steps=300, batch=64, lr=1.5e-3, warmup=5, decay=1.0, final_lr=0.0, **HARD),
    Stage("deep", "bd", EVERY_LAYER, steps=100, batch=32, lr=3e-4, warmup=5, decay=1.0, final_lr=0.0, **HARD),
)
# Mostly in wide words, with up to five steps; the others and a few choices, so that nothing is forgotten.
WIDE = {
    "choice_share": 0.12, "uniform_share": 0.15, "num_steps_shares": (1, 3, 5), "wide_share": 0.65, "growth": "split",
}  # fmt: skip
HALF_WIDE = WIDE | {"wide_share": 0.5}
# What `--start` goes on with, from the nine trained layers of the model that the stages above give: words, steps and
# working layers that it lacks. models/tiny has been through all of them.
FURTHER = (
    Stage("wide", "bd", 9, steps=500, batch=64, lr=4e-3, warmup=20, decay=0.5, final_lr=0.4, **WIDE),
    Stage("split", "bd", 18, steps=40, batch=32, lr=2e-3, warmup=5, decay=0.5, final_lr=0.75, **WIDE),
    Stage("split-deep", "bd", EVERY_LAYER, steps=80, batch=32, lr=1.5e-3, warmup=10, decay=0.9, final_lr=0.0, **WIDE),
    Stage("settle", "bd", EVERY_LAYER, steps=100, batch=32, lr=1.2e-3, warmup=5, decay=1.0, final_lr=0.0, **HALF_WIDE),
    Stage("long", "bd", EVERY_LAYER, steps=620, batch=32, lr=1.5e-3, warmup=10, decay=0.8, final_lr=0.0, **HALF_WIDE),
)

# Two subjects for docs/findings.md that are less sure than models/tiny: the first stages, stopped early, in toy_math's
# words only. They share the stage "ar" and differ in one thing: whether rows right of the sub-block are trained fully.
EARLY_MIX = {"choice_share": 0.0, "uniform_share": 0.15, "num_steps_shares": (1, 3, 5)}
EARLY = (
    Stage("ar", "ar", 9, steps=900, batch=64, lr=6e-3, warmup=40, decay=0.4, final_lr=0.3, choice_share=0.0),
    Stage("bd", "bd", 9, steps=300, batch=64, lr=5e-3, warmup=40, decay=0.6, final_lr=0.3, **EARLY_MIX),
    Stage("bd-long", "bd", 9, steps=400, batch=64, lr=4e-3, warmup=10, decay=0.8, final_lr=0.2, **EARLY_MIX),
    Stage(
        "split", "bd", 18, steps=40, batch=32, lr=2e-3, warmup=5, decay=0.5, final_lr=0.75,
        growth="split", **EARLY_MIX,
    ),
    Stage(
        "split-deep", "bd", EVERY_LAYER, steps=100, batch=32, lr=1.5e-3, warmup=10, decay=0.9, final_lr=0.0,
        growth="split", **EARLY_MIX,
    ),
)  # fmt: skip
# Two more, which go on from those for another 200 steps at full depth.
LATER = (
    *EARLY,
    Stage("settle", "bd", EVERY_LAYER, steps=200, batch=32, lr=1.2e-3, warmup=5, decay=1.0, final_lr=0.0, **EARLY_MIX),
)
EARLY_FAR, LATER_FAR = (tuple(replace(stage, ahead_weight=1.0) for stage in stages) for stages in (EARLY, LATER))
RECIPES = {"tiny": STAGES, "early": EARLY, "early_far": EARLY_FAR, "later": LATER, "later_far": LATER_FAR}


def tiny_config(tokenizer, layers: int = EVERY_LAYER) -> FastDLLMConfig:
    """The network of models/tiny, as its config.json has it, with `layers` layers."""
    return FastDLLMConfig(
        architectures=["FastDLLMForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        rope_theta=1e4,
        tie_word_embeddings=True,
        bd_size=32,
        single_turn=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
