"""Huge pages: which of a VM's blocks of 2 MiB are worth splitting.

Owns the choice. Merging one page of a huge page splits all 512 of them: the guest pays for
that with slower page walks, whatever is saved. So a block that is a huge page now is split
only if at least `density` of its pages would be merged (the control `huge_page_density`).
VMware ESXi and SmartMD (Guo et al., USENIX ATC 2017) choose by block as well; KSM splits
always. Promises that pages outside huge pages are never held back. A block that ends with
its region has fewer pages, and needs no more than it has. Owns also how little must be
savable in a split block for it to be made a huge page again.

Refuses to know how a block is mapped: `guest.mapping_state` reads that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.sorting import lengths, ranges
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES

BLOCK_PAGES = HUGE_PAGE_BYTES // PAGE_BYTES
"""Pages of a block: of one huge page."""

_BACK_DIVISOR = 4

Int64s = NDArray[np.int64]
Mask = NDArray[np.bool_]


def most_to_give_back(density: int) -> int:
    """Savable pages up to which a split block is made a huge page again; `0` at density 0.

    A quarter of the density. The block is split again once `density` pages are savable, so
    three quarters of these must change first: a block at the edge does not go back and forth.
    """
    return density // _BACK_DIVISOR


class Blocks:
    """The blocks of a VM's page space, numbered in page order.

    `first_page`: first page index of each region; `lead_pages`: pages from the beginning of
    its first block to the region itself; `pages`: all pages of the VM.
    """

    __slots__ = ("_base", "_first_page", "pages_of", "start_page")

    def __init__(self, first_page: Int64s, lead_pages: Int64s, pages: int) -> None:
        size = lengths(first_page, pages)
        blocks = -(-(lead_pages + size) // BLOCK_PAGES)
        base = np.cumsum(blocks) - blocks
        self._first_page = first_page
        self._base = base * BLOCK_PAGES + lead_pages - first_page
        start = np.arange(blocks.sum()) * BLOCK_PAGES - np.repeat(self._base, blocks)
        self.start_page = np.maximum(start, np.repeat(first_page, blocks))
        """First page of each block that is in the page space."""
        self.pages_of = lengths(self.start_page, pages)
        """Pages of each block that are in the page space."""

    def __len__(self) -> int:
        return len(self.pages_of)

    def of(self, page: Int64s) -> Int64s:
        """The block of each page."""
        if len(self._first_page) == 1:
            return np.asarray((page + self._base[0]) // BLOCK_PAGES)
        region = np.searchsorted(self._first_page, page, side="right") - 1
        return np.asarray((page + self._base[region]) // BLOCK_PAGES)

    def pages(self, block: Int64s) -> tuple[Int64s, Int64s]:
        """All pages of these blocks, and where each block begins among them."""
        count = self.pages_of[block]
        return ranges(self.start_page[block], count), np.cumsum(count) - count

    def full(self, is_such: Mask) -> Mask:
        """The blocks of which all pages are such; `is_such` has one row a page."""
        return np.asarray(np.logical_and.reduceat(is_such, self.start_page))

    def count(self, is_such: Mask) -> Int64s:
        """How many pages of each block are such."""
        return np.asarray(np.add.reduceat(is_such, self.start_page, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class HugePages:
    """The huge pages of one VM now, and how many savable pages one must have to be split."""

    blocks: Blocks
    is_huge: Mask
    """Whether each block is a huge page."""
    density: int

    def thin(self, merged: Int64s) -> Mask:
        """The huge pages that would be split for too few pages, if these were merged.

        `merged` has no page twice; a huge page without any of them is not split at all.
        """
        found = np.bincount(self.blocks.of(merged), minlength=len(self.blocks))
        least = np.minimum(self.density, self.blocks.pages_of)
        return np.asarray(self.is_huge & (found > 0) & (found < least))

    def count_inside(self, page: Int64s) -> int:
        """How many of these pages lie in huge pages."""
        return int(np.count_nonzero(self.is_huge[self.blocks.of(page)]))
