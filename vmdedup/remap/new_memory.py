"""The memory that unmerges take: how much there is, and which unmerge may take it.

Owns the bounds (of the host, of cgroups), the share that each of several unmerges is
granted, and the stores that they read together. Promises that no two unmerges count on the
same memory, and that a reserve remains.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from vmdedup.closing import Closing
from vmdedup.guest.mapping_state import MappingState, StoreId
from vmdedup.linux.cgroup import headroom
from vmdedup.linux.meminfo import available_bytes
from vmdedup.store.stable_store import PublishedPages
from vmdedup.units import MIB, PAGE_BYTES

_RESERVE_BYTES = 256 * MIB
"""Available memory that an unmerge leaves to the host."""
_GROUP_RESERVE_BYTES = 16 * MIB
"""Memory that an unmerge leaves to a cgroup: for a quarter of a gate, page tables, and QEMU."""


def spendable(pid: int) -> tuple[int, str]:
    """Bytes of new memory that unmerging this VM may take, and the name of the bound.

    Pages of a RAM file are charged to our own cgroup, other pages to the VM's
    (mm/shmem.c: shmem_file_write_iter; mm/memory.c: do_anonymous_page).
    """
    bounds = [(available_bytes() - _RESERVE_BYTES, "the host")]
    for who in (pid, os.getpid()):
        found = headroom(who)
        if found is not None:
            bounds.append((found.left_bytes - _GROUP_RESERVE_BYTES, f"cgroup {found.group}"))
    left_bytes, where = min(bounds)
    return max(0, left_bytes), where


class MappedStores(Closing):
    """Stores mapped here to be read, each once, however many VMs use it. Thread-safe."""

    def __init__(self) -> None:
        self._pages: dict[StoreId, PublishedPages] = {}
        self._opening = threading.Lock()

    def most_used(self, state: MappingState) -> PublishedPages | None:
        """The store that most of the VM's merged pages show, `None` if it cannot be read here."""
        on_store = state.store[state.merged]
        if not len(on_store):
            return None
        store = state.stores[int(np.bincount(on_store).argmax())]
        with self._opening:
            if store not in self._pages and store.path is not None:
                with suppress(OSError):
                    self._pages[store] = PublishedPages.open(store.path, store.device, store.inode)
            return self._pages.get(store)

    def close(self) -> None:
        """Unmap the stores."""
        while self._pages:
            self._pages.popitem()[1].close()


class NewMemory:
    """The memory that unmerges under way may take; no two of them count on the same memory."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._granted_pages = 0

    @contextmanager
    def granted(self, pid: int, pages: int) -> Iterator[int]:
        """How many of `pages` this VM may take while in the block.

        If that is not all, it first waits until other unmerges have ended.
        """
        with self._turn:
            while True:
                left_pages = spendable(pid)[0] // PAGE_BYTES - self._granted_pages
                if left_pages >= pages or not self._granted_pages:
                    break
                self._turn.wait()
            pages = max(0, min(pages, left_pages))
            self._granted_pages += pages
        try:
            yield pages
        finally:
            with self._turn:
                self._granted_pages -= pages
                self._turn.notify_all()


class Unmerges(Closing):
    """Stores and memory that unmerges of several VMs share, in turn or at the same time."""

    def __init__(self) -> None:
        self.stores = MappedStores()
        self.memory = NewMemory()

    def close(self) -> None:
        """Unmap the stores."""
        self.stores.close()
