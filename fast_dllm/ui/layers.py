"""The layer view: forwards across, layers up, each cell run, reused or skipped."""

from __future__ import annotations

from collections.abc import Sequence

from fast_dllm.decoding import FORWARD_KINDS
from fast_dllm.ui.chat import Frame

COLOURS = {"run": "#4f46e5", "reused": "#f59e0b", "skipped": "#cbd5e1"}
MEANINGS = {
    "run": "it ran",
    "reused": "what it gave earlier stands in",
    "skipped": "not needed: nothing below it changed",
}
HEIGHT, GAP = 5, 1  # of a cell, in pixels; between two
NARROW, WIDE, ALL = 11, 28, 560  # of a column: the least, the most, and what all have together where they can
TOP, LEFT = 4, 22


def layer_states(frame: Frame) -> list[tuple[range, str]]:
    """What each layer did in the frame's forward, from the lowest up, as ranges of equal state.

    Where a step reads its last predictions again no layer runs: those of the policy's subset are the reused ones, and
    all others would give again what they gave, which is why none is needed.
    """
    everything = range(frame.num_layers)
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


def layers_html(seen: Sequence[Frame], step: int | None = None, linked: bool = True) -> str:
    """Every forward of an answer; `step`, counted from 1, is the one marked (default: the last). `linked`: a replay
    hangs on it."""
    if not seen:
        return "<div class='layers'><div class='stats'>Which layers run in each forward of the answer.</div></div>"
    step = min(len(seen) if step is None else step, len(seen))
    num_layers, width = seen[0].num_layers, max(NARROW, min(WIDE, ALL // len(seen)))
    height, bottom = num_layers * (HEIGHT + GAP), TOP + num_layers * (HEIGHT + GAP)
    parts = [
        f"<text x='{LEFT - 4}' y='{TOP + 8}' text-anchor='end'>{num_layers - 1}</text>",
        f"<text x='{LEFT - 4}' y='{bottom}' text-anchor='end'>0</text>",
    ]
    for number, frame in enumerate(seen, 1):
        x = LEFT + (number - 1) * (width + GAP)
        marks = [
            f"<rect class='{state}' x='{x}' y='{bottom - layers.stop * (HEIGHT + GAP)}' width='{width}' "
            f"height='{len(layers) * (HEIGHT + GAP) - GAP}' fill='{COLOURS[state]}'/>"
            for layers, state in layer_states(frame)
        ]
        marks.append(f"<text x='{x + width / 2}' y='{bottom + 11}' text-anchor='middle'>{frame.kind[0]}</text>")
        parts.append(f"<g data-step='{number}'><title>{number}: {_in_words(frame)}</title>{''.join(marks)}</g>")
    lines = "".join(  # one line a layer, over the joined rectangles
        f"<line x1='{LEFT}' x2='{LEFT + len(seen) * (width + GAP)}' y1='{y}' y2='{y}'/>"
        for y in range(TOP + HEIGHT, bottom, HEIGHT + GAP)
    )
    x = LEFT + (step - 1) * (width + GAP) - 1
    at = f"<rect class='at' x='{x}' y='{TOP - 2}' width='{width + 2}' height='{height + 16}' rx='2'/>"
    at, tap = (at, "; tap one") if linked else ("", "")
    size = f"width='{LEFT + len(seen) * (width + GAP) + 4}' height='{bottom + 18}'"
    shown = seen[step - 1]
    told = (
        f"forward {step} of {len(seen)}: {_in_words(shown)} · layer-forwards so far: " if linked else "layer-forwards: "
    )
    return (
        f"<div class='layers'><b>Layers</b> (up) of every forward (across{tap})<div class='scroll'>"
        f"<svg {size} role='img' aria-label='layers run in each forward'>{''.join(parts)}{lines}{at}</svg></div>"
        f"<div class='legend'>{_legend(seen)}</div>"
        f"<div class='stats'>{told}{shown.layer_forwards:,.0f} of {num_layers * shown.number:,} with every layer each "
        "time</div></div>"
    )


def _in_words(frame: Frame) -> str:
    told = ", ".join(
        f"layers {layers.start}-{layers.stop - 1} {state}" if len(layers) > 1 else f"layer {layers.start} {state}"
        for layers, state in layer_states(frame)
    )
    return f"{frame.kind} ({FORWARD_KINDS[frame.kind].meaning}); {told}"


def _legend(seen: Sequence[Frame]) -> str:
    states = [
        f"<span><i class='c' style='background:{COLOURS[state]}'>&nbsp;</i> {state}: {meaning}</span>"
        for state, meaning in MEANINGS.items()
    ]
    kinds = dict.fromkeys(frame.kind for frame in seen)
    return " ".join(states) + " <span>" + ", ".join(f"{kind[0]} {kind}" for kind in kinds) + "</span>"
