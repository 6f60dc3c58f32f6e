"""When an alarm applies: one function per condition. Each yields a Match for every place where the condition holds.

A Match names the configurations and the values of the rule's sentence; alarms.py has the table of rules. A condition
compares only what should be equal, so that what is meant to differ matches nothing: a sweep of thresholds is not
"mixed thresholds", and processes of one run are not "several segments".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

from fast_dllm.report.compare import (
    columns,
    computation,
    distinct,
    is_plain,
    num_flips,
    plain_settings,
    rereads,
)
from fast_dllm.report.results import ResultTable, RunResult
from fast_dllm.report.speeds import (
    hardware,
    outliers,
    processes_on_cpu,
    reference_speed,
    slow_groups,
    timed,
    was_interrupted,
)
from fast_dllm.report.statistics import ALPHA, homogeneity, smallest_detectable, tie_probability
from fast_dllm.report.words import by_value, fact_of, listed, percent, short_value, values_with_names

TOO_FEW = 0.10  # a table that cannot show a loss of ten points can answer no question about reuse
ANSWERS_THAT_CHANGE = 0.10  # share of questions, assumed: more than reuse changes at most settings
LONGEST = 2048  # new tokens where the task sets no limit (the default of the model argument)
NEAR_LONGEST = 0.9
FEWEST_SETTINGS = 3  # so many settings with one result are no accident
FEWEST_CELLS = 3  # so many equal accuracies in two tables are no accident
NOISE = 0.05  # two timings of one thing differ by so much
DECODING_KINDS = {"prefill", "full", "sub", "commit", "reused", "score"}

# facts that plain decoding's answers depend on besides its settings
CIRCUMSTANCES = ("model", "model_revision", "dtype", "gpu", "device", "graphs", "task_version", "num_fewshot")

# arguments that have a rule of their own, or that change no answer
NOT_MIXED_ARGUMENTS = (
    "reuse_k", "layer_subset", "experiment_name", "model_path", "batch_size", "dtype", "device", "show_speed",
)  # fmt: skip

ALL_TABLES = "all experiments"

# facts that a foreign summary may lack -> how to read them
RECORDED = {
    "the number of questions": lambda run: run.summary.num_samples,
    "which answer each question got": lambda run: run.questions,
    "forwards": lambda run: run.forwards,
    "a hash of the code": lambda run: run.facts.get("generation_code_sha256"),
    "the model's revision": lambda run: run.facts.get("model_revision"),
    "dtype": lambda run: run.facts.get("dtype"),
    "threshold": lambda run: run.arguments.get("threshold"),
    "interruptions": lambda run: run.facts.get("num_segments"),
    "metric": lambda run: run.metric,
    "tokens and seconds": lambda run: run.tokens_per_second,
}


@dataclass(frozen=True)
class Match:
    """configs: the configurations concerned; values: of the sentence's fields; table: its label, for conditions that
    compare several tables."""

    configs: tuple[str, ...]
    values: Mapping[str, object] = field(default_factory=dict)
    table: str | None = None


def _configs(runs: Iterable[RunResult]) -> tuple[str, ...]:
    return tuple(run.config for run in runs)


# ---- the files ----


def left_out(table: ResultTable) -> Iterator[Match]:
    """Files that are no result."""
    for config, reason in table.problems.items():
        yield Match((config,), {"reason": reason})


def file_faults(table: ResultTable, kind: str) -> Iterator[Match]:
    """Faults of this kind that were found while the summaries were read."""
    for run in table.runs.values():
        for fault, text in run.faults:
            if fault == kind:
                yield Match((run.config,), {"reason": text})


def missing(table: ResultTable) -> Iterator[Match]:
    if table.missing:
        yield Match(tuple(table.missing), {"count": len(table.missing), "total": len(table.matrix.configurations)})


def stale(table: ResultTable) -> Iterator[Match]:
    """Results of a generation code that the experiment no longer has."""
    runs = [run for run in table.runs.values() if table.is_stale(run)]
    if runs:
        yield Match(_configs(runs))


# ---- answers ----


def too_few_questions(table: ResultTable) -> Iterator[Match]:
    """Not even a loss of TOO_FEW could be shown."""
    counts = [run.num_samples for run in table.runs.values() if run.num_samples]
    if not counts:
        return
    total = min(counts)
    mean = sum(run.accuracy for run in table.runs.values()) / len(table.runs)
    smallest = smallest_detectable(total, min(ANSWERS_THAT_CHANGE, max(2 * mean * (1 - mean), 0.01)))
    if smallest is None or smallest > TOO_FEW:
        shown = "no difference at all" if smallest is None else f"no difference below {100 * smallest:.0f} points"
        yield Match(tuple(table.runs), {"total": total, "shown": shown})


def reuse_of_scored_task(table: ResultTable) -> Iterator[Match]:
    """Reuse concerns the steps after the first forward; a log-likelihood is one forward."""
    if not table.is_scored or not any((run.reuse_k or 1) > 1 for run in table.runs.values()):
        return
    values = {run.accuracy for run in table.runs.values()}
    what = "what differs between its configurations is not reuse"
    if len(values) == 1:
        what = f"one result ({percent(values.pop())}) shown {len(table.runs)} times"
    yield Match(tuple(table.runs), {"task": table.task, "what": what})


def _accuracies(group: list[RunResult]) -> str:
    return ", ".join(f"{run.config} {percent(run.accuracy)}" for run in group)


def _token_counts(group: list[RunResult]) -> str:
    counts = by_value(group, lambda run: run.new_tokens)
    parts = [f"{' = '.join(_configs(runs))} {tokens:,}" for tokens, runs in counts.items()]
    return f"; tokens: {', '.join(parts)}" if parts else ""


def equal_tokens(table: ResultTable) -> Iterator[Match]:
    """From totals: the very same number of tokens comes from the same answers, and those have one accuracy."""
    if table.is_scored:
        return
    for alike in (True, False):
        for k, groups in columns(table, alike).items():
            for group in groups:
                counts = by_value(group, lambda run: None if run.questions else run.new_tokens)
                for tokens, runs in counts.items():
                    if len(runs) > 1 and len({run.accuracy for run in runs}) > 1:
                        values = {"k": k, "tokens": f"{tokens:,}", "accuracies": _accuracies(runs)}
                        yield Match(_configs(runs), values)


def column_differences(table: ResultTable, kind: str) -> Iterator[Match]:
    """Runs of one computation that differ. kind: k1_differs, columns_differ, or columns_alike where totals cannot
    tell them apart."""
    if table.is_scored:
        return
    for k, groups in columns(table).items():
        for group in groups:
            difference = _difference(k, group)
            if difference is not None and difference[0] == kind:
                why = "nothing is reused" if k == 1 else "reuse reads stored outputs, whichever layers are named"
                yield Match(_configs(group), {"k": k, "why": why, "difference": difference[1]})


def _difference(k: int, group: list[RunResult]) -> tuple[str, str] | None:
    """(kind, what differs) of runs of one computation; None where nothing is known to differ."""
    kind = "k1_differs" if k == 1 else "columns_differ"
    changes = [num_flips(a, b) for a, b in combinations(group, 2)]
    known = [count for count in changes if count is not None]
    if len(known) == len(changes):
        return (kind, f"but up to {max(known)} answers differ") if max(known) else None
    accuracies, tokens = {run.accuracy for run in group}, {run.new_tokens for run in group} - {None}
    if len(tokens) == 1 or (len(accuracies) == 1 and not tokens):
        return None  # the same answers; where their accuracies differ, the rule equal_tokens says so
    text = f"but differ: {_accuracies(group)}{_token_counts(group)}"
    if k == 1:
        return kind, text
    counts = [run.counts for run in group if run.counts is not None]
    if len(counts) < len(group):
        return None
    p = homogeneity(counts)
    if p < ALPHA:
        return kind, f"{text} (p = {p:.2g} for one accuracy)"
    return "columns_alike", f"{_accuracies(group)} (totals only, unpaired: p = {p:.2g})"


def _same_result(run: RunResult, other: RunResult) -> bool:
    """The same answers with the same forwards; from totals, the same tokens, accuracy and forwards."""
    flips = num_flips(run, other)
    if flips is not None:
        return flips == 0 and run.forwards == other.forwards
    same_tokens = run.new_tokens is not None and run.new_tokens == other.new_tokens
    return same_tokens and run.accuracy == other.accuracy and run.forwards == other.forwards


def layers_without_effect(table: ResultTable, really_skipped: bool) -> Iterator[Match]:
    """Configurations that name other layers and gave the same answers with the same work.

    really_skipped: those whose forwards ran without some layers, where the choice must show in some answer.
    """
    if table.is_scored:
        return
    for k, groups in columns(table, alike=False).items():
        for group in groups:
            same = [run for run in group[1:] if _same_result(group[0], run)]
            if same and group[0].skips_layers == really_skipped:
                yield Match(_configs([group[0], *same]), {"k": k})


def _computations(table: ResultTable) -> list[RunResult]:
    """One run of each computation: the columns of one k are compared by other rules."""
    firsts: dict[tuple, RunResult] = {}
    for run in table.runs.values():
        firsts.setdefault((run.reuse_k or 1, computation(run)), run)
    return list(firsts.values())


def _all_alike(runs: list[RunResult]) -> bool:
    return len(runs) >= FEWEST_SETTINGS and all(_same_result(a, b) for a, b in combinations(runs, 2))


def no_setting_has_effect(table: ResultTable) -> Iterator[Match]:
    """Every one of several settings gave the same answers with the same work."""
    runs = _computations(table)
    if not table.is_scored and _all_alike(runs):
        yield Match(_configs(runs), {"count": len(runs)})


def setting_without_effect(table: ResultTable, differs_in_k: bool) -> Iterator[Match]:
    """Two settings that gave the same answers with the same work. differs_in_k: they differ in k."""
    runs = _computations(table)
    if table.is_scored or _all_alike(runs):
        return
    for run, other in combinations(runs, 2):
        if ((run.reuse_k or 1) != (other.reuse_k or 1)) == differs_in_k and _same_result(run, other):
            yield Match(_configs([run, other]))


def unexplained_difference(table: ResultTable) -> Iterator[Match]:
    """k > 1 moved the accuracy, but no step reused anything and no forward ran without a layer."""
    if table.is_scored:
        return

    def without_k(run: RunResult) -> tuple:
        return tuple(pair for pair in computation(run) if pair[0] != "reuse_k")

    plain = {without_k(run): run for run in table.runs.values() if run.reuse_k == 1}
    for run in table.runs.values():
        base = plain.get(without_k(run))
        if base is None or (run.reuse_k or 1) == 1 or run.forwards is None:
            continue
        if run.forwards.get("reused") or run.skips_layers or rereads(run):
            continue
        work_is_known = set(run.forwards) <= DECODING_KINDS or run.layers_run
        if work_is_known and (run.accuracy != base.accuracy or num_flips(run, base)):
            values = {"base": base.config, "accuracy": percent(run.accuracy), "base_accuracy": percent(base.accuracy)}
            yield Match(_configs([run, base]), {"config": run.config, **values})


def answers_never_stop(table: ResultTable) -> Iterator[Match]:
    """The mean answer is nearly as long as the limit."""
    if table.is_scored:
        return
    long_runs = []
    for run in table.runs.values():
        longest = run.arguments.get("max_new_tokens") or LONGEST
        mean = run.new_tokens / run.num_samples if run.new_tokens and run.num_samples else 0
        if isinstance(longest, (int, float)) and mean >= NEAR_LONGEST * longest:
            long_runs.append((run, mean, longest))
    if long_runs:
        lengths = ", ".join(
            f"{run.config} {run.new_tokens:,} tokens, {mean:,.0f} per answer" for run, mean, _ in long_runs
        )
        yield Match(_configs(run for run, *_ in long_runs), {"longest": f"{long_runs[0][2]:,}", "lengths": lengths})


# ---- one table, one thing ----


def several_values(table: ResultTable, facts: tuple[str, ...]) -> Iterator[Match]:
    """The first of the facts that has several values in the table."""
    runs = list(table.runs.values())
    for fact in facts:
        values = by_value(runs, fact_of(fact))
        if len(values) > 1:
            yield Match(_configs(runs), {"fact": fact, "values": values_with_names(values, short_value)})
            return


def _limits(table: ResultTable) -> Mapping[object, list[RunResult]]:
    return by_value(table.runs.values(), lambda run: "none" if run.limit is None else f"{run.limit:g}")


def several_limits(table: ResultTable) -> Iterator[Match]:
    limits = _limits(table)
    if len(limits) > 1:
        yield Match(tuple(table.runs), {"values": values_with_names(limits)})


def several_question_counts(table: ResultTable) -> Iterator[Match]:
    counts = by_value(table.runs.values(), lambda run: run.num_samples)
    if len(counts) > 1 and len(_limits(table)) == 1:
        yield Match(tuple(table.runs), {"values": values_with_names(counts)})


def several_tasks(table: ResultTable) -> Iterator[Match]:
    tasks = by_value(table.runs.values(), lambda run: run.task)
    if len(tasks) > 1:
        yield Match(tuple(table.runs), {"values": values_with_names(tasks)})


def mixed_code(table: ResultTable) -> Iterator[Match]:
    """Several policies or engines by their hashes. The commit counts only where no hash is recorded.

    Engines whose transcript replay is recorded for this experiment give the same tokens and count as one.
    """
    runs = list(table.runs.values())
    policies = by_value(runs, lambda run: run.facts.get("generation_code_sha256"))
    engines = by_value(runs, lambda run: run.facts.get("decoding_sha256"))
    unhashed_engine = [run for run in runs if "decoding_sha256" not in run.facts]
    packages = by_value(unhashed_engine, lambda run: run.facts.get("fast_dllm_sha256"))
    unhashed_policy = [run for run in runs if "generation_code_sha256" not in run.facts]
    commits = by_value(unhashed_policy, lambda run: run.facts.get("commit"))
    for what, values in (
        ("generation codes", policies),
        ("engines, not all with a recorded replay", {} if engines.keys() <= table.replayed else engines),
        ("versions of fast_dllm/", packages),
        ("commits", commits),
    ):
        if len(values) > 1:
            shown = values_with_names(values, lambda value: str(value)[:10])
            yield Match(_configs(runs), {"count": len(values), "what": what, "values": shown})
            return


def _same_value(value: object, expected: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(expected, (int, float)):
        return float(value) == float(expected)
    return str(value) == str(expected)


def contradicting_names(table: ResultTable) -> Iterator[Match]:
    """A configuration whose arguments are not those that its name announces."""
    for config, run in table.runs.items():
        for name, expected in table.announced(config).items():
            if name in run.arguments and not _same_value(run.arguments[name], expected):
                yield Match((config,), {"argument": name, "value": run.arguments[name], "expected": expected})


def mixed_arguments(table: ResultTable) -> Iterator[Match]:
    """An argument that differs between configurations, though neither the matrix nor a name announces it."""
    values: dict[str, dict[object, list[RunResult]]] = {}
    keys = {key for run in table.runs.values() for key in run.arguments if key not in NOT_MIXED_ARGUMENTS}
    for run in table.runs.values():
        if run.config.split("+")[0] not in table.matrix.configurations and not table.is_foreign:
            continue  # `plain` and other configurations outside the matrix are not compared with it
        for key in keys - table.announced(run.config).keys():
            value = run.arguments.get(key, "rows" if key == "refresh" else None)
            if value is not None:
                values.setdefault(key, {}).setdefault(str(value), []).append(run)
    for key, runs_of in sorted(values.items()):
        if len(runs_of) > 1:
            configs = _configs(run for runs in runs_of.values() for run in runs)
            yield Match(configs, {"argument": key, "values": values_with_names(runs_of)})


# ---- speeds ----


def _timed_runs(table: ResultTable) -> list[RunResult]:
    return [run for run in table.runs.values() if run.tokens_per_second]


def several_gpus(table: ResultTable) -> Iterator[Match]:
    runs = _timed_runs(table)
    kinds = by_value(runs, hardware)
    if len(kinds) > 1:
        yield Match(_configs(runs), {"values": values_with_names(kinds)})


def several_memory_sizes(table: ResultTable) -> Iterator[Match]:
    runs = _timed_runs(table)
    sizes = by_value(runs, lambda run: run.facts.get("gpu_memory_gb"))
    if len(by_value(runs, hardware)) == 1 and len(sizes) > 1:
        yield Match(_configs(runs), {"values": values_with_names(sizes)})


def interrupted(table: ResultTable) -> Iterator[Match]:
    runs = [run for run in _timed_runs(table) if was_interrupted(run)]
    if runs:
        yield Match(_configs(runs))


def several_batch_sizes(table: ResultTable) -> Iterator[Match]:
    runs = _timed_runs(table)
    sizes = by_value(runs, fact_of("batch_size"))
    if len(sizes) > 1:
        yield Match(_configs(runs), {"values": values_with_names(sizes)})


def several_process_counts(table: ResultTable) -> Iterator[Match]:
    runs = _timed_runs(table)
    counts = by_value(runs, processes_on_cpu)
    if len(counts) > 1:
        yield Match(_configs(runs), {"values": values_with_names(counts)})


def outliers_of_columns(table: ResultTable) -> Iterator[Match]:
    """The same work in one table, in OUTLIER times the time or less than that part of it."""
    if not table.runs:
        return
    for config, (run, peers) in outliers(table).items():
        ratio = median(timed(peers)) / timed([run])[0]
        if ratio < 1 and len(peers) == 1:
            continue  # of two runs the slower one is the outlier
        same_tokens = len({one.new_tokens for one in (run, *peers)}) == 1
        yield Match(
            (config,),
            {
                "ratio": f"{ratio:.1f}" if ratio > 1 else f"only {ratio:.2f}",
                "peers": listed(_configs(peers)),
                "work": f"{run.new_tokens:,} tokens" if same_tokens else "work",
            },
        )


def slower_than_without_reuse(table: ResultTable) -> Iterator[Match]:
    """Every column of a k is slower than k = 1 on the same hardware: nothing was saved."""
    odd = outliers(table)
    runs = [
        run
        for config, run in table.runs.items()
        if run.tokens_per_second and config not in odd and "+" not in config and (run.reuse_k or 1) > 1
    ]
    for k, group in sorted(by_value(runs, lambda run: run.reuse_k).items()):
        ratios = [speed / base for run in group if (base := reference_speed(table, run)) for speed in timed([run])]
        if ratios and max(ratios) < 1 and median(ratios) < 1 - NOISE:
            yield Match(_configs(group), {"k": k, "ratio": f"{median(ratios):.2f}"})


# ---- foreign results ----


def not_recorded(table: ResultTable) -> Iterator[Match]:
    """Facts that no summary of a foreign table has."""
    runs = list(table.runs.values())
    lacking = [name for name, value_of in RECORDED.items() if all(value_of(run) is None for run in runs)]
    if table.is_foreign and runs and lacking:
        yield Match(_configs(runs), {"lacking": ", ".join(lacking)})


def without_time(table: ResultTable) -> Iterator[Match]:
    """Foreign runs without a time, where other runs of the table have one."""
    untimed = [run for run in table.runs.values() if not run.scored and run.tokens_per_second is None]
    if table.is_foreign and untimed and len(untimed) < len(table.runs):
        yield Match(_configs(untimed))


def uncommitted_changes(table: ResultTable) -> Iterator[Match]:
    dirty = [run for run in table.runs.values() if run.facts.get("dirty")]
    if table.is_foreign and dirty:
        yield Match(_configs(dirty))


# ---- several tables ----


def plain_differs(tables: list[ResultTable]) -> Iterator[Match]:
    """Plain decoding of the same settings by the same model, and other answers in one experiment than in the others.

    Which one is wrong is not known. The alarm goes to the experiments that agree with fewer others; between two, to
    the one that is no control.
    """
    groups: dict[tuple, list[RunResult]] = {}
    for table in tables:
        for run in table.runs.values():
            if table.is_foreign or table.is_scored or not is_plain(run, table) or _rounding_depends_on_batch(run):
                continue
            settings, facts = plain_settings(run), tuple(str(run.facts.get(name)) for name in CIRCUMSTANCES)
            if settings is not None:
                groups.setdefault((table.task, table.limit, settings, facts), []).append(run)
    controls = {table.label for table in tables if table.is_control}
    for group in groups.values():
        results = distinct(group, whatever_k=True)
        results.sort(
            key=lambda runs: (-len({run.table for run in runs}), not any(run.table in controls for run in runs))
        )
        trusted = results[0][0]
        agreeing = {run.table for run in results[0]}  # where their own columns differ, another rule says so
        for result in results[1:]:
            for label, runs in by_value(result, lambda run: run.table).items():
                flips = num_flips(runs[0], trusted)
                if flips and label not in agreeing:
                    yield Match(_configs(runs), {"other": f"{trusted.table}/{trusted.config}", "flips": flips}, label)


def _rounding_depends_on_batch(run: RunResult) -> bool:
    """In 16 bits the rounding of a product depends on the other rows of the batch, and some answers follow it."""
    return run.facts.get("dtype") != "float32" and str(run.facts.get("batch_size")) != "1"


def accuracies_of_another_table(tables: list[ResultTable]) -> Iterator[Match]:
    """From totals: every accuracy of one table is another's to the digit, though its answers are not the same."""
    for first, second in combinations([table for table in tables if not table.is_scored], 2):
        if (first.task, first.limit, first.is_foreign) != (second.task, second.limit, second.is_foreign):
            continue  # two runners may count tokens in two ways
        common = [(first.runs[name], second.runs[name]) for name in first.runs if name in second.runs]
        common = [pair for pair in common if not (pair[0].questions and pair[1].questions)]
        changed = [(a, b) for a, b in common if a.new_tokens and b.new_tokens and a.new_tokens != b.new_tokens]
        if len(common) < FEWEST_CELLS or not changed or any(a.accuracy != b.accuracy for a, b in common):
            continue
        counts = [a.counts for a, _ in changed]
        if None in counts:
            continue
        chance = 1.0
        for pair in counts:
            chance *= tie_probability(*pair) if pair else 1.0
        if chance >= ALPHA:
            continue
        older, newer = sorted((first, second), key=_last_time)
        values = {"total": len(common), "older": older.label, "changed": len(changed), "chance": f"{chance:.1g}"}
        yield Match(_configs(a for a, _ in common), values, newer.label)


