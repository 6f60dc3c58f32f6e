"""Alarms about speeds: what cannot stand in one column, and reuse that costs more than it saves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import median, median_low

from fast_dllm.report.alarms import NOTE, Alarm, by_value, fact_of, listed, told
from fast_dllm.report.compare import columns
from fast_dllm.report.summaries import Run, Table

EQUAL_WORK = 0.05  # token counts this close are the same work
OUTLIER = 1.5  # the same work on the same GPU in half as long again is another kind of run
NOISE = 0.05  # two timings of one thing


def hardware(run: Run) -> str | None:
    """The GPU's name, or the device."""
    return run.facts.get("gpu") or run.facts.get("device")


def speed_alarms(table: Table) -> list[Alarm]:
    runs = [run for run in table.runs.values() if run.tokens_per_second]
    found = []
    kinds = by_value(runs, hardware)
    if len(kinds) > 1:
        text = f"speeds from different hardware: {told(kinds)}"
        found.append(Alarm("mixed_gpu", table.label, tuple(r.config for r in runs), "speed", text))
    memory = by_value(runs, lambda run: run.facts.get("gpu_memory_gb"))
    if len(kinds) == 1 and len(memory) > 1:
        text = f"GPUs of one name with different memory in use (error correction on and off?): {told(memory)}"
        found.append(Alarm("gpu_memory", table.label, tuple(r.config for r in runs), "speed", text, NOTE))
    pieces = [run for run in runs if (run.facts.get("num_segments") or 1) > 1]
    if pieces:
        text = f"interrupted and continued, so each piece warmed up again: {listed(r.config for r in pieces)}"
        found.append(Alarm("several_segments", table.label, tuple(r.config for r in pieces), "speed", text))
    for fact, what, value_of in (
        ("batch_size", "batch sizes", fact_of("batch_size")),
        ("num_processes", "numbers of processes on one CPU", _sharing),
    ):
        values = by_value(runs, value_of)
        if len(values) > 1:
            text = f"speeds at different {what}: {told(values)}"
            found.append(Alarm(f"mixed_{fact}", table.label, tuple(r.config for r in runs), "speed", text))
    return found + outlier_alarms(table) + slower(table)


def _sharing(run: Run) -> int | None:
    """Processes, of all shares, that had the CPU between them; None on GPUs: each process has one of its own there, and
    its seconds are counted by themselves."""
    if run.facts.get("device") != "cpu":
        return None
    return (run.facts.get("num_processes") or 1) * (run.facts.get("num_shares") or 1)


def conditions(run: Run) -> tuple:
    """What two runs must have in common before their speeds can be compared."""
    graphs = run.facts.get("graphs") or "off"  # before there were any
    return (*(run.facts.get(name) for name in ("gpu", "device", "batch_size")), graphs, _sharing(run))


def _alike(run: Run, other: Run) -> bool:
    """The same work under the same conditions."""
    tokens = run.new_tokens or 0, other.new_tokens or 0
    return conditions(run) == conditions(other) and max(tokens) - min(tokens) <= EQUAL_WORK * max(tokens)


def outliers(table: Table) -> dict[str, tuple[Run, list[Run]]]:
    """Configuration -> (its run, runs of the same work) where their times are OUTLIER apart and it is the odd one."""
    found = {}
    for groups in columns(table).values():
        for group in groups:
            timed = [(run, speed) for run in group if (speed := run.tokens_per_second)]
            for run, own in timed:
                peers = [(other, speed) for other, speed in timed if other is not run and _alike(run, other)]
                if not peers:
                    continue
                speeds = [speed for _, speed in peers]
                middle, spread = median(speeds), max(speeds) / min(speeds)
                ratio = max(own / middle, middle / own)
                if ratio >= OUTLIER and (spread < OUTLIER or len(peers) == 1):
                    found[run.config] = (run, [other for other, _ in peers])
    return found


