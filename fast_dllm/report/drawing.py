"""What all pictures share: colours, markers, style, an empty figure, and a figure as PNG or SVG.

The number at the start of an experiment's name fixes its colour and its marker, so they are the same in every report.
`png` and `svg` give the same bytes for the same figure.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish. Their yellow is left out: too weak on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B")
MARKERS = "os^DvPX"
COLUMN = 3.5  # inches
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fast_dllm",
    "svg.fonttype": "path",
    "text.usetex": False,
    "text.parse_math": False,  # a `$` in a name is a dollar
}


def style_of(experiment: str) -> tuple[str, str]:
    """(colour, marker) of an experiment: by the number in front of its name, else by the name itself."""
    digits = re.match(r"\d+", experiment)
    number = int(digits[0]) if digits else zlib.crc32(experiment.encode())
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]


def new_figure(height: float, width: float = COLUMN) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def short_name(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def file_name(text: str) -> str:
    """A file name made of letters, digits, `_`, `-` and `.`. If that changes the name, a hash keeps it unique."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "x"
    return safe if safe == text else f"{safe}_{zlib.crc32(text.encode()):08x}"


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=220, metadata={"Software": None})
    return file.getvalue()


def svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
