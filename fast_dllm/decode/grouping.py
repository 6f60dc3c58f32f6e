"""Which sequences share a forward. Pure functions: no tensors, no model, no state.

A forward by itself costs reading every weight (on a GPU) or some hundreds of small operations (on a CPU). So sequences
that ask for forwards of one width share one. Which rows are read, and whether the block is committed, may differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fast_dllm.decoding import FORWARD_KINDS, Forward

PADDED_TOKENS = 64  # tokens of padding that one sequence of a shared prefill may run
JOINING_BLOCKS = 4  # a prefill of at most this many blocks runs inside the forwards of other sequences
# If a forward's time grows with its rows, a group of more rows than this is divided by the lengths of the sequences,
# because the mask, and the masked keys that shorter sequences read, would cost more than one more forward.
ROWS_OF_ONE_LENGTH = 256


@dataclass(frozen=True)
class PendingForward:
    """A forward that a sequence waits for.

    cache_row: the sequence's row in the cache. length: its committed positions there. num_prefilled: how many tokens of
    this prefill have run, 0 unless it runs block by block beside other sequences.
    """

    cache_row: int
    forward: Forward
    length: int
    num_prefilled: int = 0


@dataclass(frozen=True)
class GroupMember:
    """One sequence of a group and what it runs: the forward that it waits for or, if `is_prefill_block`, the next block
    of its prefill, as a block of known tokens that is run and committed."""

    cache_row: int
    forward: Forward
    length: int
    is_prefill_block: bool = False


Group = list[GroupMember]


def group_forwards(pending: Sequence[PendingForward], block_size: int, *, pays_by_row: bool) -> list[Group]:
    """The forwards to run now: each sequence is in exactly one group, and one group is one forward.

    pays_by_row: whether a forward's time grows with its rows; then large groups are divided by length. A short prefill
    joins a forward of whole blocks that runs anyway, block by block; the other prefills have forwards of their own.
    """
    groups: dict[Hashable, Group] = {}
    prefills: list[PendingForward] = []
    for each in pending:
        if each.forward.kind == "prefill":
            prefills.append(each)
        else:
            member = GroupMember(each.cache_row, each.forward, each.length)
            groups.setdefault(_shape(each.forward), []).append(member)
    whole_blocks = ("block", block_size, None)
    has_whole_blocks = whole_blocks in groups
    separate: Group = []
    for each in prefills:
        is_short = len(each.forward.token_ids) <= JOINING_BLOCKS * block_size
        if each.num_prefilled or (has_whole_blocks and is_short):
            groups.setdefault(whole_blocks, []).append(_next_prefill_block(each, block_size))
        else:
            separate.append(GroupMember(each.cache_row, each.forward, each.length))
    divided = [part for group in groups.values() for part in (_by_length(group) if pays_by_row else [group])]
    return [*divided, *prefills_of_like_length(separate)]


def _shape(forward: Forward) -> Hashable:
    """Forwards with equal values can be one."""
    if not FORWARD_KINDS[forward.kind].runs_layers:
        return "read again", len(forward.wanted)
    return "block", len(forward.token_ids), forward.reuse and forward.reuse.store_key


def _next_prefill_block(pending: PendingForward, block_size: int) -> GroupMember:
    """The next block of a prefill as an ordinary committed block. Its last block predicts what the prefill wants."""
    prefill, start = pending.forward, pending.num_prefilled
    stop = start + block_size
    is_last = stop == len(prefill.token_ids)
    wanted = range(block_size, block_size + len(prefill.wanted)) if is_last else range(0)
    block = Forward("commit", prefill.token_ids[start:stop], wanted=wanted)
    return GroupMember(pending.cache_row, block, pending.length, is_prefill_block=True)


def _by_length(group: Group) -> list[Group]:
    """A group divided so that sequences of one length run together. A part that has fewer than ROWS_OF_ONE_LENGTH rows
    also takes the next length. Within a part the members are in the order of their cache rows."""
    if _num_rows(group) <= ROWS_OF_ONE_LENGTH:
        return [group]
    parts: list[Group] = []
    for member in sorted(group, key=lambda each: each.length):
        is_full = bool(parts) and _num_rows(parts[-1]) >= ROWS_OF_ONE_LENGTH
        if not parts or (is_full and parts[-1][-1].length != member.length):
            parts.append([])
        parts[-1].append(member)
    return [sorted(part, key=lambda each: each.cache_row) for part in parts]


def _num_rows(group: Group) -> int:
    """Rows that the group's forward runs, those of guesses included."""
    return sum(len(state.token_ids) for member in group for state in member.forward.states)


def prefills_of_like_length(prefills: Group) -> list[Group]:
    """Prefills that share a forward, the longest first. The others of a group are padded to the length of its longest,
    which none is more than PADDED_TOKENS shorter than."""
    groups: list[Group] = []
    for member in sorted(prefills, key=lambda each: -len(each.forward.token_ids)):
        longest = len(groups[-1][0].forward.token_ids) if groups else 0
        if not groups or longest - len(member.forward.token_ids) > PADDED_TOKENS:
            groups.append([])
        groups[-1].append(member)
    return groups
