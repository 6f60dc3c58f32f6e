"""The layer view: forwards across, layers up, each cell run, reused or skipped."""

from __future__ import annotations

from collections.abc import Sequence

from fast_dllm.decoding import FORWARD_KINDS, GUESSED_KINDS
from fast_dllm.ui.chat import AnswerFrame
from fast_dllm.ui.guesses import guesses_html

COLOURS = {"run": "#4f46e5", "reused": "#f59e0b", "skipped": "#cbd5e1", "guessed": "#10b981"}
MEANINGS = {
    "run": "the layer ran",
    "reused": "its earlier result was used again",
    "skipped": "not needed, because nothing below it changed",
    "guessed": "it ran in an earlier forward, as a guess that was right",
}
# what stands under a column, by kind of forward: one character each, no two alike
SIGNS = {
    "prefill": "p", "full": "f", "sub": "s", "partial": "◐", "reused": "r", "guessed": "g", "commit": "c",
    "guessed_commit": "k",
}  # fmt: skip
HEIGHT, GAP = 5, 1  # of a cell, in pixels; between two
NARROW, WIDE, ALL = 11, 28, 560  # of a column: the least, the most, and what all have together where they can
TOP, LEFT = 4, 22


def layer_states(frame: AnswerFrame) -> list[tuple[range, str]]:
    """What each layer did in the frame's forward, from the lowest up, as ranges of equal state.

    A step that reads the last predictions again runs no layer. The layers of the policy's subset are then "reused". The
    others would give their last results again, so that they are "skipped". A guess that was right is "guessed".
    """
    everything = range(frame.num_layers)
    if frame.kind in GUESSED_KINDS.values():
        return [(everything, "guessed")]
    if FORWARD_KINDS[frame.kind].runs_layers:
        resting, rest = frame.layers_at_rest, "run"
    else:
        resting, rest = frame.subset, "skipped"
    if not resting:
        return [(everything, rest)]
    parts = [
        (range(resting.start), rest),
        (resting, "reused"),
        (range(resting.stop, everything.stop), rest),
    ]
    return [(layers, state) for layers, state in parts if layers]


