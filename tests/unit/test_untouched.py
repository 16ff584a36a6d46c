"""Guest memory that nobody touched takes next to none of ours."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vmdedup.core.rmap import PageColumns
from vmdedup.guest.mapping_state import read_mapping_state
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import PFNZERO, PRESENT, Pagemap, has_pagemap_scan
from vmdedup.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.unit


GUEST_BYTES = 4096 * MIB
TOUCHED = (0, 77, 300_000, GUEST_BYTES // PAGE_BYTES - 1)


@dataclass(frozen=True)
class _Guest:
    start: int
    size_bytes: int = GUEST_BYTES


def taken_pages(column: npt.NDArray[np.generic]) -> int:
    """Pages of our own that a column occupies; the kernel's zero page is none."""
    pages = column.nbytes // PAGE_BYTES
    with Pagemap("vmdedup", os.getpid(), use_scan=has_pagemap_scan()) as pagemap:
        found = pagemap.categories(column.ctypes.data, pages)
    return int(np.count_nonzero(found & (PRESENT | PFNZERO) == PRESENT))


@pytest.mark.skipif(not has_pagemap_scan(), reason="needs PAGEMAP_SCAN")
def test_the_state_of_untouched_memory_is_untouched(tmp_path: Path) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, GUEST_BYTES, flags=flags) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in TOUCHED:
            memory[page * PAGE_BYTES] = 1
        start = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        space = PageSpace([_Guest(start)])
        with Pagemap("vm", os.getpid()) as pagemap:
            state = read_mapping_state("vm", os.getpid(), space, pagemap, tmp_path)
    assert np.flatnonzero(state.categories).tolist() == list(TOUCHED)
    assert state.own.sum() == len(TOUCHED)
    assert taken_pages(state.slot) == 0
    assert taken_pages(state.categories) <= len(TOUCHED)


def test_columns_of_pages_that_were_never_looked_at_are_untouched() -> None:
    columns = PageColumns(GUEST_BYTES // PAGE_BYTES)
    assert not columns.shared().any()
    for column in (columns.digest, columns.slot, columns.flags):
        assert taken_pages(column) == 0
