"""Which blocks virtio-mem has unplugged, as far as the kernel's page tables prove it.

QEMU tells how much of a device is plugged, and not which blocks. But unplugging discards a
whole block: of the pages that the VM had there for itself, none is left, neither in a page
table nor in the RAM file. Merged pages stay mapped. Owns the comparison of two states of a VM
that shows this. Nothing but a discard takes such pages away: swapped pages and those on the
kernel's zero page still count as there. A balloon discards too, page by page, so a VM that had
one since it was attached proves nothing.

Promises that what a page of such a block shows is undefined to the guest, unless it has written
the page since: it was discarded after it was merged. So a block in which pages were merged
after the first of the two states proves nothing: they may have been written, and merged, after
it was plugged again. A block of which all pages were merged leaves no proof either. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import OWN
from vmdedup.guest.mapping_state import HELD, MappingState
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT


@dataclass(frozen=True)
class Blocks:
    """The blocks of one device: the page indices of its region, and the pages of a block."""

    where: slice
    block_pages: int
    share: bool

    def any_of(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether each block has any of these pages; `mask` is over the region."""
        return np.asarray(mask.reshape(-1, self.block_pages).any(axis=1))


class UnpluggedBlocks:
    """The unplugged blocks of one VM that are proved; `pages` is a mask over its page space."""

    def __init__(self, pages: int) -> None:
        self.pages = np.broadcast_to(np.False_, pages)
        self._devices: object = None
        self._merged = np.empty(0, dtype=np.int64)
        """Pages that were to be merged since the last state was read."""

    def merging(self, page: npt.NDArray[np.int64]) -> None:
        """Note pages that are about to be merged. Call it before the first of them is."""
        self._merged = np.union1d(self._merged, page)

    def compare(
        self,
        before: MappingState | None,
        now: MappingState,
        devices: Sequence[Blocks],
        since: object,
    ) -> None:
        """Learn from two states of the VM, the second just read.

        `since` stands for the devices that the VM has had: if it is another one than at the
        last call, a balloon may have come and gone, and nothing is proved.
        """
        merged, self._merged = self._merged, np.empty(0, dtype=np.int64)
        is_same, self._devices = since == self._devices, since
        if not devices or before is None or not is_same:
            self.pages = np.broadcast_to(np.False_, len(now.slot))
            return
        pages = self.pages.copy()
        is_new = np.zeros(len(pages), dtype=np.bool_)
        is_new[merged] = True
        for device in devices:
            where = device.where
            is_own = now.slot[where] == OWN
            there = (is_own & (now.categories[where] & HELD != 0)) | now.broken_at(
                np.arange(where.start, where.stop)
            )
            gone = is_own & ~there & (before.slot[where] == OWN)
            gone &= _holds_own(before.categories[where], share=device.share)
            was_known = device.any_of(pages[where])
            known = (was_known | device.any_of(gone)) & ~device.any_of(there)
            known &= ~device.any_of(is_new[where])
            pages[where] = np.repeat(known, device.block_pages)
        self.pages = pages


def _holds_own(categories: npt.NDArray[np.uint8], *, share: bool) -> npt.NDArray[np.bool_]:
    """Whether an unmerged page is the VM's own, and no file's and not the zero page."""
    if share:
        return np.asarray(categories & HELD != 0)
    foreign = (categories & PRESENT != 0) & (categories & (FILE | PFNZERO) != 0)
    return np.asarray((categories & HELD != 0) & ~foreign & (categories != FILE))