def outlier_alarms(table: Table) -> list[Alarm]:
    found = []
    for config, (run, peers) in outliers(table).items():
        ratio = median(_speeds(peers)) / _speeds([run])[0]
        if ratio < 1 and len(peers) == 1:
            continue  # of two, the slower one is told about
        words = f"{ratio:.1f} times as long as" if ratio > 1 else f"only {ratio:.2f} times as long as"
        same = len({r.new_tokens for r in (run, *peers)}) == 1
        text = (
            f"{config} took {words} {listed(p.config for p in peers)} for the same "
            f"{f'{run.new_tokens:,} tokens' if same else 'work'}: its speed is of another kind of run"
        )
        found.append(Alarm("speed_outlier", table.label, (config,), "speed", text))
    return found


def _speeds(runs: Iterable[Run]) -> list[float]:
    """New tokens a second, of those that have been timed."""
    return [speed for run in runs if (speed := run.tokens_per_second)]


def _same_forwards(table: Table, run: Run) -> tuple | None:
    """What makes two timings comparable to the last forward; None where the run does not count them."""
    if table.is_foreign or not run.forwards or not run.tokens_per_second or (run.facts.get("num_segments") or 1) > 1:
        return None
    model = tuple(str(run.facts.get(name)) for name in ("model", "model_revision", "dtype"))
    return (*model, *map(str, conditions(run)), run.new_tokens, run.layers_run, *sorted(run.forwards.items()))


def outliers_across(tables: list[Table]) -> list[Alarm]:
    """Runs that did another table's very forwards on the same hardware in OUTLIER times as long, all in one picture.

    Of each table its slow runs are told together. The usual time is the median over all runs with these forwards.
    """
    groups: dict[tuple, list[tuple[Table, Run, float]]] = {}
    for table in tables:
        for run in table.runs.values():
            key, seconds = _same_forwards(table, run), run.seconds
            if key is not None and seconds:
                groups.setdefault(key, []).append((table, run, seconds))
    found = []
    for members in groups.values():
        usual = median_low([seconds for _, _, seconds in members])
        for label in dict.fromkeys(table.label for table, _, _ in members):
            slow = [(r, s) for t, r, s in members if t.label == label and s >= OUTLIER * usual]
            peers = [f"{t.label}/{r.config}" for t, r, s in members if t.label != label and s < OUTLIER * usual]
            if slow and peers:
                worst = max(s for _, s in slow) / usual
                names = tuple(r.config for r, _ in slow)
                whose = "its speed is" if len(slow) == 1 else "their speeds are"
                text = (
                    f"{listed(names)} took up to {worst:.1f} times as long as the very same forwards in "
                    f"{listed(peers)}: {whose} of another kind of run"
                )
                found.append(Alarm("speed_outlier", label, names, "speed", text))
    return found


def reference_speed(table: Table, run: Run, odd: Collection[str] = ()) -> float | None:
    """New tokens a second of the table's k = 1 under the run's conditions: the median of its usual columns.

    In a table without such columns it is that of the run that its matrix compares with. odd: configurations that are
    known, from other tables, to be timed otherwise.
    """
    odd = {*odd, *outliers(table)}
    ones = [one for one in table.runs.values() if one.reuse_k == 1 and one.arguments.get("layer_subset")]
    named = table.runs.get(table.matrix.compare_with or "")
    alike = [
        one
        for one in ones or ([named] if named else [])
        if conditions(one) == conditions(run)
        and one.config not in odd
        and "+" not in one.config
        and (one.facts.get("num_segments") or 1) == 1
    ]
    speeds = _speeds(alike)
    return median(speeds) if speeds else None


def slower(table: Table) -> list[Alarm]:
    """Reuse whose every column is slower than k = 1 on the same hardware: nothing was saved."""
    found = []
    odd = outliers(table)
    by_k = by_value(
        (
            r
            for n, r in table.runs.items()
            if r.tokens_per_second and n not in odd and "+" not in n and (r.reuse_k or 1) > 1
        ),
        lambda run: run.reuse_k,
    )
    for k, runs in sorted(by_k.items()):
        ratios = [(run, reference_speed(table, run)) for run in runs]
        shares = [speed / base for run, base in ratios if base for speed in _speeds([run])]
        if shares and max(shares) < 1 and median(shares) < 1 - NOISE:
            text = (
                f"k = {k} is slower than k = 1 on the same hardware ({median(shares):.2f} times its tokens/s): "
                "this reuse saved nothing"
            )
            found.append(Alarm("reuse_slower", table.label, tuple(r.config for r in runs), "speed", text))
    return found
