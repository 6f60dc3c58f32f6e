"""The widgets of the page's settings: those of all experiments, and one for each knob of an experiment's Options."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import gradio as gr

from fast_dllm.decode import experiments
from fast_dllm.ui.chat import Chatbot, ChatSettings

ACTIVE = "active file"
NO_VALUE = "none"
# Knobs that all experiments have; the page has one fixed control for each.
COMMON = ("threshold", "small_block_size", "max_new_tokens")


@functools.cache
def policies() -> list[str]:
    """The experiments that the page offers, listed once, because the controls are built for these."""
    return [ACTIVE, *experiments.available()]


@functools.cache
def load_policy(shown: str) -> experiments.Experiment:
    """The policy of an entry of the experiments' list."""
    return experiments.load(None if shown == ACTIVE else shown)


def knobs_of(shown: str) -> dict[str, object]:
    """The knobs of a policy that are not in COMMON, with their defaults."""
    return {name: value for name, value in load_policy(shown).model_arguments.items() if name not in COMMON}


@functools.cache
def knob_help(shown: str) -> dict[str, str]:
    """Knob -> its meaning, from the docstrings of the policy's Options and of their base classes.

    A docstring explains a knob as `name: text` or `name, name: text`, up to the next one.
    """
    options_type = load_policy(shown).options_type
    names = "|".join(map(re.escape, load_policy(shown).knobs))
    starts = re.compile(rf"(?:^|(?<=[.;)] ))((?:{names}|{'|'.join(experiments.REQUIRED)})(?:, \w+)*): ")
    meanings: dict[str, str] = {}
    for each in reversed(options_type.__mro__):
        docstring = " ".join((each.__dict__.get("__doc__") or "").split())
        _, *parts = starts.split(docstring)
        for knobs, meaning in zip(parts[::2], parts[1::2], strict=True):
            meanings.update(dict.fromkeys(knobs.split(", "), meaning.strip()))
    return meanings


def read_settings(experiment, threshold, sub_block, temperature, top_p, budget, *knobs) -> ChatSettings:
    """The settings that the page's controls have. knobs: the values of the knobs of all policies, as in `controls`.

    Raises UsageError for a value out of range and for an empty control.
    """
    chosen_knobs = {}
    values = iter(knobs)
    for shown in policies():
        knob_values = {name: next(values) for name in knobs_of(shown)}
        if shown == experiment:
            chosen_knobs = {name: None if value == NO_VALUE else value for name, value in knob_values.items()}
    return ChatSettings.parse(
        experiment_name=None if experiment == ACTIVE else experiment,
        threshold=threshold,
        small_block_size=sub_block,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=budget,
        **chosen_knobs,
    )


def control_values(settings: ChatSettings) -> list:
    """The values that the controls have for these settings, in the order of `controls`."""
    experiment = settings.experiment_name or ACTIVE
    knob_values = []
    for shown in policies():
        values = settings.knobs if shown == experiment else knobs_of(shown)
        knob_values += [NO_VALUE if values[name] is None else values[name] for name in knobs_of(shown)]
    knobs = settings.knobs
    shared = [knobs["threshold"], knobs["small_block_size"], settings.temperature, settings.top_p]
    return [experiment, *shared, knobs["max_new_tokens"], *knob_values]


def in_words(settings: ChatSettings) -> str:
    """The experiment, the threshold, and the experiment's knobs that are not at their defaults, on one line."""
    defaults = knobs_of(settings.experiment_name or ACTIVE)
    changed_knobs = {
        name: settings.knobs[name] for name, default in defaults.items() if settings.knobs[name] != default
    }
    shown_knobs = {"threshold": settings.knobs["threshold"], **changed_knobs}
    words = (
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown_knobs.items()
    )
    return f"{settings.experiment_name or ACTIVE}, {', '.join(words)}"


def controls(chatbot: Chatbot) -> list:
    """The settings' widgets, in the order of `read_settings`."""
    start = chatbot.default_settings()
    now = start.experiment_name or ACTIVE
    meanings = knob_help(now)
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if chatbot.block_size % size == 0]
    with gr.Row():
        experiment = gr.Dropdown(
            policies(),
            value=now,
            label="experiment",
            info="the policy that decides what each step computes",
            elem_id="experiment",
        )
        sub_block = gr.Dropdown(
            sizes,
            value=start.knobs["small_block_size"],
            label="sub-block size",
            info=f"tokens; must divide the block of {chatbot.block_size}",
        )
    knobs, rows = [], []
    for shown in policies():
        values = start.knobs if shown == now else knobs_of(shown)
        with gr.Row(visible=shown == now) as row:
            knobs += [knob_control(shown, name, values[name]) for name in knobs_of(shown)]
        rows.append(row)
    experiment.change(lambda picked: [gr.Row(visible=shown == picked) for shown in policies()], experiment, rows)
    # Numbers have no bounds here, because gradio silently changes a value out of range. `read_settings` refuses it.
    with gr.Row():
        threshold = gr.Number(
            start.knobs["threshold"], label="threshold", info=meanings.get("threshold"), elem_id="threshold"
        )
        temperature = gr.Number(
            start.temperature, label="temperature", info="0: the likeliest token; above: tokens are drawn at random"
        )
        top_p = gr.Number(
            start.top_p,
            label="top-p",
            info="tokens are drawn from the likeliest ones that have this probability together",
        )
        budget = gr.Number(
            min(start.knobs["max_new_tokens"], chatbot.max_length // 2),
            label="new-token budget",
            info=f"the longest answer in tokens, in whole blocks of {chatbot.block_size}",
            elem_id="budget",
        )
    return [experiment, threshold, sub_block, temperature, top_p, budget, *knobs]


def knob_control(shown: str, name: str, value: Any):
    """A control for one knob: a list if the policy has CHOICES for it, else by the type of its value."""
    offered: Sequence[Any] = load_policy(shown).options_type.CHOICES.get(name, ())
    named: dict[str, Any] = {"label": name, "info": knob_help(shown).get(name)}
    if offered:
        words = [NO_VALUE if choice is None else choice for choice in offered]
        return gr.Dropdown(words, value=NO_VALUE if value is None else value, allow_custom_value=True, **named)
    if isinstance(value, bool):
        return gr.Checkbox(value, **named)
    if isinstance(value, (int, float)):
        return gr.Number(value, **named)
    return gr.Textbox(NO_VALUE if value is None else str(value), **named)
