"""Dirty tracking of our own memory: what the kernel tells was written, window by window."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from tests.harness.capabilities import pagemap_scan_missing
from tests.harness.huge_pages import huge_pages, huge_pages_missing
from tests.harness.skips import require
from vmdedup.guest.dirty_tracking import WINDOW_PAGES, DirtyTracking
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux.pagemap import HUGE, PRESENT, Pagemap
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.linux.userfaultfd import TRACKING_FEATURES, Userfault
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.process

REGION_PAGES = (20 * WINDOW_PAGES, 3 * WINDOW_PAGES + 7)
PAGES = sum(REGION_PAGES)
_HUGE_PAGES, _NO_HUGE_PAGES = 14, 15  # MADV_HUGEPAGE, MADV_NOHUGEPAGE
_UFFDIO_UNREGISTER = 0x8010AA01


@dataclass(frozen=True)
class Region:
    """Memory of ours that is tracked."""

    start: int
    size_bytes: int


class Memory:
    """Both regions, all of it present, and their page space."""

    def __init__(self) -> None:
        self._maps = [mmap.mmap(-1, pages * PAGE_BYTES, mmap.MAP_PRIVATE) for pages in REGION_PAGES]
        self.regions = []
        for memory in self._maps:
            memory.madvise(_NO_HUGE_PAGES)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self.regions.append(Region(start, len(memory)))
        self.space = PageSpace(self.regions)
        self.write(range(PAGES))

    def discard(self, first: int, pages: int) -> None:
        """Give these pages of the page space, of one region, back."""
        address = int(self.space.hva(np.array([first]))[0])
        syscall(NR.MADVISE, address, pages * PAGE_BYTES, mmap.MADV_DONTNEED)

    def write(self, pages: range | list[int]) -> None:
        """Write a byte of each of these pages of the page space."""
        for address in self.space.hva(np.array(pages)).tolist():
            ctypes.memset(address, 1, 1)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def new_userfault() -> Userfault:
    fd = syscall(NR.USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    return Userfault("vm", os.getpid(), fd, TRACKING_FEATURES)


@contextmanager
def tracking(memory: Memory) -> Iterator[DirtyTracking]:
    require(pagemap_scan_missing())
    with (
        Pagemap("vm", os.getpid()) as pagemap,
        closing(DirtyTracking(new_userfault(), pagemap, memory.space)) as tracker,
    ):
        yield tracker


def test_what_cannot_be_registered_whole_is_not_registered_in_part(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the rest keeps it: old kernels let one unregister what is another's."""
    first, second = [(each.start, each.start + each.size_bytes) for each in memory.regions]
    unregistered: list[int] = []
    ioctls = Userfault._ioctls

    def noted(self: Userfault, request: int, words: np.ndarray) -> np.ndarray:
        if request == _UFFDIO_UNREGISTER:
            unregistered.extend(words[:, 0].tolist())
        return ioctls(self, request, words)

    with closing(new_userfault()) as theirs, closing(new_userfault()) as ours:
        theirs.register([second])
        monkeypatch.setattr(Userfault, "_ioctls", noted)
        with pytest.raises(OSError, match="busy"):
            ours.register([first, second])
        assert unregistered == [first[0]]
        theirs.register([first])


def test_what_another_holds_is_not_tracked_and_nothing_is_kept(memory: Memory) -> None:
    require(pagemap_scan_missing())
    first, second = [(each.start, each.start + each.size_bytes) for each in memory.regions]
    ours = new_userfault()
    with closing(new_userfault()) as theirs, Pagemap("vm", os.getpid()) as pagemap:
        theirs.register([second])
        with pytest.raises(OSError, match="busy"):
            DirtyTracking(ours, pagemap, memory.space)
        theirs.register([first])
    assert ours.fd == -1, "it is closed"


def test_memory_that_is_not_given_back_is_told_and_memory_that_is_gone_is_not(
    memory: Memory,
) -> None:
    """Gone memory went with its VM, or was unplugged: no error of the session's."""
    require(pagemap_scan_missing())
    first, second = [(each.start, each.start + each.size_bytes) for each in memory.regions]
    with closing(new_userfault()) as theirs, tracking(memory) as tracker:
        with pytest.raises(OSError, match="busy"), tracker.handed_over([first]):
            theirs.register([first])
        theirs.unregister([first])
        size_bytes = second[1] - second[0]
        with tracker.handed_over([second]):
            syscall(NR.MUNMAP, second[0], size_bytes)
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED: nobody else's place
        syscall(NR.MMAP, second[0], size_bytes, 0, fixed, -1, 0)


def told(tracker: DirtyTracking, *, everywhere: bool = True) -> list[int]:
    found = tracker.take_written(everywhere=everywhere)
    if found is None:
        return []
    assert (found.categories & PRESENT).all()
    return [int(page) for page in found.page]


def test_each_write_is_told_once_however_many_there_are(memory: Memory) -> None:
    with tracking(memory) as tracker:
        assert told(tracker) == list(range(PAGES))
        assert told(tracker) == []
        scattered = list(range(1, PAGES, 2))  # more ranges than one answer has room for
        memory.write(scattered)
        assert told(tracker) == scattered
        memory.write([0, PAGES - 1])
        assert told(tracker) == [0, PAGES - 1]


