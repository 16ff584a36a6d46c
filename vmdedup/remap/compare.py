"""Whether pages of a VM hold exactly the bytes that they are to show.

Owns two ways of comparing: from copies, which always works, and in place, which is faster
(JUSTIFICATION: `inject.in_place`) and needs the store mapped inside QEMU during the session.
Promises that a page counts as equal only if all of its bytes were compared. Refuses to read in
place any page whose read could fail there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.rmap import ZERO
from vmdedup.guest.page_reader import equal_at
from vmdedup.guest.page_space import PageSpace
from vmdedup.inject.in_place import Run, differ_in_place
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux import mman
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES

Int64s = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


class Comparer(Protocol):
    """One of the ways of comparing."""

    def equal(self, page: Int64s, slot: Slots) -> Bools:
        """Which of these pages, ascending, are equal to the content of those slots: (n,)."""


class FromCopies:
    """Copies each page out of the VM. `address` gives the slots' addresses in our memory."""

    def __init__(
        self, vm: str, pid: int, space: PageSpace, address: Callable[[Slots], Int64s]
    ) -> None:
        self._vm = vm
        self._pid = pid
        self._space = space
        self._address = address
        self._zero_page = np.zeros(PAGE_BYTES, dtype=np.uint8)

    def equal(self, page: Int64s, slot: Slots) -> Bools:
        """Which pages are equal; a page that is not mapped counts as different."""
        shown = np.full(len(slot), self._zero_page.ctypes.data)
        stored = slot != ZERO
        if stored.any():
            shown[stored] = self._address(slot[stored])
        return equal_at(self._vm, self._pid, self._space.hva(page), shown)


class InPlace:
    """Compares on QEMU's borrowed thread. `run` runs the rows that read.

    `store_fd`: the store's descriptor number inside QEMU; `slots`: how many are mapped. Only
    pages in memory may be compared. Raises OSError, and as `RemoteThread.call`.
    """

    def __init__(
        self, remote: RemoteThread, run: Run, space: PageSpace, store_fd: int, slots: int
    ) -> None:
        self._remote = remote
        self._run = run
        self._space = space
        place = remote.room(slots)
        flags = mman.MAP_SHARED | mman.MAP_FIXED
        # SAFETY: this mapping is read-only, over scratch memory of our own. Killed here or
        # later: the next session unmaps it with the rest of the scratch memory.
        self._store = remote.call(
            NR.MMAP, place, slots * PAGE_BYTES, mman.PROT_READ, flags, store_fd, 0
        )
        faults.reached("store-mapped")

    def equal(self, page: Int64s, slot: Slots) -> Bools:
        """Which pages are equal; pages that were not compared count as different."""
        shown = np.where(slot == ZERO, 0, self._store + slot.astype(np.int64) * PAGE_BYTES)
        return ~differ_in_place(self._remote, self._run, self._space.hva(page), shown)
