"""The tables and the picture of docs/findings.md, from the summaries and answers that are kept in artifacts/.

    python docs/make_findings.py            # writes the tables between the marks of docs/findings.md, and the picture
    python docs/make_findings.py --check    # exit status 1 where a table there is not what the files give

The words around them are written by hand. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fast_dllm.decoding import STEP_KINDS  # noqa: E402 (the project is not installed)
from fast_dllm.errors import UsageError  # noqa: E402
from fast_dllm.guard import one_line  # noqa: E402
from fast_dllm.report.aup import pareto  # noqa: E402
from fast_dllm.report.compare import Contrast, accuracy_of, contrast, corrected, distinct, is_plain  # noqa: E402
from fast_dllm.report.figures import png, style_of  # noqa: E402
from fast_dllm.report.folders import experiments_with_results, read_tables  # noqa: E402
from fast_dllm.report.results import RunResult  # noqa: E402
from fast_dllm.report.words import p_text, span  # noqa: E402
from fast_dllm.spec.files import write_whole  # noqa: E402

DOCUMENT = ROOT / "docs" / "findings.md"
TASK = "toy_math"
CONTROL = "04_threshold"
PLAIN = f"{CONTROL}/s8_t0.90"  # the lab's setting without reuse: what every run is compared with
MARGINS = (-0.5, -1.0)  # points that a setting may be worse than that
PICTURE = ROOT / "docs" / "pictures" / "findings.png"
SHOWN = (5.0, 85.0)  # the picture's least tokens per forward and accuracy; threshold 1 is far to the left
SPEED = "tokens per denoising forward"
ENLARGED = ((8.2, 9.6), (96.3, 98.1))  # where most settings are as right as plain decoding and faster
# settings that findings.md names -> (text, its offset from the point)
LABELS = {
    PLAIN: ("plain decoding, the lab's setting", (-20, 14)),
    "01_adaptive_skip/r0.90_s1": ("01 r0.90_s1", (-10, 18)),
    "01_adaptive_skip/r0.80_s1": ("01 r0.80_s1", (22, 12)),
    "05_two_bars/p0.90_t0.98_s8": ("05 p0.90_t0.98_s8", (-60, 14)),
    "05_two_bars/p0.80_t0.98_s8": ("05 p0.80_t0.98_s8", (22, 16)),
    "03_carry_rows/carry_r0.90": ("03 carry_r0.90", (-48, -66)),
    "00_baseline/k2_first": ("00 k = 2", (-48, -16)),
    "04_threshold/s32_t0.90": ("04 s32_t0.90", (-72, -22)),
}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """Runs of one experiment whose answers are the same to the last one. is_plain: plain decoding, at some threshold
    and sub-block; versus: against PLAIN (None: that itself)."""

    runs: tuple[RunResult, ...]
    is_plain: bool
    versus: Contrast | None

    @property
    def run(self) -> RunResult:
        return self.runs[0]

    @property
    def name(self) -> str:
        configs = [run.config for run in self.runs]
        return f"{self.run.experiment[:2]} " + ", ".join(configs)

    @property
    def cost(self) -> float:
        """Full-depth forwards of the denoising steps, a token: layers that they ran / layers of the model."""
        return layers(self.run, STEP_KINDS) / self.run.summary.num_layers / self.run.new_tokens

    @property
    def tokens_per_step_forward(self) -> float:
        return 1 / self.cost


def layers(run: RunResult, kinds: tuple[str, ...] | None = None, what: str = "layer_forwards") -> float:
    """Layers run in forwards of these kinds (None: all), or rows x layers."""
    found = getattr(run.summary.throughput, what)
    return sum(count for kind, count in found.items() if kinds is None or kind in kinds)


def read(root: Path = ROOT) -> list[Result]:
    """Every distinct result of the whole task, compared with PLAIN. One Holm family, without those whose answers are
    PLAIN's. Raises UsageError."""
    kept = ("artifacts",)
    names = experiments_with_results(root, kept)
    tables = [table for name in names for table in read_tables(root, name, TASK, kept) if not table.is_foreign]
    runs = {f"{table.experiment}/{run.config}": run for table in tables for run in table.runs.values()}
    if PLAIN not in runs:
        raise UsageError(f"no result of {PLAIN} on {TASK}; there are: {', '.join(sorted(runs)) or 'none'}")
    plain = runs[PLAIN]
    groups = [(group, is_plain(group[0], table)) for table in tables for group in distinct(table.runs.values())]
    made = {id(group): contrast("findings", group, plain) for group, _ in groups if plain not in group}
    known = [key for key, found in made.items() if found is not None and found.flips != 0]
    for key, found in zip(known, corrected([made[key] for key in known]), strict=True):
        made[key] = found
    return [Result(tuple(group), is_same, made.get(id(group))) for group, is_same in groups]


