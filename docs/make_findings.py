"""The tables and the pictures of docs/findings.md, from the summaries and answers that are kept in artifacts/.

    python docs/make_findings.py            # writes the tables between the marks of docs/findings.md, and the pictures
    python docs/make_findings.py --check    # exit status 1 where a table there is not what the files give

The words around them are written by hand. A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Most tables
are of `toy_math` and the embedded model; `claims`, `key_settings` and `by_length` also read two other tasks, and two
further models whose results are in artifacts/subjects/<model>/<experiment>/toy_math/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fast_dllm.decoding import STEP_KINDS  # noqa: E402 (the project is not installed)
from fast_dllm.errors import UsageError  # noqa: E402
from fast_dllm.guard import one_line  # noqa: E402
from fast_dllm.report.aup import pareto  # noqa: E402
from fast_dllm.report.claims import (  # noqa: E402
    Ratio,
    compare,
    largest_loss,
    pooled,
    runs_of_task,
    speed_ratio,
    tables_of_task,
)
from fast_dllm.report.compare import Contrast, contrast, corrected, interval_of  # noqa: E402
from fast_dllm.report.drawing import COLOURS, MARKERS, STYLE, png, style_of  # noqa: E402
from fast_dllm.report.results import RunResult  # noqa: E402
from fast_dllm.report.same_results import distinct, is_plain  # noqa: E402
from fast_dllm.report.words import p_text, span  # noqa: E402
from fast_dllm.spec.files import write_whole  # noqa: E402

DOCUMENT = ROOT / "docs" / "findings.md"
TASK = "toy_math"
CONTROLS = ("04_threshold", "07_rules")
PLAIN = "04_threshold/s8_t0.90"  # the lab's setting without reuse: what every run is compared with
SAME_AS_PLAIN = "07_rules/s8_t0.90"  # the same answers and forwards; it recorded the forwards of each question
MARGINS = (0.5, 1.0, 1.5)  # points that a setting may lose, so far as can be excluded
OBSERVED = (0.5, 1.0)  # points that a setting may lose, as observed
OTHER_TASKS = ("toy_math_new", "toy_math_wide")
# models that are not committed (models/tiny/README.md, Recipe), on TASK
SUBJECTS = ("later", "later_far", "early", "early_far")
# (setting, what it is compared with); None: plain decoding
CLAIMS = (
    ("01_adaptive_skip/r0.90_s1", None),
    ("01_adaptive_skip/r0.90_s1", "00_baseline/k2_middle"),
    ("01_adaptive_skip/r0.90_s1", "07_rules/w16_t0.90"),
    ("01_adaptive_skip/r0.90_s1", "07_rules/prefix0.20"),
    ("01_adaptive_skip/r0.90_s1", "07_rules/prefix0.30"),
    ("01_adaptive_skip/r0.90_s1", "05_two_bars/p0.90_s1"),
    ("01_adaptive_skip/r0.80_s1", None),
    ("01_adaptive_skip/r0.80_s1", "07_rules/prefix0.30"),
    ("01_adaptive_skip/r0.80_s1", "07_rules/prefix0.40"),
    ("05_two_bars/p0.90_t0.98_s32", "05_two_bars/p0.90_t0.98_s8"),
    ("00_baseline/k2_middle", None),
    ("00_baseline/k2_middle", "07_rules/w16_t0.90"),
    ("07_rules/w16_t0.90", None),
    ("07_rules/prefix0.20", None),
    ("04_threshold/s16_t0.90", None),
    ("04_threshold/s32_t0.90", None),
)
KEY_SETTINGS = (
    PLAIN,
    "00_baseline/k2_middle",
    "04_threshold/s16_t0.90",
    "04_threshold/s32_t0.90",
    "07_rules/w16_t0.90",
    "07_rules/prefix0.20",
    "07_rules/prefix0.30",
    "07_rules/prefix0.40",
    "01_adaptive_skip/r0.90_s1",
    "01_adaptive_skip/r0.80_s1",
    "05_two_bars/p0.90_s1",
)
LENGTHS = ((1, 20), (21, 30), (31, 45), (46, 1000))  # new tokens of plain decoding's answer
PICTURE = ROOT / "docs" / "pictures" / "findings.png"
SUBJECTS_PICTURE = PICTURE.with_name("findings_subjects.png")
SHOWN = (3.9, 85.0)  # the picture's least tokens per forward and accuracy; threshold 1 is far to the left
ALL_FORWARDS = "tokens per forward"
SPEED = "tokens per denoising forward"
ENLARGED = ((5.4, 6.12), (95.8, 98.1))  # where most settings are as right as plain decoding and faster
# settings that findings.md names -> (text, its offset from the point)
LABELS = {
    PLAIN: ("plain decoding, the lab's setting", (-20, 14)),
    "01_adaptive_skip/r0.90_s1": ("01 r0.90_s1", (-10, 18)),
    "01_adaptive_skip/r0.80_s1": ("01 r0.80_s1", (22, 12)),
    "05_two_bars/p0.90_t0.98_s8": ("05 p0.90_t0.98_s8", (-60, 14)),
    "05_two_bars/p0.80_t0.98_s8": ("05 p0.80_t0.98_s8", (22, 16)),
    "00_baseline/k2_first": ("00 k = 2", (-48, -16)),
    "07_rules/w16_t0.90": ("07 w16_t0.90", (-70, -12)),
    "07_rules/prefix0.20": ("07 prefix0.20", (-86, -34)),
    "06_lookahead/n4_r0.90_s1": ("06: the answers of\n01 r0.90_s1", (-62, -36)),
}
LABELLED_IN_WHOLE = (PLAIN, "06_lookahead/n4_r0.90_s1")
RIVALS = ("00", "01", "04", "07")  # what layers in part are compared with
Tasks = Mapping[str, Mapping[str, RunResult]]  # task -> `experiment/configuration` -> run, see runs_by_task
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """Runs of one experiment with the same answers in as many forwards. is_plain: plain decoding, at some threshold
    and sub-block; versus: against PLAIN (None: that itself). num_settings: distinct results of its experiment that are
    not plain decoding's; the best of so many is looked for."""

    runs: tuple[RunResult, ...]
    is_plain: bool
    versus: Contrast | None
    num_settings: int = 1

    @property
    def run(self) -> RunResult:
        return self.runs[0]

    @property
    def name(self) -> str:
        configs = [run.config for run in self.runs]
        return f"{self.run.experiment[:2]} " + ", ".join(configs)

    @property
    def cost(self) -> float:
        """Full-depth forwards, a token: layers that all forwards ran / layers of the model."""
        return layers(self.run) / self.run.summary.num_layers / self.run.new_tokens

    @property
    def tokens_per_step_forward(self) -> float:
        return self.run.new_tokens * self.run.summary.num_layers / layers(self.run, STEP_KINDS)

    @property
    def loss(self) -> float:
        """The largest loss in points that is not excluded, over the settings of its experiment together."""
        if self.versus is None or self.versus.flips == 0:
            return 0.0
        return 100 * largest_loss(self.versus, self.num_settings)


