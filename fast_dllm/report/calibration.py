"""Is a confidence what it says? Reliability of candidate tokens, from the traces of a run.

    bash sbatch/local.sh --model tiny --task toy_math --limit 200 --batch_size 32 --traces
    python -m fast_dllm.report.calibration results/00_baseline/toy_math_limit_200/plain/traces.jsonl.gz

A candidate that its step left masked is right if the finished answer has that token there. Candidates that the step
unmasked are not counted, since they are right by definition. With threshold 1 a step unmasks one token, so that nearly
all candidates are counted. Writes calibration.json, calibration.md and the picture (PNG and SVG): by the distance to
the nearest known position, and by the denoising step of the block. Exit status 2: wrong input, nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_dllm.errors import OneLineParser, UsageError, line_of
from fast_dllm.guard import one_line

# isort: split
import matplotlib
from matplotlib.figure import Figure

from fast_dllm.decoding import FORWARD_KINDS
from fast_dllm.record.traces import Trace, TracesError, read
from fast_dllm.report.drawing import COLOURS, COLUMN, MARKERS, STYLE, new_figure, png, svg
from fast_dllm.report.markdown import document, grid, heading
from fast_dllm.report.terminal import laid_out, terminal_width
from fast_dllm.spec.files import write_whole
from fast_dllm.spec.tasks import ROOT

FOLDER = "results/calibration"
SCHEMA_VERSION = 1
CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # between bins; the last bin ends at 1
GROUPS = {  # by -> (name, the least value of each group)
    "distance": ("distance to the nearest known position", (1, 2, 3, 5, 9)),
    "step": ("denoising step of the block", (1, 2, 4, 8, 16)),
}


@dataclass
class Bin:
    """Candidates of one group with confidences in one range: their number, sum of confidences, and the right ones."""

    count: int = 0
    confidence: float = 0.0
    right: int = 0


@dataclass
class Reliability:
    """Bins by (by, group, number of the confidence's bin). questions, candidates: what was counted."""

    bins: dict[tuple[str, int, int], Bin] = field(default_factory=dict)
    answers: int = 0
    candidates: int = 0

    def add_answer(self, trace: Trace, block_size: int, stop_token: int) -> None:
        """Count the candidates of one answer that their steps left masked."""
        final = _final_tokens(trace, stop_token)
        known: set[int] = set()
        steps_of_block: dict[int, int] = {}
        self.answers += 1
        for step in trace["steps"]:
            filled = step.get("filled", {"positions": []})["positions"]
            kind = FORWARD_KINDS.get(step["kind"])
            if kind is not None and kind.step and kind.runs_layers and "window" in step and step["seen"]:
                block = step["window"][0] // block_size
                steps_of_block[block] = steps_of_block.get(block, 0) + 1
                state = step["seen"][0]
                places = zip(state["positions"], state["tokens"], state["confidences"], strict=True)
                for position, token, confidence in places:
                    if position in final and position not in filled:
                        distance = _distance(position, known, trace["num_prompt"], (block + 1) * block_size)
                        values = {"distance": distance, "step": steps_of_block[block]}
                        self._add(values, confidence, token == final[position])
            known.update(filled)

    def _add(self, values: dict[str, int], confidence: float, is_right: bool) -> None:
        self.candidates += 1
        number = bisect_right(CONFIDENCE_EDGES, confidence)
        for by, value in values.items():
            group = bisect_right(GROUPS[by][1], value) - 1
            place = self.bins.setdefault((by, group, number), Bin())
            place.count += 1
            place.confidence += confidence
            place.right += is_right

    def of_group(self, by: str, group: int) -> list[Bin]:
        """The bins of a group that hold candidates, by confidence."""
        return [self.bins[key] for key in sorted(self.bins) if key[:2] == (by, group)]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each group: its candidates, mean confidence, share that is right, and calibration error."""
        rows = []
        for by, (_, least) in GROUPS.items():
            for group in range(len(least)):
                bins = self.of_group(by, group)
                count = sum(each.count for each in bins)
                if count:
                    rows.append(
                        {
                            "by": by,
                            "group": group_name(by, group),
                            "candidates": count,
                            "confidence": sum(each.confidence for each in bins) / count,
                            "right": sum(each.right for each in bins) / count,
                            # the mean distance of confidence and share right, weighted by candidates (ECE)
                            "error": sum(abs(each.confidence - each.right) for each in bins) / count,
                        }
                    )
        return rows


def _final_tokens(trace: Trace, stop_token: int) -> dict[int, int]:
    """Position -> token of the finished answer, up to and with its first stop token."""
    final: dict[int, int] = {}
    for step in trace["steps"]:
        filled = step.get("filled", {"positions": [], "tokens": []})
        final.update(zip(filled["positions"], filled["tokens"], strict=True))
    stops = [position for position, token in final.items() if token == stop_token]
    end = min(stops, default=max(final, default=0))
    return {position: token for position, token in final.items() if position <= end}


def _distance(position: int, known: set[int], num_prompt: int, block_end: int) -> int:
    """Positions to the nearest known one on either side, within the block on the right."""
    left = next(p for p in range(position - 1, -2, -1) if p in known or p < num_prompt)
    right = next((p for p in range(position + 1, block_end) if p in known), None)
    return position - left if right is None else min(position - left, right - position)


def group_name(by: str, group: int) -> str:
    """Like "3 to 4", or "9 and more"."""
    least = GROUPS[by][1]
    if group == len(least) - 1:
        return f"{least[group]} and more"
    most = least[group + 1] - 1
    return f"{least[group]}" if most == least[group] else f"{least[group]} to {most}"


def picture(reliability: Reliability, title: str) -> Figure:
    """The share of right candidates against their mean confidence, a line for each group."""
    figure = new_figure(3.0, width=2 * COLUMN)
    figure.suptitle(title)
    for axes, (by, (name, least)) in zip(figure.subplots(1, len(GROUPS)), GROUPS.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=0.7)
        for group in range(len(least)):
            bins = reliability.of_group(by, group)
            if bins:
                total = sum(each.count for each in bins)
                axes.plot(
                    [each.confidence / each.count for each in bins],
                    [each.right / each.count for each in bins],
                    label=f"{group_name(by, group)} ({total:,})",
                    color=COLOURS[group],
                    marker=MARKERS[group],
                    markersize=3,
                    linewidth=1,
                )
        axes.set(xlabel="confidence", ylabel="share of right candidates", title=f"by {name}", xlim=(0, 1), ylim=(0, 1))
        axes.legend(title="(candidates)", title_fontsize=7)
    return figure


def table(reliability: Reliability, title: str) -> str:
    """The rows as a Markdown document."""
    head = ("by", "group", "candidates", "mean confidence", "right", "calibration error")
    numbers = ("confidence", "right", "error")
    rows = [
        [row["by"], row["group"], f"{row['candidates']:,}", *(f"{row[name]:.3f}" for name in numbers)]
        for row in reliability.rows()
    ]
    return document([heading(1, title), grid(head, rows, numbers=range(2, len(head)))])


def collect(paths: Iterable[Path]) -> tuple[Reliability, list[Trace]]:
    """What the traces in these files say, and the files' headers. Raises UsageError."""
    reliability, headers = Reliability(), []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"no file {str(path)!r}; an evaluation with --traces writes one")
        try:
            header, traces = read(path)
            for trace in traces:
                reliability.add_answer(trace, header["block_size"], header["stop_token"])
        except TracesError as error:
            raise UsageError(str(error)) from None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"{path.name} is not a traces file: {line_of(error)}") from None
        headers.append(header)
    if not reliability.candidates:
        raise UsageError("no step left a candidate masked: a higher threshold takes more steps")
    return reliability, headers