def of_control(result: Result) -> bool:
    return result.run.experiment == CONTROL


def loss_at_most(margin: float) -> Callable[[Result], bool]:
    """Whether the 95% interval of the difference from plain excludes a larger loss (plain itself passes)."""
    return lambda result: result.versus is None or 100 * result.versus.interval.low >= margin


def observed_at_least(margin: float) -> Callable[[Result], bool]:
    return lambda result: result.versus is None or 100 * result.versus.difference >= margin


def fastest(results: list[Result], passes: Callable[[Result], bool]) -> Result | None:
    return min(filter(passes, results), key=lambda result: result.cost, default=None)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def difference(found: Contrast | None) -> list[str]:
    if found is None:
        return ["compared with", ""]
    if found.flips == 0:
        return ["the same answers", ""]
    return [f"{100 * found.difference:+.2f} {span(found.interval, signed=True)}", p_text(found.p_adjusted)]


def every_result(results: list[Result]) -> str:
    """One line a result, by experiment."""
    rows = []
    for result in results:
        run, interval = result.run, accuracy_of(result.run).interval
        rows.append(
            [
                result.name,
                f"{100 * run.accuracy:.2f} {span(interval)}",
                *difference(result.versus),
                f"{result.tokens_per_step_forward:.2f}",
                f"{run.tokens_per_forward:.2f}",
                f"{layers(run, what='row_layer_forwards') / run.summary.num_layers / run.new_tokens:.1f}",
            ]
        )
    head = [
        "result",
        "right, %",
        "points from plain",
        "p",
        SPEED,
        "with prefills, commits",
        "rows per token",
    ]
    return table(head, rows)


def at_equal_accuracy(results: list[Result]) -> str:
    """The fastest setting of each experiment that is as right as plain decoding, by two readings of that."""
    plain = next(result for result in results if result.versus is None)
    control = [result for result in results if of_control(result)]
    experiments = sorted({result.run.experiment for result in results})
    rows = []
    readings = [(f"no loss above {-m:g}, 95% sure", loss_at_most(m)) for m in MARGINS]
    readings += [(f"observed loss at most {-m:g}", observed_at_least(m)) for m in MARGINS]
    for words, passes in readings:
        bar = fastest(control, passes)
        for name in experiments:
            best = fastest(
                [r for r in results if r.run.experiment == name and not (r.is_plain and name != CONTROL)], passes
            )
            if best is None or bar is None:
                rows.append([words, name, "none", "", "", ""])
                continue
            rows.append(
                [
                    words, name, ", ".join(run.config for run in best.runs),
                    f"{best.tokens_per_step_forward:.2f}",
                    f"{bar.cost / best.cost:.2f}", f"{plain.cost / best.cost:.2f}",
                ]
            )  # fmt: skip
    return table(["points", "experiment", "fastest", SPEED, "x control's best", "x plain"], rows)


def at_equal_cost(results: list[Result]) -> str:
    """Each setting that runs layers in part, against the most accurate one of the others that costs no more."""
    others = [r for r in results if r.run.experiment[:2] in ("00", "01", CONTROL[:2])]
    pairs = []
    for result in results:
        if not result.run.skips_layers:
            continue
        for rival in ("00", "01", CONTROL[:2]):
            cheap = [r for r in others if r.run.experiment.startswith(rival) and r.cost <= result.cost]
            if cheap:
                best = max(cheap, key=lambda r: (r.run.accuracy, -r.cost))
                found = contrast("equal cost", list(result.runs), best.run)
                if found is not None:
                    pairs.append((result, best, found))
    rows = []
    for (result, best, _), found in zip(pairs, corrected([found for *_, found in pairs]), strict=True):
        rows.append(
            [
                result.name, f"{result.tokens_per_step_forward:.2f}",
                best.name, f"{best.tokens_per_step_forward:.2f}", *difference(found),
            ]
        )  # fmt: skip
    return table(["layers in part", SPEED, "at no more cost", SPEED, "points", "p"], rows)