def layers_html(frames: Sequence[AnswerFrame], step: int | None = None, linked: bool = True) -> str:
    """Every forward of an answer; `step`, counted from 1, is the one marked (default: the last). `linked`: a tap
    on a column, or an arrow key, chooses the forward to replay."""
    if not frames:
        return "<div class='layers'><div class='stats'>Which layers run in each forward of the answer.</div></div>"
    step = min(len(frames) if step is None else step, len(frames))
    num_layers, width = frames[0].num_layers, max(NARROW, min(WIDE, ALL // len(frames)))
    height, bottom = num_layers * (HEIGHT + GAP), TOP + num_layers * (HEIGHT + GAP)
    parts = [
        f"<text x='{LEFT - 4}' y='{TOP + 8}' text-anchor='end'>{num_layers - 1}</text>",
        f"<text x='{LEFT - 4}' y='{bottom}' text-anchor='end'>0</text>",
    ]
    for number, frame in enumerate(frames, 1):
        x = LEFT + (number - 1) * (width + GAP)
        marks = [
            f"<rect class='{state}' x='{x}' y='{bottom - layers.stop * (HEIGHT + GAP)}' width='{width}' "
            f"height='{len(layers) * (HEIGHT + GAP) - GAP}' fill='{COLOURS[state]}'/>"
            for layers, state in layer_states(frame)
        ]
        marks.append(f"<text x='{x + width / 2}' y='{bottom + 11}' text-anchor='middle'>{SIGNS[frame.kind]}</text>")
        description = f"{number}: {_description(frames, number)}"
        # the Tab key goes to the marked column, the arrow keys from there to the others (style.CHOOSE_STEP)
        keys = f" role='button' tabindex='{0 if number == step else -1}' aria-label='{description}'" if linked else ""
        parts.append(f"<g data-step='{number}'{keys}><title>{description}</title>{''.join(marks)}</g>")
    lines = "".join(  # one line a layer, over the joined rectangles
        f"<line x1='{LEFT}' x2='{LEFT + len(frames) * (width + GAP)}' y1='{y}' y2='{y}'/>"
        for y in range(TOP + HEIGHT, bottom, HEIGHT + GAP)
    )
    x = LEFT + (step - 1) * (width + GAP) - 1
    at = f"<rect class='at' x='{x}' y='{TOP - 2}' width='{width + 2}' height='{height + 16}' rx='2'/>"
    at, tap = (at, "; tap one, or move with the arrow keys") if linked else ("", "")
    size = f"width='{LEFT + len(frames) * (width + GAP) + 6}' height='{bottom + 18}'"
    role = "group" if linked else "img"
    shown = frames[step - 1]
    where = f"{step} of {len(frames)}: {_description(frames, step)} · so far: " if linked else ""
    return (
        f"<div class='layers'><b>Layers</b> (up) of every forward (across{tap})<div class='scroll'>"
        f"<svg {size} role='{role}' aria-label='layers run in each forward'>{''.join(parts)}{lines}{at}</svg></div>"
        f"<div class='legend'>{_legend(frames)}</div>"
        f"<div class='stats'>{where}{shown.num_forwards} forwards, {shown.layer_forwards:,.0f} layer-forwards "
        f"({num_layers * shown.number:,} if every layer ran in every column)</div>"
        f"{_guesses(frames, step) if linked else ''}</div>"
    )


def _description(frames: Sequence[AnswerFrame], number: int) -> str:
    """What the frame of this number, counted from 1, shows in words."""
    frame = frames[number - 1]
    states = ", ".join(
        f"layers {layers.start}-{layers.stop - 1} {state}" if len(layers) > 1 else f"layer {layers.start} {state}"
        for layers, state in layer_states(frame)
    )
    guesses = ""
    if frame.guesses and FORWARD_KINDS[frame.kind].runs_layers:
        used = _used_guesses(frames, number)
        guesses = f"; with {len(frame.guesses)} guesses of later forwards, of which {len(used)} were used"
    return f"{frame.kind} ({FORWARD_KINDS[frame.kind].meaning}); {states}{guesses}"


def _next_forward(frames: Sequence[AnswerFrame], number: int) -> int | None:
    """The number of the first frame after this one whose forward runs layers; None where there is none yet."""
    later = range(number + 1, len(frames) + 1)
    return next((each for each in later if FORWARD_KINDS[frames[each - 1].kind].runs_layers), None)


def _used_guesses(frames: Sequence[AnswerFrame], number: int) -> list[int]:
    """Which guesses of the forward of this number were used, counted from 0, in order."""
    until_next = frames[number : (_next_forward(frames, number) or len(frames) + 1) - 1]
    return [frame.used_guess for frame in until_next if frame.used_guess is not None]


def _guesses(frames: Sequence[AnswerFrame], step: int) -> str:
    """The guesses of the step's forward, or of the forward in which the step ran as a guess."""
    number = step
    while number > 1 and not FORWARD_KINDS[frames[number - 1].kind].runs_layers:
        number -= 1
    is_known = frames[-1].done or _next_forward(frames, number) is not None
    shown = frames[step - 1]
    return guesses_html(number, shown.guesses, _used_guesses(frames, number), shown.used_guess, is_known)


def _legend(frames: Sequence[AnswerFrame]) -> str:
    states = [
        f"<span><i class='c' style='background:{COLOURS[state]}'>&nbsp;</i> {state}: {meaning}</span>"
        for state, meaning in MEANINGS.items()
    ]
    kinds = dict.fromkeys(frame.kind for frame in frames)
    return " ".join(states) + " <span>" + ", ".join(f"{SIGNS[kind]} {kind}" for kind in kinds) + "</span>"
