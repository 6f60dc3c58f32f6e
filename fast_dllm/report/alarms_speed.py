"""Alarms about speeds: what cannot stand in one column, and reuse that costs more than it saves."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

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
    for fact, what in (("batch_size", "batch sizes"), ("num_processes", "numbers of processes")):
        values = by_value(runs, fact_of(fact))
        if len(values) > 1:
            text = f"speeds at different {what}: {told(values)}"
            found.append(Alarm(f"mixed_{fact}", table.label, tuple(r.config for r in runs), "speed", text))
    return found + outlier_alarms(table) + slower(table)


def _alike(run: Run, other: Run) -> bool:
    """The same work under the same conditions."""
    same = all(
        run.facts.get(name) == other.facts.get(name) for name in ("gpu", "device", "batch_size", "num_processes")
    )
    tokens = run.new_tokens or 0, other.new_tokens or 0
    return same and max(tokens) - min(tokens) <= EQUAL_WORK * max(tokens)


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


def reference_speed(table: Table, run: Run) -> float | None:
    """New tokens a second of the table's k = 1 under the run's conditions: the median of its usual columns."""
    odd = outliers(table)
    alike = [
        one
        for name, one in table.runs.items()
        if one.reuse_k == 1 and one.arguments.get("layer_subset") and name not in odd
        if all(one.facts.get(n) == run.facts.get(n) for n in ("gpu", "device", "batch_size", "num_processes"))
        if "+" not in name and (one.facts.get("num_segments") or 1) == 1
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