def write(reliability: Reliability, headers: list[Trace], folder: Path) -> str:
    """Write the numbers, the table and the picture; returns the table."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "runs": [{name: header.get(name) for name in ("experiment", "task", "limit", "config")} for header in headers],
        "answers": reliability.answers,
        "candidates": reliability.candidates,
        "confidence_edges": CONFIDENCE_EDGES,
        "groups": reliability.rows(),
        "bins": [
            {"by": by, "group": group_name(by, group), "bin": number, **vars(each)}
            for (by, group, number), each in sorted(reliability.bins.items())
        ],
    }
    first = headers[0]
    title = f"{first.get('experiment')}, {first.get('task')}, {first.get('config')}: {reliability.answers:,} answers"
    text = table(reliability, title)
    with matplotlib.rc_context(STYLE):
        figure = picture(reliability, title)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "calibration.png", png(figure))
        write_whole(folder / "calibration.svg", svg(figure))
    write_whole(folder / "calibration.json", json.dumps(content, indent=2).encode() + b"\n")
    write_whole(folder / "calibration.md", text.encode())
    return text


def folder_name(header: Trace) -> str:
    """The name of a run's calibration, which runs of other tasks, limits and configurations do not share."""
    limit = "" if header.get("limit") is None else f"_limit_{header['limit']}"
    return f"{header.get('experiment')}_{header.get('task')}{limit}_{header.get('config')}".replace("/", "_")


def parser() -> argparse.ArgumentParser:
    options = OneLineParser(
        prog="python -m fast_dllm.report.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("traces", metavar="FILE", type=Path, nargs="+", help="traces.jsonl.gz of runs, added up")
    options.add_argument(
        "--output", metavar="DIR", type=Path, help=f"default {FOLDER}/<experiment>_<task>[_limit_<N>]_<config>"
    )
    return options


def main(words: list[str] | None = None) -> int:
    try:
        options = parser().parse_args(words)
        reliability, headers = collect(options.traces)
    except UsageError as error:
        print(f"fast_dllm.report.calibration: error: {line_of(error)}", file=sys.stderr)
        return 2
    folder = options.output or ROOT / FOLDER / folder_name(headers[0])
    print(laid_out(write(reliability, headers, folder), terminal_width()), f"\nwrote {folder}", sep="\n")
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
