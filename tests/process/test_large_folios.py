"""Large folios of this process, in two regions that are neighbours by page index only."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from tests.harness.huge_pages import collapse
from tests.harness.kernel import Vma
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.guest.large_folios import MOST_FOLIO_PAGES, kept_memory
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import Pagemap
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = HUGE_PAGE_BYTES // PAGE_BYTES


@dataclass(frozen=True)
class Block:
    """One huge page, as a region."""

    start: int
    size_bytes: int = HUGE_PAGE_BYTES

    def unmap(self, page: int) -> None:
        """As a remap does: the folio stays whole."""
        address = self.start + page * PAGE_BYTES
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(address), PAGE_BYTES, 4) == 0


@contextmanager
def block() -> Iterator[Block]:
    with mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        column = np.frombuffer(memory, dtype=np.uint8)
        start = -(-column.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        column[start - column.ctypes.data :: PAGE_BYTES][:PAGES] = 1
        del column
        if not collapse(os.getpid(), [Vma(start, start + HUGE_PAGE_BYTES, "rw-p", 0, "", 0, "")]):
            pytest.skip("no huge page to be had: MADV_COLLAPSE failed")
        yield Block(start)


@pytest.mark.skipif(os.geteuid() != 0, reason="frames are known to root alone")
def test_a_folio_at_the_start_of_the_second_region() -> None:
    with ExitStack() as exits:
        blocks = [exits.enter_context(block()) for _ in range(2)]
        blocks.sort(key=lambda each: each.start)
        pagemap = exits.enter_context(Pagemap("vm", os.getpid()))
        space, page = PageSpace(blocks), np.array([PAGES - 1, PAGES], dtype=np.int64)
        slot = np.full(space.pages, OWN, dtype=np.int32)
        slot[page] = ZERO
        blocks[0].unmap(PAGES - 1)
        blocks[1].unmap(0)
        kept = kept_memory(pagemap, space, slot, page, MOST_FOLIO_PAGES)
    assert kept is not None
    assert sorted(space.region_of(kept.page).tolist()) == [0, 1]
    assert kept.pages.tolist() == [1, 1]
