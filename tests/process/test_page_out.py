"""Paging out our own memory: what is chosen, what the kernel leaves, and what comes back."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pytest

from tests.harness.capabilities import pagemap_scan_missing, root_missing
from tests.harness.limits import MemoryGroup, memory_group_missing, swap, swap_missing
from tests.harness.skips import require
from tests.process.test_tracking import new_userfault
from tests.process.victims import as_nobody
from vmdedup.errors import VmGoneError
from vmdedup.guest.dirty_tracking import DirtyTracking
from vmdedup.guest.page_out import are_present, in_part, page_out, swappable, untouched
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux import syscalls
from vmdedup.linux.cgroup import swap_left_bytes
from vmdedup.linux.pagemap import HUGE, PRESENT, Pagemap
from vmdedup.linux.process import Process
from vmdedup.linux.swap import read_swap
from vmdedup.linux.syscalls import NR, syscall
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES

pytestmark = [pytest.mark.process, pytest.mark.alone]

PAGES = 2048
ALL = np.arange(PAGES)
SHARED_FIRST = PAGES // 2
"""The first half is anonymous memory, the second half a memfd."""
_HUGE = HUGE_PAGE_BYTES // PAGE_BYTES


@dataclass(frozen=True)
class Region:
    start: int
    size_bytes: int
    share: bool
    filesystem: str


class Memory:
    """Two regions of ours, each page with a content of its own, aligned to huge pages."""

    def __init__(self, exits: ExitStack, *, huge: bool = False) -> None:
        half_bytes = SHARED_FIRST * PAGE_BYTES
        memfd = os.memfd_create("victim")
        exits.callback(os.close, memfd)
        os.ftruncate(memfd, half_bytes)
        self._room = mmap.mmap(-1, 4 * half_bytes, mmap.MAP_PRIVATE)
        room = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        start = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if not huge:
            self._room.madvise(mmap.MADV_NOHUGEPAGE)
        else:
            self._room.madvise(mmap.MADV_HUGEPAGE)
        fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED
        syscall(NR.MMAP, start + half_bytes, half_bytes, 3, fixed, memfd, 0)
        self.regions = [
            Region(start, half_bytes, False, ""),
            Region(start + half_bytes, half_bytes, True, "memfd"),
        ]
        self.space = PageSpace(self.regions)
        buffer = (ctypes.c_uint64 * (PAGES * 512)).from_address(start)
        self.words = np.ctypeslib.as_array(buffer).reshape(PAGES, 512)
        self.contents = np.zeros(self.words.shape, dtype=np.uint64)
        random = np.random.default_rng(1).integers(1 << 63, size=(PAGES, 128), dtype=np.uint64)
        self.contents[:, :128] = random  # a quarter of each page: the rest is compressed away
        self.words[:] = self.contents

    def is_right(self) -> bool:
        return bool(np.array_equal(self.words, self.contents))


@contextmanager
def victim(*, huge: bool = False) -> Iterator[tuple[Memory, Pagemap, DirtyTracking]]:
    """The memory, its pagemap, and dirty tracking that has told of all pages."""
    require(pagemap_scan_missing())
    with ExitStack() as exits:
        memory = Memory(exits, huge=huge)
        pagemap = exits.enter_context(Pagemap("vm", os.getpid()))
        tracking = exits.enter_context(
            closing(DirtyTracking(new_userfault(), pagemap, memory.space))
        )
        tracking.take_written(everywhere=True)
        yield memory, pagemap, tracking


def chosen(memory: Memory, pagemap: Pagemap, page: np.ndarray = ALL) -> np.ndarray:
    fit, is_huge = untouched(pagemap, memory.regions, memory.space, page)
    return page[fit & ~in_part(memory.space, page, fit & is_huge)]


def test_what_was_written_since_is_not_chosen_and_asking_resets_nothing() -> None:
    with victim() as (memory, pagemap, tracking):
        assert chosen(memory, pagemap).tolist() == ALL.tolist()
        written = [3, 4, SHARED_FIRST, PAGES - 1]
        memory.words[written] += 1
        for _ in range(2):
            assert set(ALL.tolist()) - set(chosen(memory, pagemap).tolist()) == set(written)
        told = tracking.take_written(everywhere=True)
        assert told is not None
        assert told.page.tolist() == written
        assert chosen(memory, pagemap, ALL[::3]).tolist() == ALL[::3].tolist()


def test_nothing_is_chosen_that_nobody_tracks_or_that_is_not_there() -> None:
    with victim() as (memory, pagemap, tracking):
        syscall(NR.MADVISE, memory.regions[0].start, PAGE_BYTES, mmap.MADV_DONTNEED)
        assert chosen(memory, pagemap).tolist() == ALL[1:].tolist()
        tracking.close()
        assert not len(chosen(memory, pagemap))


def test_a_huge_page_is_chosen_whole_or_not_at_all() -> None:
    with victim(huge=True) as (memory, pagemap, _tracking):
        block = ALL[:_HUGE]
        if not (pagemap.categories(memory.regions[0].start, _HUGE) & HUGE).all():
            pytest.skip("the kernel has no huge page to give now")
        assert chosen(memory, pagemap, block).tolist() == block.tolist()
        assert not len(chosen(memory, pagemap, block[1:]))
        assert not len(chosen(memory, pagemap, block[::2]))


def test_files_on_other_filesystems_are_not_swappable() -> None:
    space = PageSpace([Region(0, PAGE_BYTES, share, "") for share in (False, True, True)])
    backings = [
        Region(0, PAGE_BYTES, False, "ext4"),
        Region(0, PAGE_BYTES, True, "ext4"),
        Region(0, PAGE_BYTES, True, "tmpfs"),
    ]
    assert swappable(backings, space).tolist() == [True, False, True]


def test_all_goes_out_but_what_is_locked_and_comes_back_as_it_was() -> None:
    require(swap_missing("zram"))
    locked = [10, 11, 12]
    with swap(64), victim() as (memory, pagemap, tracking), Process("vm", os.getpid()) as self:
        address = int(memory.space.hva(np.array(locked[:1]))[0])
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mlock(ctypes.c_void_p(address), len(locked) * PAGE_BYTES) == 0
        tracking.take_written(everywhere=True)
        page = chosen(memory, pagemap)
        assert set(locked) <= set(page.tolist())
        is_out = page_out(self, pagemap, memory.space, page)
        # The kernel ends a range where it is locked: what follows in it is left as well.
        assert page[is_out].tolist() == [*range(10), *range(SHARED_FIRST, PAGES)]
        assert not are_present(pagemap, memory.space, page[is_out]).any()
        swapped = read_swap()
        assert swapped.is_memory
        assert 0.5 < swapped.saved_share < 0.75
        assert memory.is_right()
        assert are_present(pagemap, memory.space, ALL).all()
        assert chosen(memory, pagemap).tolist() == ALL.tolist(), "a read is no write"
        assert libc.munlock(ctypes.c_void_p(address), len(locked) * PAGE_BYTES) == 0


def test_a_hole_in_the_ranges_is_passed_over() -> None:
    require(swap_missing("zram"))
    with swap(64), victim() as (memory, pagemap, _tracking), Process("vm", os.getpid()) as self:
        page = np.concatenate([ALL[:100], ALL[200:300], ALL[400:500]])
        start = int(memory.space.hva(ALL[200:201])[0])
        syscall(NR.MUNMAP, start, 100 * PAGE_BYTES)
        is_out = page_out(self, pagemap, memory.space, page)
        assert is_out.all()
        present = pagemap.categories(memory.regions[0].start, 500) & PRESENT != 0
        assert present.nonzero()[0].tolist() == [*range(100, 200), *range(300, 400)]
        kept = np.r_[0:200, 300:PAGES]
        assert np.array_equal(memory.words[kept], memory.contents[kept])


def test_a_refusal_is_told_and_a_process_that_ended() -> None:
    require(root_missing())
    with victim() as (memory, pagemap, _tracking), child() as pid, Process("vm", pid) as other:
        with as_nobody(), pytest.raises(PermissionError, match="paging out: Permission denied"):
            page_out(other, pagemap, memory.space, ALL[:1])
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(VmGoneError):
            page_out(other, pagemap, memory.space, ALL[:1])


def test_what_the_kernel_cannot_take_out_now_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_something(*_: object) -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with victim() as (memory, pagemap, _tracking), Process("vm", os.getpid()) as self:
        monkeypatch.setattr(syscalls, "process_madvise", out_of_something)
        assert not page_out(self, pagemap, memory.space, ALL).any()
        assert memory.is_right()


def test_swap_that_is_a_disk_is_not_called_memory() -> None:
    require(swap_missing("file"))
    with swap(64, kind="file"):
        assert not read_swap().is_memory
        assert read_swap().next_devices
    with swap(64, kind="zswap"):
        assert read_swap().is_memory
    assert not read_swap().next_devices


def test_nothing_is_lost_where_swap_is_full() -> None:
    require(swap_missing("zram"))
    with (
        swap(2),
        victim() as (memory, pagemap, _tracking),
        Process("vm", os.getpid()) as self,
    ):
        is_out = page_out(self, pagemap, memory.space, chosen(memory, pagemap))
        assert 0 < np.count_nonzero(is_out) < PAGES
        assert memory.is_right()


def test_the_limit_of_a_cgroup_on_swap_is_known() -> None:
    require(swap_missing("zram"))
    require(memory_group_missing())
    with swap(64), MemoryGroup() as group, child() as pid:
        room = swap_left_bytes(pid)
        assert 0 < room <= 64 << 20
        group.add(pid)
        assert swap_left_bytes(pid) == 0
        group.may_swap(True)
        assert swap_left_bytes(pid) == room


@contextmanager
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()
