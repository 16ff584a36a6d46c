"""The number of sites of each store page, for max_page_sharing.

Owns a count that is never too low: each merge is added, but a merge that a guest breaks is
not subtracted. So all pages are counted again only if a store page seems to be full. KSM
keeps `rmap_hlist_len` in each stable node.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import FIRST_SLOT, PageColumns


class Sharers:
    """The sites of each slot of one store, in the VMs whose rmaps these are."""

    __slots__ = ("_most", "_vms")

    def __init__(self, vms: Sequence[PageColumns]) -> None:
        self._vms = vms
        self._most = np.empty(0, dtype=np.int64)
        self._count()

    def surplus(self, slot: NDArray[np.int32], most_sharing: int) -> NDArray[np.int64]:
        """Rows of `slot` that would take their slot above `most_sharing` sites.

        Numbers that are no slot of the store are never among them.
        """
        found = np.flatnonzero(slot >= FIRST_SLOT)
        order = found[np.argsort(slot[found], kind="stable")]
        wanted = slot[order]
        place = np.arange(len(order)) - np.searchsorted(wanted, wanted)
        is_over = place + self._sites(wanted) >= most_sharing
        if is_over.any():
            self._count()
            is_over = place + self._sites(wanted) >= most_sharing
        return order[is_over]

    def add(self, slot: NDArray[np.int32]) -> None:
        """Count sites that were merged; numbers that are no slot of the store are ignored."""
        slot = slot[slot >= FIRST_SLOT]
        self._reach(slot)
        np.add.at(self._most, slot, 1)

    def _sites(self, slot: NDArray[np.int32]) -> NDArray[np.int64]:
        self._reach(slot)
        return self._most[slot]

    def _reach(self, slot: NDArray[np.int32]) -> None:
        """Make a row for each of these slots, and room for as many again."""
        if len(slot) and int(slot.max()) >= len(self._most):
            added = 2 * int(slot.max()) + 1 - len(self._most)
            self._most = np.concatenate([self._most, np.zeros(added, dtype=np.int64)])

    def _count(self) -> None:
        self._most = np.zeros(len(self._most), dtype=np.int64)
        for columns in self._vms:
            self.add(columns.slot[columns.shared()])
