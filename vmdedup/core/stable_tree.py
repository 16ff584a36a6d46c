"""The stable tree: which store slot holds a content.

Owns the digests of the published pages of one store, that is of one trust
domain. Promises that `search` answers with slots that were inserted under that
very digest and not removed. Refuses to decide equality: the slot it gives is a
nomination, the gate compares bytes.

It is "stable" for KSM's reason: the pages behind it are write protected (here:
published, never written again), so the order can not rot and it is kept from
pass to pass. KSM's red-black tree compares page contents while descending; a
sorted digest column that is searched in batches answers a whole pass at once.

Several slots may carry one digest: further copies of one content
(max_page_sharing, KSM's chain and dups), or two contents that collide. Search
gives the first inserted that is not full.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import OWN
from vmdedup.core.sorting import stable_order

NOT_FOUND = OWN
"""A page whose content is not found stays the VM's own."""


class StableTree:
    """Digest to slot, for the published pages of one store."""

    __slots__ = ("_digest", "_full", "_open_digest", "_open_slot", "_slot")

    def __init__(self) -> None:
        # All slots, sorted by digest, in order of insertion within one digest.
        self._digest = np.empty(0, dtype=np.uint64)
        self._slot = np.empty(0, dtype=np.int32)
        self._full = np.empty(0, dtype=np.bool_)
        # The same without the full ones; the same arrays while none is full.
        self._open_digest = self._digest
        self._open_slot = self._slot

    def __len__(self) -> int:
        """Slots in the tree, full ones included."""
        return len(self._slot)

    def search(self, digests: NDArray[np.uint64]) -> NDArray[np.int32]:
        """For each digest a slot that is not full, or NOT_FOUND: int32, same shape."""
        found = np.full(len(digests), NOT_FOUND, dtype=np.int32)
        if not len(self._open_digest) or not len(digests):
            return found
        # Ascending needles walk the column once instead of missing the cache
        # at every step of every search.
        order = stable_order(digests)
        needles = digests[order]
        at = np.searchsorted(self._open_digest, needles)
        at[at == len(self._open_digest)] = 0
        hit = self._open_digest[at] == needles
        found[order[hit]] = self._open_slot[at[hit]]
        return found

    def insert(self, digests: NDArray[np.uint64], slots: NDArray[np.int32]) -> None:
        """Add published pages; no slot may be in the tree already."""
        order = stable_order(digests)
        digests, slots = digests[order], slots[order]
        at = np.searchsorted(self._digest, digests, side="right")
        self._digest = np.insert(self._digest, at, digests)
        self._slot = np.insert(self._slot, at, slots)
        self._full = np.insert(self._full, at, False)
        self._reopen()

    def remove(self, slots: NDArray[np.int32]) -> None:
        """Drop these slots (nobody maps them any more); unknown ones are ignored."""
        keep = ~np.isin(self._slot, slots)
        self._digest = self._digest[keep]
        self._slot = self._slot[keep]
        self._full = self._full[keep]
        self._reopen()

    def set_full(self, slots: NDArray[np.int32]) -> None:
        """Exactly these slots take no further sites (max_page_sharing reached)."""
        self._full = np.isin(self._slot, slots)
        self._reopen()

    def _reopen(self) -> None:
        if self._full.any():
            self._open_digest = self._digest[~self._full]
            self._open_slot = self._slot[~self._full]
        else:
            self._open_digest = self._digest
            self._open_slot = self._slot