def layers(run: RunResult, kinds: tuple[str, ...] | None = None, what: str = "layer_forwards") -> float:
    """Layers run in forwards of these kinds (None: all), or rows x layers."""
    found = getattr(run.summary.throughput, what)
    return sum(count for kind, count in found.items() if kinds is None or kind in kinds)


def read(root: Path = ROOT) -> list[Result]:
    """Every distinct result of the whole task, compared with PLAIN. One Holm family, without those whose answers are
    PLAIN's. Raises UsageError."""
    tables = tables_of_task(root, TASK)
    runs = {f"{table.experiment}/{run.config}": run for table in tables for run in table.runs.values()}
    if PLAIN not in runs:
        raise UsageError(f"no result of {PLAIN} on {TASK}; there are: {', '.join(sorted(runs)) or 'none'}")
    plain = runs[PLAIN]
    groups = [(group, is_plain(group[0], table)) for table in tables for group in distinct(table.runs.values())]
    made = {id(group): contrast("findings", group, plain) for group, _ in groups if plain not in group}
    known = [key for key, found in made.items() if found is not None and found.flips != 0]
    for key, found in zip(known, corrected([made[key] for key in known]), strict=True):
        made[key] = found
    others = [(group[0].experiment, is_same) for group, is_same in groups if plain not in group]
    sizes = Counter(name for name, is_same in others if name in CONTROLS or not is_same)
    return [
        Result(tuple(group), is_same, made.get(id(group)), max(1, sizes[group[0].experiment]))
        for group, is_same in groups
    ]


