"""Checks the forwards that a policy asks for, so that it never reads values that are not of its forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fast_dllm.decode.sequences import SequenceState, contains, rows_run
from fast_dllm.decoding import FORWARD_KINDS, GUESSED_KINDS, MOST_STATES, Forward
from fast_dllm.sampling import MEASURES


def check_forward(sequence: SequenceState, item: object) -> Forward:
    """Return what the policy yielded if it is a forward that can be run; else raise TypeError or ValueError."""
    if not isinstance(item, Forward):
        raise TypeError(f"decode_one yielded {item!r}; it yields Forward and DenoisingEvent")
    if item.kind not in FORWARD_KINDS:
        raise ValueError(f"unknown kind of forward {item.kind!r}; there are: {', '.join(FORWARD_KINDS)}")
    if item.kind in GUESSED_KINDS.values():
        raise ValueError(f"a policy asks for a {item.kind} forward by its plain kind, as for one that runs")
    _check_guesses(item, sequence.answer.options.block_size)
    for positions in (item.wanted, item.keep):
        if positions.step != 1:
            raise ValueError(f"a forward's positions must be consecutive, not {positions}")
    if item.measure and (item.measure not in MEASURES or item.kind == "reused"):
        raise ValueError(f"no {item.measure!r} of a {item.kind} forward; a forward measures {', '.join(MEASURES)}")
    positions = sequence.readable.positions if item.kind == "reused" else item.predicted_positions
    if item.wanted and not contains(positions, item.wanted):
        raise ValueError(f"positions {item.wanted} are wanted, but only {positions} are kept")
    if item.kind != "reused" and item.reuse is not None:
        _check_store(item, sequence.times_stored)
    reads_cache = item.kind in ("sub", "partial") or (item.reuse is not None and (item.reuse.read or item.reuse.decide))
    if reads_cache and not sequence.is_block_cached:
        raise ValueError(f"a {item.kind} forward reads the block cache, which a forward with guesses does not write")
    return item


def _check_guesses(forward: Forward, block_size: int) -> None:
    """Raises ValueError for guesses that cannot run beside this forward."""
    states = forward.states
    if len(states) == 1:
        return
    if len(states) > MOST_STATES:
        raise ValueError(f"a forward runs at most {MOST_STATES} states, not {len(states)}")
    for number, state in enumerate(states):
        is_whole_block = state.kind in GUESSED_KINDS and state.offset == 0 and len(state.token_ids) == block_size
        if not is_whole_block or state.reuse is not None or state.measure or (number and state.guesses):
            raise ValueError(f"state {number} of a forward with guesses is no plain full or commit forward of a block")
        if state.continues is not None:
            before = states[state.continues] if number and state.continues in range(len(states)) else state
            if before.continues is not None or before is state:
                raise ValueError(f"guess {number} continues state {state.continues}, which is none of this block")


def _check_store(forward: Forward, times_stored: Mapping[tuple[range, str, int], Counter[int]]) -> None:
    """Raises ValueError for a forward that may read rows of a store which were not stored often enough."""
    reuse = forward.reuse
    assert reuse is not None, "only called for a forward with reuse"
    times, rows = times_stored.get(reuse.store_key, Counter()), rows_run(forward)
    needed = 2 if reuse.order and reuse.ahead else 1
    if (reuse.read or reuse.decide) and any(times[row] < needed for row in rows):
        how_often = "stored" if needed == 1 else "stored twice"
        raise ValueError(f"block rows {rows} are read from layers {reuse.layers} before all of them were {how_often}")