def _last_time(table: ResultTable) -> str:
    return max(str(run.facts.get("time", "")) for run in table.runs.values())


def experiments_differ(tables: list[ResultTable], facts: tuple[str, ...]) -> Iterator[Match]:
    """The first of the facts in which experiments that share a picture differ."""
    runs = [run for table in tables if not table.is_foreign for run in table.runs.values()]
    if len({run.table for run in runs}) < 2:
        return
    for fact in facts:
        labels: dict[object, dict[str, None]] = {}
        for run in runs:
            if run.facts.get(fact) is not None:
                labels.setdefault(str(run.facts[fact]), {})[run.table] = None
        if len(labels) > 1 and len({tuple(names) for names in labels.values()}) > 1:
            values = "; ".join(f"{short_value(value)} ({', '.join(names)})" for value, names in labels.items())
            yield Match((), {"fact": fact, "values": values}, ALL_TABLES)
            return


def outliers_across(tables: list[ResultTable]) -> Iterator[Match]:
    """Runs that took OUTLIER times as long as the very same forwards in another experiment."""
    for label, slow, peers, ratio in slow_groups(tables):
        whose = "its speed was" if len(slow) == 1 else "their speeds were"
        yield Match(_configs(slow), {"ratio": f"{ratio:.1f}", "peers": listed(peers), "whose": whose}, label)