def of_control(result: Result) -> bool:
    return result.run.experiment in CONTROLS


def loss_at_most(margin: float) -> Callable[[Result], bool]:
    """Whether a larger loss is excluded, over the settings of the experiment together (plain itself passes)."""
    return lambda result: result.loss <= margin


def observed_at_most(margin: float) -> Callable[[Result], bool]:
    return lambda result: result.versus is None or -100 * result.versus.difference <= margin


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
        run, interval = result.run, interval_of(result.run)
        rows.append(
            [
                result.name,
                f"{100 * run.accuracy:.2f} {span(interval)}",
                *difference(result.versus),
                "" if result.versus is None or result.versus.flips == 0 else f"{result.loss:.1f}",
                f"{run.tokens_per_forward:.2f}",
                f"{result.tokens_per_step_forward:.2f}",
                f"{layers(run, what='row_layer_forwards') / run.summary.num_layers / run.new_tokens:.1f}",
            ]
        )
    head = [
        "result",
        "right, %",
        "points from plain",
        "p",
        "loss not excluded",
        ALL_FORWARDS,
        SPEED,
        "rows per token",
    ]
    return table(head, rows)


def at_equal_accuracy(results: list[Result]) -> str:
    """The fastest setting of each experiment that is as right as plain decoding, by two definitions of that."""
    plain = next(result for result in results if result.versus is None)
    control = [result for result in results if of_control(result)]
    # an experiment that only has plain decoding's answers, in fewer forwards, makes no trade
    experiments = sorted({each.run.experiment for each in results if of_control(each) or not each.is_plain})
    rows = []
    readings = [(f"no loss above {m:g}, 95% sure", loss_at_most(m)) for m in MARGINS]
    readings += [(f"observed loss at most {m:g}", observed_at_most(m)) for m in OBSERVED]
    for words, passes in readings:
        bar = fastest(control, passes)
        for name in experiments:
            best = fastest(
                [r for r in results if r.run.experiment == name and not (r.is_plain and name not in CONTROLS)], passes
            )
            if best is None or bar is None:
                rows.append([words, name, "none", "", "", ""])
                continue
            rows.append(
                [
                    words, name, ", ".join(run.config for run in best.runs),
                    f"{best.run.tokens_per_forward:.2f}",
                    f"{bar.cost / best.cost:.2f}", f"{plain.cost / best.cost:.2f}",
                ]
            )  # fmt: skip
    return table(["points", "experiment", "fastest", ALL_FORWARDS, "x controls' best", "x plain"], rows)


def at_equal_cost(results: list[Result]) -> str:
    """Each setting that runs layers in part, against the most accurate one of the others that costs no more."""
    others = [r for r in results if r.run.experiment[:2] in RIVALS]
    pairs = []
    for result in results:
        if not result.run.skips_layers:
            continue
        for rival in RIVALS:
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
                result.name, f"{result.run.tokens_per_forward:.2f}",
                best.name, f"{best.run.tokens_per_forward:.2f}", *difference(found),
            ]
        )  # fmt: skip
    return table(["layers in part", ALL_FORWARDS, "at no more cost", ALL_FORWARDS, "points", "p"], rows)


def runs_by_task(root: Path) -> Tasks:
    """Task -> `experiment/configuration` -> run, for the tasks that have plain decoding. It is called PLAIN in each.
    The tasks of another model are called `toy_math, MODEL`."""
    by_task = {task: runs_of_task(root, task) for task in (TASK, *OTHER_TASKS)}
    for name in SUBJECTS:
        by_task[f"{TASK}, {name}"] = runs_of_task(root, TASK, (f"artifacts/subjects/{name}",))
    for runs in by_task.values():
        if SAME_AS_PLAIN in runs:
            runs[PLAIN] = runs[SAME_AS_PLAIN]
    return {task: runs for task, runs in by_task.items() if PLAIN in runs}


def short(name: str) -> str:
    """`01_adaptive_skip/r0.90_s1` -> `01 r0.90_s1`; PLAIN is `plain`."""
    experiment, _, config = name.partition("/")
    return "plain" if name == PLAIN else f"{experiment[:2]} {config}"


def times(ratio: Ratio) -> str:
    if ratio.interval is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} [{ratio.interval.low:.2f}, {ratio.interval.high:.2f}]"


