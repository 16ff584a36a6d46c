"""/proc/PID/pagemap: the pages of a process that exist, and their backing.

Owns both ways to ask: the PAGEMAP_SCAN ioctl (kernel 6.7; ranges, cheap where
nothing is mapped) and the raw 64-bit entries (any kernel, 8 bytes a page).
Both give the same per-page categories. Reads only, except `written`, which
resets the write protection of an asynchronous userfaultfd (fs/proc/task_mmu.c,
Documentation/admin-guide/mm/pagemap.rst). Entries need CAP_SYS_ADMIN to show
frame numbers and swap types.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.closing import Closing
from vmdedup.core.sorting import ranges
from vmdedup.errors import BorderError, VmGoneError
from vmdedup.linux.borders import require_inside, require_runs
from vmdedup.linux.syscall_batch import call_columns, require_done, run_calls
from vmdedup.linux.syscalls import NR
from vmdedup.units import PAGE_BYTES, PAGE_SHIFT

# Categories of PAGEMAP_SCAN (include/uapi/linux/fs.h).
WPALLOWED = 1 << 0
WRITTEN = 1 << 1
FILE = 1 << 2
PRESENT = 1 << 3
SWAPPED = 1 << 4
PFNZERO = 1 << 5
HUGE = 1 << 6
_KINDS = FILE | PRESENT | SWAPPED | PFNZERO | HUGE

_PM_SCAN_WP_MATCHING = 1 << 0
_PM_SCAN_CHECK_WPASYNC = 1 << 1
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)

# Raw entry bits (Documentation/admin-guide/mm/pagemap.rst).
_ENTRY_SOFT_DIRTY = np.uint64(1 << 55)
_ENTRY_EXCLUSIVE = np.uint64(1 << 56)
ENTRY_UFFD_WP = np.uint64(1 << 57)
ENTRY_FILE = np.uint64(1 << 61)
ENTRY_SWAPPED = np.uint64(1 << 62)
ENTRY_PRESENT = np.uint64(1 << 63)
_ENTRY_PFN = np.uint64((1 << 55) - 1)
_ENTRY_SWAP_TYPE = np.uint64(0x1F)
_SWAP_TYPE_PTE_MARKER = np.uint64(31)
"""SWP_PTE_MARKER is always the last of 32 swap types (include/linux/swap.h)."""

ENTRY_OF_PAGE = ~(_ENTRY_SOFT_DIRTY | _ENTRY_EXCLUSIVE)
"""Entry bits that change only with the mapped page, its presence, or its protection."""

_ENTRY_BYTES = 8
_VECTOR_REGIONS = 4096
_READ_WHOLE_PAGES = 2048
"""Span, in pages, up to which all entries are read: that costs little more than finding gaps."""
_READ_OVER_BYTES = 32 * PAGE_BYTES
"""Widest gap between runs that is read too: that costs less than one more call."""
_MOST_SCANS = 64
"""Ranges asked for at once. They share the vector's room; a range with more regions goes on."""


# Words of struct pm_scan_arg (include/uapi/linux/fs.h), of 64 bits each.
_SIZE, _FLAGS, _START, _END, _WALKED, _VECTOR, _VECTOR_LENGTH = range(7)
_INVERTED, _REQUIRED, _ANYOF, _RETURNED = 8, 9, 10, 11
_ARGUMENT_WORDS = 12


@dataclass(frozen=True)
class PageRegions:
    """Ranges of pages with equal categories: int64 addresses and categories, shape (n,)."""

    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[PageRegions]) -> PageRegions:
        """The regions of all parts, ascending."""
        start = np.concatenate([part.start for part in parts])
        order = np.argsort(start, kind="stable")
        return cls(
            start[order],
            np.concatenate([part.end for part in parts])[order],
            np.concatenate([part.categories for part in parts])[order],
        )


