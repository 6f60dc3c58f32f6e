"""The settings' widgets: those that every experiment has, and each experiment's own knobs from its Options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gradio as gr

from fast_dllm.decode import experiments
from fast_dllm.ui.chat import Chatbot, Settings

ACTIVE = "active file"
NO_VALUE = "none"
# settings with a control of their own kind, whatever the experiment
COMMON = ("threshold", "small_block_size", "max_new_tokens")


@functools.cache
def policies() -> list[str]:
    """What the experiment's control offers: what was there when the page was built, for so long its controls fit."""
    return [ACTIVE, *experiments.available()]


@functools.cache
def load_policy(shown: str) -> experiments.Experiment:
    return experiments.load(None if shown == ACTIVE else shown)


def own_knobs(shown: str) -> dict[str, object]:
    """The knobs of a policy that have no control of their own kind, with their defaults."""
    return {name: value for name, value in load_policy(shown).model_arguments.items() if name not in COMMON}


def read_settings(experiment, threshold, sub_block, temperature, top_p, budget, *knobs) -> Settings:
    """The page's controls as checked settings; `knobs` are the values of every policy's own (see `knob_controls`)."""
    own = {}
    values = iter(knobs)
    for shown in policies():
        given = {name: next(values) for name in own_knobs(shown)}
        if shown == experiment:
            own = {name: None if value == NO_VALUE else value for name, value in given.items()}
    return Settings.parse(
        experiment_name=None if experiment == ACTIVE else experiment,
        threshold=threshold,
        small_block_size=int(sub_block),
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=int(budget),
        **own,
    )


def in_words(settings: Settings) -> str:
    """The experiment, the threshold, and the experiment's knobs that are not at their defaults, on one line."""
    defaults = own_knobs(settings.experiment_name or ACTIVE)
    own = {name: settings.knobs[name] for name, default in defaults.items() if settings.knobs[name] != default}
    told = {"threshold": settings.knobs["threshold"], **own}
    words = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in told.items())
    return f"{settings.experiment_name or ACTIVE}, {', '.join(words)}"


def controls(chatbot: Chatbot) -> list:
    """The settings' widgets, in the order of `read_settings`."""
    start = chatbot.default_settings()
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if chatbot.block_size % size == 0]
    with gr.Row():
        experiment = gr.Dropdown(
            policies(), value=start.experiment_name or ACTIVE, label="experiment", elem_id="experiment"
        )
        sub_block = gr.Dropdown(sizes, value=start.knobs["small_block_size"], label="sub-block size")
    knobs, rows = [], []
    for shown in policies():
        chosen = start if shown == (start.experiment_name or ACTIVE) else None
        with gr.Row(visible=chosen is not None) as row:
            for name, default in own_knobs(shown).items():
                knobs.append(knob_control(shown, name, default if chosen is None else chosen.knobs[name]))
        rows.append(row)
    experiment.change(lambda picked: [gr.Row(visible=shown == picked) for shown in policies()], experiment, rows)
    with gr.Row():
        threshold = gr.Slider(0, 1, value=start.knobs["threshold"], step=0.01, label="threshold", elem_id="threshold")
        temperature = gr.Slider(0, 2, value=start.temperature, step=0.05, label="temperature")
        top_p = gr.Slider(0.05, 1, value=start.top_p, step=0.05, label="top-p")
        most = chatbot.max_length // 2
        budget = gr.Slider(
            32,
            most,
            value=min(start.knobs["max_new_tokens"], most),
            step=32,
            label="new-token budget",
            elem_id="budget",
        )
    return [experiment, threshold, sub_block, temperature, top_p, budget, *knobs]


def knob_control(shown: str, name: str, value: Any):
    """A control for one knob: its policy's CHOICES where it names some, else by the kind of its value."""
    offered: Sequence[Any] = load_policy(shown).options_type.CHOICES.get(name, ())
    if offered:
        words = [NO_VALUE if choice is None else choice for choice in offered]
        return gr.Dropdown(words, value=NO_VALUE if value is None else value, label=name, allow_custom_value=True)
    if isinstance(value, bool):
        return gr.Checkbox(value, label=name)
    if isinstance(value, (int, float)):
        return gr.Number(value, label=name)
    return gr.Textbox(NO_VALUE if value is None else str(value), label=name)
