"""The rmap: the state of each page of one VM, as columns.

Owns the per-page state of one VM. Promises `BYTES_PER_PAGE` (13) bytes a page;
KSM's `struct ksm_rmap_item` takes 64. Refuses nothing about its content:
`core/scan.py` holds the rules by which it changes.

    column  type    KSM's rmap_item    meaning
    digest  uint64  oldchecksum        the page's digest when it was last looked at;
                                       means something only while KNOWN
    slot    int32   head (stable_node) the address's mapping: OWN memory, the ZERO
                                       page, or this page of the stable store
    flags   uint8   low bits of        KNOWN, STILL, BROKEN, UNSHARED
                    address

The address itself needs no column: the row number is the page index. There is
no unstable-tree link either, since each pass builds that tree again from these
columns and drops it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.zeroes import zeroes

OWN: Final = 0
"""Slot of a page mapped to the VM's own memory (never merged, or unmerged). It must be `0`:
a column of zeroes takes no memory, see `core.zeroes`."""

ZERO: Final = -1
"""Slot of a page mapped to the kernel's zero page."""

FIRST_SLOT: Final = 1
"""Lowest slot of a store."""

KNOWN: Final = np.uint8(1)
"""The page has been looked at, and `digest` is its digest then."""

STILL: Final = np.uint8(2)
"""The page was the same at the last two looks: it may enter the unstable tree."""

BROKEN: Final = np.uint8(4)
"""The page is mapped to a store or zero page, but the guest has written it since.
Copy-on-write gave it a page of its own; `slot` says only which mapping it is in."""

UNSHARED: Final = np.uint8(8)
"""The page held still, was compared with all others and is like none (KSM's pages_unshared)."""

BYTES_PER_PAGE: Final = 8 + 4 + 1

ALL_PAGES: Final = slice(None)


class PageColumns:
    """One row per page index; row i of every column is page i.

    Attributes are the columns themselves, to be read freely; they are replaced
    when the kernel's state is read again, so keep no references to them.
    """

    __slots__ = ("digest", "flags", "slot")

    digest: NDArray[np.uint64]
    slot: NDArray[np.int32]
    flags: NDArray[np.uint8]

    def __init__(self, pages: int) -> None:
        self.digest = zeroes(pages, np.uint64)
        self.slot = zeroes(pages, np.int32)
        self.flags = zeroes(pages, np.uint8)

    def __len__(self) -> int:
        return len(self.flags)

    @property
    def memory_bytes(self) -> int:
        """Memory that the columns occupy."""
        return self.digest.nbytes + self.slot.nbytes + self.flags.nbytes

    def merge(self, page_index: NDArray[np.int64], slot: NDArray[np.int32] | int) -> None:
        """Record that these pages were verified and remapped: they share `slot` now."""
        self.slot[page_index] = slot
        self.flags[page_index] &= ~BROKEN

    def unmerge(self, page_index: NDArray[np.int64]) -> None:
        """Record that these pages have their own memory again."""
        self.merge(page_index, OWN)

    def shared(self, page_index: NDArray[np.int64] | slice = ALL_PAGES) -> NDArray[np.bool_]:
        """Whether each of these pages shares a store page or the zero page at this moment."""
        mask: NDArray[np.bool_] = self.slot[page_index] != OWN
        mask &= self.flags[page_index] & BROKEN == 0
        return mask
