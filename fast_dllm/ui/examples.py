"""The page's examples: a question with settings, so that the layer view shows what reuse does."""

from __future__ import annotations

from fast_dllm.ui.chat import Chatbot, load_experiment
from fast_dllm.ui.comparison import PROMPT
from fast_dllm.ui.controls import control_values

# what the examples carry: name -> the settings that differ from those at the start
PRESETS: dict[str, dict[str, object]] = {
    "plain": {"experiment_name": "00_baseline", "reuse_k": 1},
    "k = 3, middle": {"experiment_name": "02_residual_reuse", "reuse_k": 3, "layer_subset": "middle"},
    "re-read while sure": {"experiment_name": "01_adaptive_skip", "reuse_k": None, "reread_above": 0.9},
}
CARDS = (
    "Ann buys 8 boxes of 8 cards each. She makes 23 more. Next she drops 11. How many cards does Ann have in the end?"
)
EXAMPLES = [
    ("plain", "Tom has 12 apples. He buys 7 more. How many apples does he have now?"),
    ("k = 3, middle", PROMPT),
    ("re-read while sure", "Rosa has 35 marbles. Max has 7 more than Rosa. How many marbles do they have together?"),
    ("k = 3, middle", CARDS),
]
OTHER_EXAMPLES = [
    ("plain", "Explain in two sentences why the sky is blue."),
    ("k = 3, middle", "Write a haiku about a tensor."),
]


def examples_of(chatbot: Chatbot) -> tuple[list[list], list[str]]:
    """(values of the message box and of every control, label) of the examples, without presets that this checkout or
    this model cannot run."""
    offered = EXAMPLES if chatbot.model.config.single_turn else [*EXAMPLES, *OTHER_EXAMPLES]
    rows, labels = [], []
    for preset, question in offered:
        try:
            settings = chatbot.default_settings().changed(**PRESETS[preset])
            load_experiment(settings.experiment_name).subset(settings.knobs, chatbot.model.config.num_hidden_layers)
        except ValueError:
            continue
        rows.append([question, *control_values(settings)])
        labels.append(f"{preset}: {question}")
    return rows, labels