def claims(tasks: Tasks) -> str:
    """Each claim of CLAIMS on each task, and pooled over the two sets of one task."""
    rows = []
    found = compare([(setting, base or PLAIN) for setting, base in CLAIMS], tasks)
    for setting, base in ((setting, base or PLAIN) for setting, base in CLAIMS):
        mine = [each for each in found if (each.setting, each.base) == (setting, base)]
        for each in mine:
            rows.append(
                [
                    f"{short(setting)} against {short(base)}", each.task, *difference(each.contrast),
                    times(each.ratio), times(each.step_ratio),
                ]
            )  # fmt: skip
        same = [each.contrast for each in mine if each.task in (TASK, OTHER_TASKS[0])]
        if len(same) > 1:
            gain, interval, p = pooled(same)
            cells = [f"{100 * gain:+.2f} {span(interval, signed=True)}", f"{p_text(p)}, not corrected"]
            rows.append([f"{short(setting)} against {short(base)}", f"{TASK} and {OTHER_TASKS[0]}", *cells, "", ""])
    return table(["", "questions", "points", "p", f"x {ALL_FORWARDS}", f"x {SPEED}"], rows)


def key_settings(tasks: Tasks) -> str:
    """Right answers and tokens per forward of KEY_SETTINGS on every task."""
    rows = []
    for task, runs in tasks.items():
        for name in KEY_SETTINGS:
            if name in runs:
                run, plain = runs[name], runs[PLAIN]
                versus = None if name == PLAIN else contrast("key", [run], plain)
                gain = "" if name == PLAIN else times(speed_ratio(run, plain))
                rows.append(
                    [
                        task, short(name), f"{100 * run.accuracy:.2f} {span(interval_of(run))}",
                        "" if versus is None else difference(versus)[0], f"{run.tokens_per_forward:.2f}", gain,
                    ]
                )  # fmt: skip
    return table(["questions", "setting", "right, %", "points from plain", ALL_FORWARDS, "x plain"], rows)


def by_length(tasks: Tasks) -> str:
    """Tokens per forward of plain decoding and of two settings, for short and long answers of the wide task."""
    runs = tasks.get(OTHER_TASKS[1], {})
    names = [
        name
        for name in (PLAIN, "00_baseline/k2_middle", "07_rules/prefix0.20", "01_adaptive_skip/r0.90_s1")
        if name in runs
    ]
    rows = []
    for low, high in LENGTHS:
        chosen = {q.key for q in runs[PLAIN].questions.questions if low <= (q.new_tokens or 0) <= high} if names else ()
        if not chosen:
            continue
        cells = []
        for name in names:
            kept = [q for q in runs[name].questions.questions if q.key in chosen]
            tokens, depth = sum(q.new_tokens for q in kept), runs[name].summary.num_layers
            forwards, steps = sum(q.layers for q in kept) / depth, sum(q.step_layers for q in kept) / depth
            cells.append((tokens / forwards, steps / len(kept), forwards / len(kept)))
        plain = cells[0]
        ratios = [f"{one[0]:.2f} ({one[0] / plain[0]:.2f})" for one in cells[1:]]
        span_of = f"{low} to {high}" if high < 1000 else f"{low} and more"
        rows.append([span_of, str(len(chosen)), f"{plain[2]:.1f}", f"{plain[1]:.1f}", f"{plain[0]:.2f}", *ratios])
    head = ["new tokens", "questions", "forwards of plain", "denoising ones", "plain", *map(short, names[1:])]
    return table(head, rows)


TABLES: Mapping[str, Callable[[list[Result]], str]] = {
    "every_result": every_result,
    "equal_accuracy": at_equal_accuracy,
    "equal_cost": at_equal_cost,
}
OF_ALL_TASKS: Mapping[str, Callable[[Tasks], str]] = {
    "claims": claims,
    "key_settings": key_settings,
    "by_length": by_length,
}


