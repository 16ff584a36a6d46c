"""Which of a batch's settings are made again, for which ranges, after it met its deadline."""

from __future__ import annotations

import numpy as np
import pytest

from vmdedup.inject.scratch import call_rows
from vmdedup.linux import mman
from vmdedup.linux.syscalls import NR
from vmdedup.remap.advice import settings_within

pytestmark = pytest.mark.unit

NODES = 0b101
NOTHING = [NR.GETPID, 0, 0, 0]


def advice(start: int, length: int, which: int) -> tuple[int, ...]:
    return (NR.MADVISE, start, length, which)


BATCH = call_rows(
    [
        (NR.MMAP, 100, 10, 3),
        (NR.MREMAP, 9000, 20, 20, 3, 200),
        (NR.GETPID, NODES),
        advice(100, 120, mman.MADV_DONTFORK),
        advice(200, 20, mman.MADV_HUGEPAGE),
        advice(300, 10, mman.MADV_NOHUGEPAGE),
        (NR.MBIND, 100, 220, 2, 7777, 65),
    ]
)


def within(*ranges: tuple[int, int]) -> list[list[int]]:
    start, end = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    before = BATCH.copy()
    found = settings_within(BATCH, start, end)
    assert (before == BATCH).all()
    assert (found[-1, 3:6] == before[-1, 3:6]).all() or found[-1, 0] == NR.GETPID
    return [[int(value) for value in row[:4]] for row in found]


def test_only_what_was_placed_gets_settings_and_each_row_keeps_its_place() -> None:
    nodes = [NR.GETPID, NODES, 0, 0]
    assert within((100, 110)) == [
        NOTHING,
        NOTHING,
        nodes,
        [NR.MADVISE, 100, 10, mman.MADV_DONTFORK],
        NOTHING,  # its range was not placed: it still shows the store, or zeroes
        NOTHING,
        [NR.MBIND, 100, 10, 2],
    ]
    assert within((200, 220), (100, 110)) == [
        NOTHING,
        NOTHING,
        nodes,
        [NR.MADVISE, 100, 120, mman.MADV_DONTFORK],
        [NR.MADVISE, 200, 20, mman.MADV_HUGEPAGE],
        NOTHING,
        [NR.MBIND, 100, 120, 2],
    ]


def test_a_setting_is_cut_to_the_part_of_its_range_that_was_placed() -> None:
    found = within((205, 210), (300, 310))
    assert found[3:] == [
        [NR.MADVISE, 205, 5, mman.MADV_DONTFORK],
        [NR.MADVISE, 205, 5, mman.MADV_HUGEPAGE],
        [NR.MADVISE, 300, 10, mman.MADV_NOHUGEPAGE],
        [NR.MBIND, 205, 105, 2],
    ]


def test_where_nothing_was_placed_nothing_is_set() -> None:
    assert {row[0] for row in within()} == {NR.GETPID}
