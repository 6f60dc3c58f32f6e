"""Which sequences share a forward (fast_dllm.decode.grouping)."""

from __future__ import annotations

import random

import pytest

from fast_dllm.decode.grouping import PendingForward, group_forwards
from fast_dllm.decoding import Forward, Reuse

SIZE = 32


def pending(cache_row: int, kind: str, num_tokens: int = SIZE, length: int = 0, **about) -> PendingForward:
    num_prefilled = about.pop("num_prefilled", 0)
    return PendingForward(cache_row, Forward(kind, list(range(num_tokens)), **about), length, num_prefilled)


def grouped(waiting: list[PendingForward], *, pays_by_row: bool = False) -> list[list[int]]:
    """The groups' cache rows."""
    groups = group_forwards(waiting, SIZE, pays_by_row=pays_by_row)
    return [[member.cache_row for member in group] for group in groups]


def test_forwards_of_one_width_share_one_whatever_they_read_or_commit():
    waiting = [
        pending(0, "full", wanted=range(8)),
        pending(1, "sub", 8, offset=8),
        pending(2, "commit", wanted=range(32, 33)),
        pending(3, "sub", 8, offset=24),
        pending(4, "sub", 9),
    ]
    assert grouped(waiting) == [[0, 2], [1, 3], [4]]


def test_forwards_that_store_share_one_only_with_those_of_the_same_store():
    middle, last = Reuse(range(8, 20), "output"), Reuse(range(20, 32), "output")
    waiting = [
        pending(0, "full", reuse=middle),
        pending(1, "full"),
        pending(2, "full", reuse=Reuse(range(8, 20), "output", read=True)),
        pending(3, "full", reuse=last),
        pending(4, "full", reuse=Reuse(range(8, 20), "residual")),
        pending(5, "full", reuse=Reuse(range(8, 20), "output", order=1)),
    ]
    assert grouped(waiting) == [[0, 2], [1], [3], [4], [5]]


def test_steps_that_read_again_share_a_draw_of_one_width():
    waiting = [pending(0, "reused", 0, wanted=range(8)), pending(1, "reused", 0, wanted=range(8, 16))]
    waiting += [pending(2, "reused", 0, wanted=range(4)), pending(3, "full")]
    assert grouped(waiting) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((128, 64), [[128, 64]]),
        ((128, 32), [[128], [32]]),
        ((32, 128, 96, 64), [[128, 96, 64], [32]]),
        ((32, 64, 96, 128, 160), [[160, 128, 96], [64, 32]]),
    ],
)
def test_prefills_share_a_forward_where_little_is_padded(lengths, expected):
    waiting = [pending(row, "prefill", length) for row, length in enumerate(lengths)]
    assert [[lengths[row] for row in group] for group in grouped(waiting)] == expected


def blocks_of(waiting: list[PendingForward], cache_row: int) -> list[Forward]:
    """What one sequence runs, group by group, its prefill's blocks counted."""
    blocks, num_prefilled = [], 0
    while True:
        waiting = [
            PendingForward(each.cache_row, each.forward, each.length, num_prefilled)
            if each.cache_row == cache_row
            else each
            for each in waiting
        ]
        (member,) = [
            member
            for group in group_forwards(waiting, SIZE, pays_by_row=False)
            for member in group
            if member.cache_row == cache_row
        ]
        if not member.is_prefill_block:
            return [*blocks, member.forward]
        blocks.append(member.forward)
        num_prefilled += SIZE
        if num_prefilled == len(waiting[0].forward.token_ids):
            return blocks


def test_a_short_prefill_runs_block_by_block_beside_whole_blocks():
    waiting = [pending(0, "prefill", 96, wanted=range(96, 97)), pending(1, "full")]
    assert grouped(waiting) == [[1, 0]]
    blocks = blocks_of(waiting, 0)
    assert [block.kind for block in blocks] == ["commit"] * 3
    assert [token for block in blocks for token in block.token_ids] == list(range(96))
    assert [block.wanted for block in blocks] == [range(0), range(0), range(32, 33)], "the last one predicts"


@pytest.mark.parametrize("beside", [pending(1, "sub", 8), pending(1, "full", reuse=Reuse(range(1, 3), "output"))])
def test_a_prefill_has_a_forward_of_its_own_where_no_whole_block_runs(beside):
    assert grouped([pending(0, "prefill", 64), beside]) == [[1], [0]]


def test_a_long_prefill_has_a_forward_of_its_own():
    assert grouped([pending(0, "prefill", 160), pending(1, "full")]) == [[1], [0]]
    assert grouped([pending(0, "prefill", 128), pending(1, "full")]) == [[1, 0]]


def test_a_prefill_that_has_begun_block_by_block_goes_on_so():
    assert grouped([pending(0, "prefill", 96, num_prefilled=32), pending(1, "sub", 8)]) == [[1], [0]]
    (_, (member,)) = group_forwards(
        [pending(0, "prefill", 96, num_prefilled=32), pending(1, "sub", 8)], SIZE, pays_by_row=False
    )
    assert member.is_prefill_block
    assert member.forward.token_ids == list(range(32, 64))


def test_every_sequence_is_in_exactly_one_group():
    rng = random.Random(0)
    for _ in range(200):
        waiting = []
        for row in range(rng.randrange(1, 30)):
            kind = rng.choice(("prefill", "full", "sub", "commit", "reused"))
            width = {"prefill": rng.randrange(1, 8) * SIZE, "sub": 8, "reused": 0}.get(kind, SIZE)
            waiting.append(pending(row, kind, width, length=rng.randrange(4) * SIZE))
        for pays_by_row in (False, True):
            groups = grouped(waiting, pays_by_row=pays_by_row)
            assert sorted(row for group in groups for row in group) == list(range(len(waiting)))