TABLES: Mapping[str, Callable[[list[Result]], str]] = {
    "every_result": every_result,
    "equal_accuracy": at_equal_accuracy,
    "equal_cost": at_equal_cost,
}


def picture(results: list[Result]) -> Figure:
    """Accuracy against tokens per denoising forward: all results, and the upper right enlarged."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    whole, enlarged = figure.subplots(1, 2, width_ratios=(1, 1.15))
    control = [_place(result) for result in results if of_control(result)]
    envelope = [control[index] for index in pareto(control)]
    for axes, with_errors in ((whole, True), (enlarged, False)):
        axes.plot(*zip(*envelope, strict=True), "--", color="black", linewidth=1, label="the control's envelope")
        for name in sorted({result.run.experiment for result in results}):
            shown = [r for r in results if r.run.experiment == name and (name == CONTROL or not r.is_plain)]
            _draw_results(axes, name, shown, with_errors)
        axes.set(xlabel="tokens per denoising forward")
        axes.grid(alpha=0.3)
    whole.set(ylabel="right, % (95% interval)", title="all results")
    whole.set_xlim(left=SHOWN[0])
    whole.set_ylim(bottom=SHOWN[1])
    whole.legend(loc="lower left", bbox_to_anchor=(0.17, 0.0), frameon=False, fontsize=8)
    enlarged.set(xlim=ENLARGED[0], ylim=ENLARGED[1], title="the upper right, enlarged (no intervals)")
    _label(whole, results, {PLAIN: LABELS[PLAIN]})
    _label(enlarged, results, {name: label for name, label in LABELS.items() if name != PLAIN})
    return figure


def _place(result: Result) -> tuple[float, float]:
    return result.tokens_per_step_forward, 100 * result.run.accuracy


def _draw_results(axes: Axes, experiment: str, results: list[Result], with_errors: bool) -> None:
    colour, marker = style_of(experiment)
    across, up = zip(*[_place(result) for result in results], strict=True)
    errors = None
    if with_errors:
        intervals = [accuracy_of(result.run).interval for result in results]
        errors = [
            [100 * (r.run.accuracy - i.low) for r, i in zip(results, intervals, strict=True)],
            [100 * (i.high - r.run.accuracy) for r, i in zip(results, intervals, strict=True)],
        ]
    edge = {"markeredgecolor": "black", "markeredgewidth": 0.5}
    axes.errorbar(
        across, up, yerr=errors, fmt=marker, color=colour, markersize=5, elinewidth=0.6, label=experiment, **edge
    )


def _label(axes: Axes, results: list[Result], labels: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
    """Write a name beside each result that findings.md recommends or compares with. labels: see LABELS."""
    for result in results:
        for run in result.runs:
            text, offset = labels.get(f"{run.experiment}/{run.config}", ("", (0, 0)))
            if text:
                arrow = {"arrowstyle": "-", "linewidth": 0.6, "shrinkB": 3}
                axes.annotate(
                    text, _place(result), xytext=offset, textcoords="offset points", fontsize=8, arrowprops=arrow
                )


def filled(text: str, results: list[Result]) -> str:
    """The document with its tables made anew. Raises UsageError for a mark that names none."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise UsageError(f"no table {match[2]!r}; there are: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return MARK.sub(made, text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    options = parser.parse_args(words)
    old = DOCUMENT.read_text(encoding="utf-8")
    results = read()
    new = filled(old, results)
    if options.check:
        print(
            "docs/findings.md is what the results give" if new == old else "docs/findings.md differs from the results"
        )
        return int(new != old)
    write_whole(DOCUMENT, new.encode())
    write_whole(PICTURE, png(picture(results)))
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