def test_one_that_is_new_tells_of_all_that_is_there(memory: Memory) -> None:
    """Also where one before it, which is closed by now, had left nothing to tell."""
    with tracking(memory) as tracker:
        told(tracker)
    memory.discard(3, WINDOW_PAGES)
    memory.discard(PAGES - 5, 5)
    memory.write([7])
    with Pagemap("vm", os.getpid()) as pagemap, tracking(memory) as tracker:
        found = tracker.take_written(everywhere=False)
        assert found is not None
        column = np.zeros(PAGES, dtype=np.uint8)
        column[found.page] = found.categories
        known = [
            pagemap.categories(each.start, each.size_bytes // PAGE_BYTES) for each in memory.regions
        ]
        assert np.array_equal(column, np.concatenate(known))
        assert np.count_nonzero(column) == PAGES - WINDOW_PAGES - 4
        assert told(tracker, everywhere=False) == []


def test_what_is_passed_over_is_told_of_when_its_turn_comes(memory: Memory) -> None:
    pages = np.array([5, PAGES - 1])
    with tracking(memory) as tracker:
        for _ in range(40):
            told(tracker, everywhere=False)
        rounds = []
        for _ in range(27):
            memory.write(pages.tolist())
            found = told(tracker, everywhere=False)
            rounds.append(tracker.rounds(pages).tolist())
            assert found == (pages.tolist() if rounds[-1][0] else [])
        assert sorted(rounds) == [[0, 0]] * 24 + [[9, 9]] * 3
        tracker.renew(pages[:1])
        memory.write(pages.tolist())
        assert told(tracker, everywhere=False)[0] == 5


def test_in_one_round_young_windows_are_asked_for_apart(memory: Memory) -> None:
    young = np.arange(0, PAGES, 2 * WINDOW_PAGES)
    with tracking(memory) as tracker:
        told(tracker)
        while tracker.take_written(everywhere=False) is not None:
            pass
        tracker.renew(young)
        memory.write(range(PAGES))
        wanted = np.flatnonzero(np.isin(np.arange(PAGES), told(tracker, everywhere=False)))
        assert np.array_equal(wanted, np.flatnonzero(tracker.rounds(np.arange(PAGES)) > 0))
        assert set(young.tolist()) <= set(wanted.tolist())


def test_a_mapping_that_is_new_counts_as_written_whole(memory: Memory) -> None:
    start, pages = memory.regions[0].start + 3 * PAGE_BYTES, 4
    with tracking(memory) as tracker:
        told(tracker)
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        syscall(NR.MMAP, start, pages * PAGE_BYTES, 3, fixed, -1, 0)
        memory.write([3, 4, 5, 6])
        assert set(range(3, 7)) <= set(told(tracker))
        assert told(tracker) == [3, 4, 5, 6]
        assert told(tracker) == []


class HugeMemory:
    """Four huge pages, the second written to single pages before."""

    def __init__(self) -> None:
        size = 5 * WINDOW_PAGES * PAGE_BYTES
        self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        start += -start % (WINDOW_PAGES * PAGE_BYTES)
        self.regions = [Region(start, 4 * WINDOW_PAGES * PAGE_BYTES)]
        self.space = PageSpace(self.regions)
        self._map.madvise(_HUGE_PAGES)
        self.write([0, WINDOW_PAGES, 2 * WINDOW_PAGES, 3 * WINDOW_PAGES])

    def write(self, pages: list[int]) -> None:
        for address in self.space.hva(np.array(pages)).tolist():
            ctypes.memset(address, 1, 1)

    def huge(self) -> list[bool]:
        """Whether each page is mapped as part of a huge page now."""
        with Pagemap("vm", os.getpid()) as pagemap:
            region = self.regions[0]
            found = pagemap.categories(region.start, region.size_bytes // PAGE_BYTES)
        return [bool(each) for each in (found & HUGE)]


def test_huge_pages_that_are_left_alone_stay_whole_and_count_as_written() -> None:
    require(huge_pages_missing())
    with huge_pages({"enabled": "madvise"}):
        memory = HugeMemory()
        huge = np.array(memory.huge())
        assert huge.all()
        huge[WINDOW_PAGES : 2 * WINDOW_PAGES] = False  # this one is tracked
        with (
            Pagemap("vm", os.getpid()) as pagemap,
            closing(DirtyTracking(new_userfault(), pagemap, memory.space)) as tracker,
        ):
            asked = []
            for number in range(120):
                found = tracker.take_written(everywhere=True, huge=huge)
                assert found is not None
                written = set(found.page.tolist())
                assert written >= (set() if number else set(range(4 * WINDOW_PAGES)))
                assert (WINDOW_PAGES + 5 in written) == (number in (0, 1))
                assert (WINDOW_PAGES + 6 in written) == (number == 0)
                left_alone = [page for page in written if huge[page]]
                assert len(left_alone) in (0, 3 * WINDOW_PAGES)
                if left_alone:
                    asked.append(number)
                if number == 0:
                    memory.write([5, WINDOW_PAGES + 5, 3 * WINDOW_PAGES + 5])
            assert asked[:3] == [0, 1, 2]
            assert np.diff(asked[-3:]).tolist() == [27, 27]
            assert np.array_equal(memory.huge(), huge)
            hurried = tracker.take_written(everywhere=True, huge=huge, hurry=True)
            assert hurried is not None
            assert len(hurried.page) == 3 * WINDOW_PAGES
