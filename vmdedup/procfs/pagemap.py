"""/proc/PID/pagemap: which pages of a process exist, and what backs them.

Owns both ways to ask: the PAGEMAP_SCAN ioctl (kernel 6.7; ranges, cheap where
nothing is mapped) and the raw 64-bit entries (any kernel, 8 bytes a page).
Both give the same per-page categories. Reads only, except `written`, which
resets the write protection of an asynchronous userfaultfd (fs/proc/task_mmu.c,
Documentation/admin-guide/mm/pagemap.rst). Entries need CAP_SYS_ADMIN to show
frame numbers and swap types.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup import syscalls
from vmdedup.callloop import call_columns, run_calls
from vmdedup.closing import Closing
from vmdedup.errors import VmGoneError
from vmdedup.syscalls import NR
from vmdedup.units import PAGE_BYTES

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
ENTRY_UFFD_WP = np.uint64(1 << 57)
ENTRY_FILE = np.uint64(1 << 61)
ENTRY_SWAPPED = np.uint64(1 << 62)
ENTRY_PRESENT = np.uint64(1 << 63)
_ENTRY_PFN = np.uint64((1 << 55) - 1)
_ENTRY_SWAP_TYPE = np.uint64(0x1F)
_SWAP_TYPE_PTE_MARKER = np.uint64(31)
"""SWP_PTE_MARKER is always the last of 32 swap types (include/linux/swap.h)."""

_ENTRY_BYTES = 8
_VECTOR_REGIONS = 4096


class _PmScanArg(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


@dataclass(frozen=True)
class PageRegions:
    """Ranges of pages with equal categories: int64 addresses, uint64 categories, shape (n,)."""

    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    categories: npt.NDArray[np.uint64]


class Pagemap(Closing):
    """The pagemap of one process, held open (so it never speaks of a later pid).

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
        """Raw entries of many runs, one after another: uint64, shape (pages.sum(),)."""
        size = pages * _ENTRY_BYTES
        entries = np.zeros(int(pages.sum()), dtype=np.uint64)
        target = entries.ctypes.data + np.cumsum(size) - size
        offset = start // PAGE_BYTES * _ENTRY_BYTES
        results = run_calls(call_columns(NR.PREAD64, self._fd, target, size, offset))
        if (results != size).any():
            raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid)
        return entries

    def categories(self, start: int, pages: int) -> npt.NDArray[np.uint8]:
        """Categories of each page: FILE, PRESENT, SWAPPED, PFNZERO bits; uint8, shape (pages,).

        A page-table marker (what write protection leaves on an untouched file
        page) counts as absent, as it holds no content.
        """
        if not self.use_scan:
            return self._categories_from_entries(self.entries(start, pages))
        column = np.zeros(pages, dtype=np.uint8)
        end = start + pages * PAGE_BYTES
        found = self.scan(start, end, anyof=PRESENT | SWAPPED)
        first = (found.start - start) // PAGE_BYTES
        last = (found.end - start) // PAGE_BYTES
        for low, high, bits in zip(
            first.tolist(), last.tolist(), found.categories.tolist(), strict=True
        ):
            if bits & SWAPPED:
                entries = self.entries(start + low * PAGE_BYTES, high - low)
                column[low:high] = self._categories_from_entries(entries)
            else:
                column[low:high] = bits
        return column

    def categories_of(
        self, start: npt.NDArray[np.int64], pages: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Categories of many runs, one after another: uint8, shape (pages.sum(),)."""
        return self._categories_from_entries(self.entries_of(start, pages))

    def _categories_from_entries(self, entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        present = (entries & ENTRY_PRESENT) != 0
        swapped = (entries & ENTRY_SWAPPED) != 0
        marker = swapped & ((entries & _ENTRY_SWAP_TYPE) == _SWAP_TYPE_PTE_MARKER)
        file = (entries & ENTRY_FILE) != 0
        # Without CAP_SYS_ADMIN all frames read as 0: then no page is taken for the zero page.
        frame = zero_page_frame()
        zero = present & (frame != 0) & ((entries & _ENTRY_PFN) == np.uint64(frame))
        column = np.where(present, PRESENT, 0) | np.where(swapped & ~marker, SWAPPED, 0)
        column |= np.where(file & present, FILE, 0) | np.where(zero, PFNZERO, 0)
        return column.astype(np.uint8)

    def scan(
        self,
        start: int,
        end: int,
        *,
        required: int = 0,
        anyof: int = 0,
        returned: int = _KINDS,
    ) -> PageRegions:
        """Ranges in [start, end) that have all `required` and any of `anyof` categories."""
        return self._scan(start, end, 0, required, anyof, returned)

    def written(self, start: int, end: int) -> PageRegions:
        """Take and reset the set of pages written since the last call, with categories.

        Only for ranges registered with an asynchronous userfaultfd: EPERM when a
        mapping in the range is not.
        """
        # SAFETY: changes only write-protect bits that an asynchronous userfaultfd
        # resolves inside the kernel; a kill right here costs one lost hint, and
        # the hints of a killed process are never used.
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
        return self._scan(start, end, flags, WRITTEN, PRESENT | SWAPPED, _KINDS)

    def _scan(
        self, start: int, end: int, flags: int, required: int, anyof: int, returned: int
    ) -> PageRegions:
        parts = []
        position = start
        while position < end:
            argument = _PmScanArg(
                size=ctypes.sizeof(_PmScanArg),
                flags=flags,
                start=position,
                end=end,
                vec=self._vector.ctypes.data,
                vec_len=_VECTOR_REGIONS,
                category_mask=required,
                category_anyof_mask=anyof,
                return_mask=returned,
            )
            try:
                count = syscalls.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            except ProcessLookupError as error:
                raise VmGoneError(self.vm, "the VM's process ended", pid=self.pid) from error
            parts.append(self._vector[:count].copy())
            if argument.walk_end <= position:
                break
            position = argument.walk_end
        table = np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.uint64)
        return PageRegions(
            table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2].copy()
        )


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
