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
from vmdedup.linux.pagemap import ENTRY_UFFD_WP, Pagemap
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.linux.userfaultfd import (
    FEATURE_WP_UNPOPULATED,
    SYNCHRONOUS_FEATURES,
    Resolver,
    Userfault,
)
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

PAGES = 8
PATIENCE_S = 0.2
_MAP_FIXED = 0x10


class Memory:
    """Some anonymous memory of this process, all of it protected."""

    def __init__(self, *, optional: int = 0) -> None:
        self._map = mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.write(b"\x11" * len(self._map))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.start = ctypes.addressof(self._anchor)
        fd = syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        self.userfault = Userfault(
            "this test", os.getpid(), fd, SYNCHRONOUS_FEATURES, optional=optional
        )
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

    def read(self) -> None:
        assert self._map[:] == bytes(len(self._map))

    def touch(self) -> None:
        self._map.seek(0)
        self._map.write(b"\x22" * len(self._map))

    @property
    def protected_pages(self) -> int:
        with Pagemap("this test", os.getpid()) as pagemap:
            entries = pagemap.entries_of(np.array([self.start]), np.array([PAGES]))
        return int(np.count_nonzero(entries & np.uint64(ENTRY_UFFD_WP)))

    def split(self) -> None:
        """Make it two mappings, each half of it."""
        half_bytes = PAGES // 2 * PAGE_BYTES
        syscall(NR.MADVISE, self.start, half_bytes, mmap.MADV_DONTFORK)

    def replace_second_half(self) -> None:
        """With memory that is not registered, as a remap does."""
        half_bytes = PAGES // 2 * PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        syscall(NR.MMAP, self.start + half_bytes, half_bytes, mmap.PROT_WRITE, flags, -1, 0)

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


def test_a_range_may_span_mappings(memory: Memory) -> None:
    """Before Linux 6.4 one call protects within one mapping only."""
    memory.lift()
    memory.split()
    memory.protect()
    assert memory.protected_pages == PAGES


def test_no_later_gate_holds_what_is_discarded_beside_a_remap(memory: Memory) -> None:
    """Lifted is what is still registered of it, also where one call takes all or nothing."""
    discarder = memory.discard()
    discarder.join(PATIENCE_S)
    memory.replace_second_half()
    with Resolver(memory.userfault, lambda: None) as resolver, resolver.gate():
        resolver.serve()
        assert memory.protected_pages == 0
    discarder.join()
    assert resolver.failure is None


def test_what_is_discarded_while_no_gate_is_closed_is_not_held(memory: Memory) -> None:
    """By the page table: neither while it is absent, nor once it was read or written again."""
    with Resolver(memory.userfault, lambda: None), Pagemap("us", os.getpid()) as pagemap:
        where = np.array([memory.start]), np.array([PAGES])
        witnessed = pagemap.entries_of(*where)
        held = np.uint64(ENTRY_UFFD_WP)
        assert (witnessed & held).all()
        memory.discard().join()
        assert not (pagemap.entries_of(*where) & held).any()
        memory.read()
        assert not (pagemap.entries_of(*where) & held).any()
        memory.touch()
        assert not (pagemap.entries_of(*where) & held).any()


@pytest.mark.parametrize("optional", [0, FEATURE_WP_UNPOPULATED])
def test_absent_pages_are_protected_once_they_were_read(optional: int) -> None:
    """As zero pages are before they are unmerged; where they are protected absent it is told."""
    memory = Memory(optional=optional)
    try:
        memory.discard()
        with Resolver(memory.userfault, lambda: None):
            assert becomes_true(lambda: memory.protected_pages == 0)
        memory.protect()
        assert memory.protected_pages == (PAGES if memory.userfault.protects_absent else 0)
        memory.lift()
        memory.read()
        memory.protect()
        assert memory.protected_pages == PAGES
    finally:
        memory.close()


def test_a_discard_goes_on_when_we_end(memory: Memory) -> None:
    discarder = memory.discard()
    discarder.join(PATIENCE_S)
    assert discarder.is_alive()
    memory.userfault.close()  # as a kill does
    assert becomes_true(lambda: not discarder.is_alive())
