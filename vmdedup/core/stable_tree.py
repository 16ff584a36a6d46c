"""The stable tree: from a content's digest to its store slot.

Owns the digests of the published pages of one store, that is of one trust
domain. Promises that `search` answers with slots that were inserted under that
very digest and not removed. Refuses to decide equality: the slot it gives is a
nomination, the gate compares bytes.

It is "stable" for KSM's reason: the pages behind it are write protected (here:
published, never written again), so the order stays true and the tree is kept from
pass to pass. KSM's red-black tree compares page contents while descending; a
sorted digest column that is searched in batches answers a whole pass at once.

Several slots may carry one digest: copies of one content (`pool`; max_page_sharing,
KSM's chain and dups), or two contents that collide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import OWN
from vmdedup.core.sorting import stable_order

NOT_FOUND = OWN
"""Slot for a content that is not found: its page stays the VM's own."""


class StableTree:
    """Digest to slot, for the published pages of one store."""

    __slots__ = ("_digest", "_has_copies", "_slot")

    def __init__(self) -> None:
        # All slots, sorted by digest, in order of insertion within one digest.
        self._digest = np.empty(0, dtype=np.uint64)
        self._slot = np.empty(0, dtype=np.int32)
        self._has_copies = False

    def __len__(self) -> int:
        """Slots in the tree."""
        return len(self._slot)

    def search(
        self, digests: NDArray[np.uint64], page: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """For each digest a slot, or NOT_FOUND: int32, same shape.

        If there are several copies, `page` (the guest's page index) picks one, so that the
        copies of neighbours follow each other; without `page` it is the first inserted.
        """
        found = np.full(len(digests), NOT_FOUND, dtype=np.int32)
        if not len(self._digest) or not len(digests):
            return found
        # Ascending needles walk the column once instead of missing the cache
        # at every step of every search.
        order = stable_order(digests)
        needles = digests[order]
        at = np.searchsorted(self._digest, needles)
        at[at == len(self._digest)] = 0
        hit = self._digest[at] == needles
        at, order = at[hit], order[hit]
        if page is not None and self._has_copies:
            copies = np.searchsorted(self._digest, needles[hit], side="right") - at
            at += page[order] % copies
        found[order] = self._slot[at]
        return found

    def insert(self, digests: NDArray[np.uint64], slots: NDArray[np.int32]) -> None:
        """Add published pages; no slot may be in the tree already."""
        order = stable_order(digests)
        digests, slots = digests[order], slots[order]
        at = np.searchsorted(self._digest, digests, side="right")
        self._use(np.insert(self._digest, at, digests), np.insert(self._slot, at, slots))

    def remove(self, slots: NDArray[np.int32]) -> None:
        """Drop these slots, which no process maps any longer; unknown slots are ignored."""
        keep = ~np.isin(self._slot, slots)
        self._use(self._digest[keep], self._slot[keep])

    def _use(self, digest: NDArray[np.uint64], slot: NDArray[np.int32]) -> None:
        self._digest, self._slot = digest, slot
        self._has_copies = bool((digest[1:] == digest[:-1]).any())
