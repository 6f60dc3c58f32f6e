"""The replay of an answer: forward by forward, by hand or by a timer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fast_dllm.ui.cells import cells_html
from fast_dllm.ui.chat import AnswerFrame
from fast_dllm.ui.layer_view import layers_html

SKIP: Any = gr.skip()


def replay_slider(frames: list[AnswerFrame]):
    last = max(len(frames), 1)
    return gr.Slider(minimum=1, maximum=max(last, 2), value=last, step=1, interactive=len(frames) > 1)


def replay(step: int, frames: list[AnswerFrame]) -> tuple[int, str, str]:
    """(place, cells, layers) at one forward of the last answer."""
    step = min(int(step), len(frames))
    return step, cells_html(frames[step - 1] if frames else None), layers_html(frames, step)


def choose_step(frames: list[AnswerFrame], event: gr.EventData) -> tuple:
    """(slider, place, cells, layers) for a column of the layer view."""
    step = int(event.step)
    return step, *replay(step, frames)


def play(playing: bool, step: int, frames: list[AnswerFrame], speed: int) -> tuple:
    """(timer, button, whether it plays, slider, place) after the play button: from here, or from the start."""
    if playing or len(frames) < 2:
        return *still(), SKIP
    step = 1 if step >= len(frames) else int(step)
    return gr.Timer(1 / speed, active=True), gr.Button("⏸ Pause"), True, step, step


def still() -> tuple:
    return gr.Timer(active=False), gr.Button("▶ Play"), False, SKIP


def tick(playing: bool, step: int, frames: list[AnswerFrame]) -> tuple:
    """(timer, button, whether it plays, slider, place, cells, layers) one forward later.

    The place is the server's and not the slider's: Clear may have removed the slider's answer while the tick was on its
    way, and the page would show a value beyond the slider's end as an error.
    """
    if not playing or step >= len(frames):
        return *still(), SKIP, SKIP, SKIP
    step += 1
    timer, button, goes_on, _ = (SKIP,) * 4 if step < len(frames) else still()
    return timer, button, goes_on, step, *replay(step, frames)
