"""A discard of protected memory waits for the gate: it would drop the protection unseen."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from vmdedup.memory.userfault import SYNCHRONOUS_FEATURES, Resolver, Userfault
from vmdedup.procfs.pagemap import ENTRY_UFFD_WP, Pagemap
from vmdedup.syscalls import NR, syscall
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 8
PATIENCE_S = 0.2


class Memory:
    """Some anonymous memory of this process, all of it protected."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.write(b"\x11" * len(self._map))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.start = ctypes.addressof(self._anchor)
        fd = syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        self.userfault = Userfault("this test", os.getpid(), fd, SYNCHRONOUS_FEATURES)
        self.userfault.register([(self.start, self.start + len(self._map))])
        self.protect()

    def close(self) -> None:
        self.userfault.close()
        del self._anchor
        self._map.close()

    def _all(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return np.array([self.start]), np.array([PAGES * PAGE_BYTES])

    def protect(self) -> None:
        self.userfault.protect(*self._all())

    def lift(self) -> None:
        self.userfault.lift(*self._all())

    def touch(self) -> None:
        self._map.seek(0)
        self._map.write(b"\x22" * len(self._map))

    @property
    def protected_pages(self) -> int:
        with Pagemap("this test", os.getpid()) as pagemap:
            entries = pagemap.entries_of(np.array([self.start]), np.array([PAGES]))
        return int(np.count_nonzero(entries & np.uint64(ENTRY_UFFD_WP)))

    def discard(self) -> threading.Thread:
        """MADV_DONTNEED of all of it, as a balloon's inflation, by a thread that has begun."""
        call = (NR.MADVISE, self.start, PAGES * PAGE_BYTES, mmap.MADV_DONTNEED)
        thread = threading.Thread(target=lambda: syscall(*call), daemon=True)
        thread.start()
        return thread


@pytest.fixture
def memory() -> Iterator[Memory]:
    require(root_missing())
    made = Memory()
    try:
        yield made
    finally:
        made.close()


def test_a_discard_waits_until_it_was_heard_of(memory: Memory) -> None:
    discarder = memory.discard()
    discarder.join(PATIENCE_S)
    assert discarder.is_alive()
    assert memory.protected_pages == PAGES
    assert len(memory.userfault.faults()) == 0
    discarder.join()
    assert memory.protected_pages == 0


def test_a_discard_waits_for_the_end_of_a_gate(memory: Memory) -> None:
    with Resolver(memory.userfault, lambda: None) as resolver:
        with resolver.gate():
            discarder = memory.discard()
            discarder.join(PATIENCE_S)
            assert discarder.is_alive()
            assert memory.protected_pages == PAGES
        discarder.join()
        assert memory.protected_pages == 0
        assert resolver.failure is None


def test_no_later_gate_holds_what_was_discarded(memory: Memory) -> None:
    """The discard is done some time after it was heard of: perhaps in the next gate."""
    with Resolver(memory.userfault, lambda: None) as resolver:
        for _ in range(20):
            memory.protect()
            with resolver.gate():
                discarder = memory.discard()
                discarder.join(PATIENCE_S / 10)
                resolver.serve()
                assert memory.protected_pages == 0
            discarder.join()
            memory.touch()
    assert resolver.failure is None


@pytest.mark.parametrize("change", ["protect", "lift"])
def test_protection_can_be_changed_beside_a_discard(memory: Memory, change: str) -> None:
    """The kernel says EAGAIN until the discard's message is read; what else was read is kept."""
    if change == "protect":
        memory.lift()
    discarder = memory.discard()
    discarder.join(PATIENCE_S)
    getattr(memory, change)()
    discarder.join()


def test_a_discard_goes_on_when_we_end(memory: Memory) -> None:
    discarder = memory.discard()
    discarder.join(PATIENCE_S)
    assert discarder.is_alive()
    memory.userfault.close()  # as a kill does
    assert becomes_true(lambda: not discarder.is_alive())
