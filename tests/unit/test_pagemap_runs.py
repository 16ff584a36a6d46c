"""Page table entries of many runs, read in as few calls as their gaps allow."""

from __future__ import annotations

import mmap
import os

import numpy as np

from vmdedup.linux.pagemap import ENTRY_PRESENT, Pagemap
from vmdedup.units import PAGE_BYTES

PAGES = 3000


def test_runs_get_the_entries_that_each_page_has() -> None:
    with mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(0, PAGES, 3):
            memory[page * PAGE_BYTES] = 1
        column = np.frombuffer(memory, dtype=np.uint8)
        base = column.ctypes.data
        # Neighbours, a narrow gap, a wide one, one page, up to the end.
        first = np.array([0, 5, 20, 200, 201, 2990])
        pages = np.array([5, 4, 7, 1, 30, 10])
        with Pagemap("vm", os.getpid()) as pagemap:
            whole = pagemap.entries(base, PAGES)
            found = pagemap.entries_of(base + first * PAGE_BYTES, pages)
            near = pagemap.entries_of(base + first[:5] * PAGE_BYTES, pages[:5])
            nothing = pagemap.entries_of(first[:0], pages[:0])
        wanted = [whole[f : f + n] for f, n in zip(first.tolist(), pages.tolist(), strict=True)]
        del column
    assert np.array_equal(found, np.concatenate(wanted))
    assert np.array_equal(near, found[: pages[:5].sum()])
    assert 0 < np.count_nonzero(found & ENTRY_PRESENT) < len(found)
    assert len(nothing) == 0