def picture(results: list[Result]) -> Figure:
    """Accuracy against tokens per forward: all results, and the upper right enlarged."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    whole, enlarged = figure.subplots(1, 2, width_ratios=(1, 1.15))
    control = [_place(result) for result in results if of_control(result)]
    envelope = [control[index] for index in pareto(control)]
    for axes, with_errors in ((whole, True), (enlarged, False)):
        axes.plot(*zip(*envelope, strict=True), "--", color="black", linewidth=1, label="the controls' envelope")
        for name in sorted({each.run.experiment for each in results if of_control(each) or not each.is_plain}):
            shown = [r for r in results if r.run.experiment == name and (name in CONTROLS or not r.is_plain)]
            _draw_results(axes, name, shown, with_errors)
        axes.set(xlabel=ALL_FORWARDS)
        axes.grid(alpha=0.3)
    whole.set(ylabel="right, % (95% interval)", title="all results")
    whole.set_xlim(left=SHOWN[0])
    whole.set_ylim(bottom=SHOWN[1])
    whole.legend(loc="lower left", bbox_to_anchor=(0.17, 0.0), frameon=False, fontsize=8)
    enlarged.set(xlim=ENLARGED[0], ylim=ENLARGED[1], title="the upper right, enlarged (no intervals)")
    _label(whole, results, {name: LABELS[name] for name in LABELLED_IN_WHOLE})
    _label(enlarged, results, {name: label for name, label in LABELS.items() if name not in LABELLED_IN_WHOLE})
    return figure


def subjects_picture(tasks: Tasks) -> Figure:
    """Points against speed, both from plain decoding's, of KEY_SETTINGS: one panel for each set of questions."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    columns = len(tasks) // 2 + 1  # at least one panel is left for the legend
    panels = list(figure.subplots(2, columns, sharex=True, sharey=True).flat)
    settings = [name for name in KEY_SETTINGS if name != PLAIN]
    experiments = sorted({name.partition("/")[0] for name in settings})
    for axes, (task, runs) in zip(panels, tasks.items(), strict=False):
        plain = runs[PLAIN]
        axes.axhline(0, color="black", linewidth=0.6)
        for index, name in enumerate(settings):
            if name not in runs:
                continue
            versus = contrast("subjects", [runs[name]], plain)
            if versus is None:
                raise UsageError(f"{name} on {task} has other questions than plain decoding")
            points, low, high = (100 * each for each in (versus.difference, versus.interval.low, versus.interval.high))
            colour = COLOURS[experiments.index(name.partition("/")[0])]
            axes.errorbar(
                speed_ratio(runs[name], plain).value, points, yerr=[[points - low], [high - points]],
                fmt=MARKERS[index % len(MARKERS)], color=colour, markersize=5, elinewidth=0.7,
                markeredgecolor="black", markeredgewidth=0.5, label=short(name),
            )  # fmt: skip
        axes.set_title(f"{task}, plain {100 * plain.accuracy:.1f}%")
        axes.grid(alpha=0.3)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    for axes in panels[len(tasks) - columns : columns]:  # no panel below
        axes.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, loc="center", frameon=False)
    figure.supxlabel("times plain decoding's tokens per forward, all forwards counted", fontsize=8)
    figure.supylabel("points from plain decoding (95% interval)", fontsize=8)
    return figure


def _place(result: Result) -> tuple[float, float]:
    return result.run.tokens_per_forward, 100 * result.run.accuracy


def _draw_results(axes: Axes, experiment: str, results: list[Result], with_errors: bool) -> None:
    colour, marker = style_of(experiment)
    across, up = zip(*[_place(result) for result in results], strict=True)
    errors = None
    if with_errors:
        intervals = [interval_of(result.run) for result in results]
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


def filled(text: str, results: list[Result], tasks: Tasks) -> str:
    """The document with its tables made anew. Raises UsageError for a mark that names none."""

    def made(match: re.Match[str]) -> str:
        if match[2] in TABLES:
            return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"
        if match[2] in OF_ALL_TASKS:
            return f"{match[1]}{OF_ALL_TASKS[match[2]](tasks)}{match[3]}"
        raise UsageError(f"no table {match[2]!r}; there are: {', '.join([*TABLES, *OF_ALL_TASKS])}")

    return MARK.sub(made, text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    options = parser.parse_args(words)
    old = DOCUMENT.read_text(encoding="utf-8")
    results = read()
    tasks = runs_by_task(ROOT)
    new = filled(old, results, tasks)
    if options.check:
        print(
            "docs/findings.md is what the results give" if new == old else "docs/findings.md differs from the results"
        )
        return int(new != old)
    write_whole(DOCUMENT, new.encode())
    write_whole(PICTURE, png(picture(results)))
    with matplotlib.rc_context(STYLE):
        write_whole(SUBJECTS_PICTURE, png(subjects_picture(tasks)))
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
