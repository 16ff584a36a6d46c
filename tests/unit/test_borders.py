"""Wrong numbers end in one clear error, and in no call: nothing beside an array is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vmdedup.doctor.probes import sorts_rightly
from vmdedup.errors import BorderError
from vmdedup.guest.page_reader import copies_at
from vmdedup.guest.vm_readv import page_buffer, read_runs
from vmdedup.linux.borders import require_inside, require_lengths, require_runs
from vmdedup.linux.pagemap import Pagemap
from vmdedup.linux.syscall_batch import call_table, run_table
from vmdedup.store.stable_store import PublishedPages
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit

Int64s = npt.NDArray[np.int64]
PAGES = 16
BESIDE = 99


def ints(*numbers: int) -> Int64s:
    return np.array(numbers, dtype=np.int64)


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap("us", os.getpid()) as own:
        yield own


@pytest.mark.parametrize(
    ("first", "pages"),
    [
        ([8, 4], [1, 1]),  # as an argsort gave them on an emulated CPU
        ([4, 900_000, 8], [1, 1, 1]),  # the same, far apart
        ([4, 5], [2, 1]),
        ([4], [0]),
        ([4, 6], [-1, 1]),
        ([4, 6], [1]),
        ([0.5], [1]),
        ([-4], [1]),
    ],
)
def test_runs_that_do_not_ascend(pagemap: Pagemap, first: list[float], pages: list[int]) -> None:
    start = (np.array(first) * PAGE_BYTES).astype(np.int64)
    with pytest.raises(BorderError):
        require_runs(start, np.array(pages))
    with pytest.raises(BorderError):
        pagemap.entries_of(start, np.array(pages))


def test_a_buffer_too_small_for_what_is_copied() -> None:
    """Nothing is written behind it."""
    memory = np.full((PAGES, PAGE_BYTES), BESIDE, dtype=np.uint8)
    source = page_buffer(PAGES)
    source[:] = 1
    where = ints(source.ctypes.data)
    for pages in (ints(8), ints(-1)):
        with pytest.raises(BorderError):
            read_runs("us", os.getpid(), where, pages, memory[:4])
    with pytest.raises(BorderError):
        read_runs("us", os.getpid(), where, ints(2), memory[::2])
    with pytest.raises(BorderError):
        copies_at("us", os.getpid(), where, 0, memory[::2])
    assert (memory == BESIDE).all()


def test_slots_beyond_what_is_mapped() -> None:
    fd = os.memfd_create("store")
    try:
        os.ftruncate(fd, PAGES * PAGE_BYTES)
        with PublishedPages(fd, PAGES) as published:
            assert len(published.address(np.array([0, PAGES - 1], dtype=np.int32))) == 2
            for slot in (-1, PAGES):
                with pytest.raises(BorderError):
                    published.address(np.array([0, slot], dtype=np.int32))
    finally:
        os.close(fd)


@pytest.mark.parametrize("rows", [np.zeros((3, 6), np.uint64), np.zeros((3, 7), np.int64)])
def test_calls_of_another_shape(rows: npt.NDArray[Any]) -> None:
    with pytest.raises(BorderError):
        call_table(rows)


def test_a_table_of_half_a_row() -> None:
    table = np.zeros((2, 8), dtype=np.uint64)
    first = table.ctypes.data
    for behind in (first + 60, first - 64):
        with pytest.raises(BorderError):
            run_table(first, behind)


def test_this_processor_sorts_rightly() -> None:
    assert sorts_rightly()


def test_ranges_and_lengths() -> None:
    require_inside(ints(4), ints(8), 4, 8)
    require_inside(ints(), ints(), 4, 8)
    require_lengths(ints(1, 3), 4)
    for start, end in ((3, 8), (4, 9), (7, 6)):
        with pytest.raises(BorderError):
            require_inside(ints(start), ints(end), 4, 8)
    for pages in (ints(1, 4), ints(0), ints(5, -1)):
        with pytest.raises(BorderError):
            require_lengths(pages, 4)
