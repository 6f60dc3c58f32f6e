"""Draw the loss curve of a run: python -m training.plot DIR/log.jsonl PICTURE (needs the extra `train`)."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count
from pathlib import Path


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl, without those that a resumed run went through twice.

    Raises ValueError for a file that is no such log.
    """
    entries: dict[tuple[str, int], dict] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            entries[entry["stage"], entry["step"]] = entry
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a log of training.train: {line[:60]!r}") from error
    return list(entries.values())


def draw(entries: list[dict], picture: Path) -> None:
    """Loss (logarithmic) and learning rate over all steps, a colour a stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(2, 1, figsize=(9.5, 5), sharex=True, height_ratios=(3, 1))
    start, number, colours = 0, count(), pyplot.colormaps["tab20"].colors[::2] + pyplot.colormaps["tab20"].colors[1::2]
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        own = [entry for entry in entries if entry["stage"] == stage]
        steps = [start + entry["step"] for entry in own]
        colour = colours[next(number) % len(colours)]
        losses.plot(steps, [entry["loss"] for entry in own], label=stage, linewidth=1, color=colour)
        rates.plot(steps, [entry["lr"] for entry in own], linewidth=1, color=colour)
        start = steps[-1]
    losses.set(yscale="log", ylabel="weighted loss")
    losses.legend(title="stage", frameon=False, loc="upper left", bbox_to_anchor=(1, 1.03))
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.plot", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    try:
        draw(read_log(args.log), args.picture)
    except (OSError, ValueError) as error:
        print(f"training.plot: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("training.plot: needs matplotlib: pip install -e '.[train]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