class Pagemap(Closing):
    """The pagemap of one process, held open (so it never shows a later process of that pid).

    `use_scan` False answers everything from raw entries.
    """

    def __init__(self, vm: str, pid: int, *, use_scan: bool = True) -> None:
        self.vm = vm
        self.pid = pid
        self.use_scan = use_scan
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise VmGoneError(vm, "the VM's process ended", pid=pid) from error
        self._vector = np.empty((_VECTOR_REGIONS, 3), dtype=np.uint64)

    @property
    def fd(self) -> int:
        """The open descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def entries(self, start: int, pages: int) -> npt.NDArray[np.uint64]:
        """Raw entries of `pages` pages from address `start`: uint64, shape (pages,)."""
        entries = np.zeros(pages, dtype=np.uint64)
        view = memoryview(entries.view(np.uint8))  # type: ignore[arg-type]
        done, offset = 0, start // PAGE_BYTES * _ENTRY_BYTES
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid)
            done += count
        return entries

    def entries_of(
        self, start: npt.NDArray[np.int64], pages: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """Raw entries of many ascending runs, one after another: uint64, shape (pages.sum(),).

        Raises BorderError if they do not ascend.
        """
        if not len(start):
            return np.empty(0, dtype=np.uint64)
        require_runs(start, pages)
        span_pages = (int(start[-1] - start[0]) >> PAGE_SHIFT) + int(pages[-1])
        if span_pages <= _READ_WHOLE_PAGES:
            whole = self.entries(int(start[0]), span_pages)
            return whole[ranges((start - start[0]) >> PAGE_SHIFT, pages)]
        end = start + pages * PAGE_BYTES
        apart = start[1:] - end[:-1] > _READ_OVER_BYTES
        first, last = np.append(True, apart), np.append(apart, True)
        offset = start[first] // PAGE_BYTES * _ENTRY_BYTES
        size = end[last] // PAGE_BYTES * _ENTRY_BYTES - offset
        entries = np.empty(int(size.sum()) // _ENTRY_BYTES, dtype=np.uint64)
        before = np.cumsum(size) - size
        require_inside(before, before + size, 0, entries.nbytes)
        target = entries.ctypes.data + before
        results = run_calls(call_columns(NR.PREAD64, self._fd, target, size, offset))
        if (results != size).any():
            raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid)
        piece = np.cumsum(first) - 1
        row = start // PAGE_BYTES + ((before - offset) // _ENTRY_BYTES)[piece]
        return entries[ranges(row, pages)]

    def categories(self, start: int, pages: int) -> npt.NDArray[np.uint8]:
        """Categories of each page: FILE, PRESENT, SWAPPED, PFNZERO bits; uint8, shape (pages,).

        A page-table marker (left by write protection on an untouched file page)
        counts as absent, as it holds no content.
        """
        column = np.zeros(pages, dtype=np.uint8)
        self.note_categories(start, column)
        return column

    def note_categories(self, start: int, column: npt.NDArray[np.uint8]) -> None:
        """Write `categories` into `column`, which is all zeroes; absent pages stay zero.

        With PAGEMAP_SCAN only memory of the column for pages that exist is touched.
        """
        if not self.use_scan:
            column[:] = categories_of(self.entries(start, len(column)))
            return
        end = start + len(column) * PAGE_BYTES
        found = self.scan(start, end, anyof=PRESENT | SWAPPED)
        first = (found.start - start) // PAGE_BYTES
        last = (found.end - start) // PAGE_BYTES
        count = last - first
        column[ranges(first, count)] = np.repeat(found.categories.astype(np.uint8), count)
        swapped = np.flatnonzero(found.categories & SWAPPED)
        for low, high in zip(first[swapped].tolist(), last[swapped].tolist(), strict=True):
            column[low:high] = categories_of(self.entries(start + low * PAGE_BYTES, high - low))

    def scan(self, start: int, end: int, *, required: int = 0, anyof: int = 0) -> PageRegions:
        """Ranges in [start, end) with all `required` categories and any of `anyof`."""
        found, results = self._scan(np.array([start]), np.array([end]), 0, required, anyof)
        require_done(results, "PAGEMAP_SCAN")
        require_inside(found.start, found.end, start, end)
        return found

    def present(self, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> PageRegions:
        """The pages that exist, in memory or swap, in many ascending ranges."""
        found, results = self._scan(start, end, 0, 0, PRESENT | SWAPPED)
        require_done(results, "PAGEMAP_SCAN")
        return found

    def written(
        self, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
    ) -> tuple[PageRegions, npt.NDArray[np.bool_]]:
        """Take and reset the set of pages written since the last call, in many ranges.

        `start`, `end`: ascending addresses, int64, shape (n,), registered with an
        asynchronous userfaultfd. The second result masks the ranges with a mapping that
        is not registered (EPERM); their pages are not reported.
        """
        # SAFETY: changes only write-protect bits that an asynchronous userfaultfd
        # resolves inside the kernel. A kill right here loses one hint, and the
        # hints of a killed process are never used.
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
        found, results = self._scan(start, end, flags, WRITTEN, PRESENT | SWAPPED)
        refused = results == -errno.EPERM
        require_done(results[~refused], "PAGEMAP_SCAN")
        told = ~refused[np.searchsorted(start, found.start, side="right") - 1]
        return PageRegions(found.start[told], found.end[told], found.categories[told]), refused

    def unwritten(self, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> PageRegions:
        """Pages in memory not written since the last `written`, in many ascending ranges.

        Unlike `written` it resets nothing. Memory that is not registered has no such pages.
        """
        present = PRESENT | WRITTEN
        found, results = self._scan(start, end, 0, present, PRESENT, inverted=WRITTEN)
        require_done(results, "PAGEMAP_SCAN")
        return found

    def _scan(
        self,
        start: npt.NDArray[np.int64],
        end: npt.NDArray[np.int64],
        flags: int,
        required: int,
        anyof: int,
        inverted: int = 0,
    ) -> tuple[PageRegions, npt.NDArray[np.int64]]:
        """The regions found in ascending ranges, and the last call's result for each range.

        Of `required` those in `inverted` must be absent.
        """
        results = np.zeros(len(start), dtype=np.int64)
        arguments = np.zeros((len(start), _ARGUMENT_WORDS), dtype=np.uint64)
        arguments[:, _FLAGS] = flags
        arguments[:, _START], arguments[:, _END] = start, end
        arguments[:, _REQUIRED], arguments[:, _ANYOF] = required, anyof
        arguments[:, _INVERTED] = inverted
        arguments[:, _SIZE], arguments[:, _RETURNED] = arguments.strides[0], _KINDS
        parts = [np.empty((0, 3), dtype=np.uint64)]
        left = np.arange(len(start))
        while len(left):
            now, left = left[:_MOST_SCANS], left[_MOST_SCANS:]
            share = _VECTOR_REGIONS // len(now)
            first = np.arange(len(now)) * share
            arguments[now, _VECTOR] = self._vector.ctypes.data + first * self._vector.strides[0]
            arguments[now, _VECTOR_LENGTH] = share
            address = arguments.ctypes.data + now * arguments.strides[0]
            result = run_calls(call_columns(NR.IOCTL, self._fd, _PAGEMAP_SCAN, address))
            if (result == -errno.ESRCH).any():
                raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid)
            if (result > share).any():
                raise BorderError(f"{result.max()} ranges told, where {share} have room")
            results[now] = result
            parts.append(self._vector[ranges(first, np.maximum(result, 0))])
            walked = arguments[now, _WALKED]
            is_full = (arguments[now, _START] < walked) & (walked < arguments[now, _END])
            arguments[now, _START] = walked
            left = np.concatenate([now[is_full & (result >= 0)], left])
        table = np.concatenate(parts).view(np.int64)
        table = table[np.argsort(table[:, 0], kind="stable")]
        return PageRegions(table[:, 0], table[:, 1], table[:, 2]), results


def categories_of(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Categories of pages by their raw entries, as `Pagemap.categories`."""
    present = (entries & ENTRY_PRESENT) != 0
    swapped = (entries & ENTRY_SWAPPED) != 0
    marker = swapped & ((entries & _ENTRY_SWAP_TYPE) == _SWAP_TYPE_PTE_MARKER)
    file = (entries & ENTRY_FILE) != 0
    # Without CAP_SYS_ADMIN all frames read as `0`: then no page is taken for the zero page.
    frame = zero_page_frame()
    zero = present & (frame != 0) & ((entries & _ENTRY_PFN) == np.uint64(frame))
    column = np.where(present, PRESENT, 0) | np.where(swapped & ~marker, SWAPPED, 0)
    column |= np.where(file & present, FILE, 0) | np.where(zero, PFNZERO, 0)
    return column.astype(np.uint8)


def frames_of(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Frame numbers of present pages by their raw entries; all `0` without CAP_SYS_ADMIN."""
    return (entries & _ENTRY_PFN).view(np.int64)


_zero_page_frame: list[int] = []


def zero_page_frame() -> int:
    """Frame number of the kernel's zero page, learnt from a read of untouched memory."""
    if not _zero_page_frame:
        with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            column = np.frombuffer(page, dtype=np.uint8)
            address = column.ctypes.data
            untouched = int(column[0])  # the read that maps the zero page
            with Pagemap("vmdedup", os.getpid()) as own:
                frame = (int(own.entries(address, 1)[0]) & int(_ENTRY_PFN)) + untouched
            del column
        _zero_page_frame.append(frame)
    return _zero_page_frame[0]


def has_pagemap_scan() -> bool:
    """Whether this kernel answers PAGEMAP_SCAN: tried on ourselves."""
    with Pagemap("vmdedup", os.getpid()) as own:
        try:
            own.scan(0, PAGE_BYTES, required=PRESENT)
        except OSError:
            return False
    return True
