"""Paging out memory of a VM, from outside: process_madvise with MADV_PAGEOUT.

Owns the choice of what may be advised right now, and the call. Promises that only pages are
advised that are in memory, were not written since dirty tracking was last asked, and that the
kernel swaps: anonymous memory and RAM files on tmpfs. Tells parts of huge pages apart, as
the kernel would split those (mm/madvise.c: madvise_cold_or_pageout_pte_range). Promises to
know afterwards what is really out. Refuses RAM files on other filesystems, where the kernel
would write the page to the file. What is locked, pinned, or mapped by others too, the kernel
itself leaves; so it does with a RAM file that we may not write (can_do_file_pageout).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.sorting import page_runs, ranges
from vmdedup.errors import VmGoneError
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import address_runs
from vmdedup.linux import mman, syscalls
from vmdedup.linux.filesystems import IN_MEMORY
from vmdedup.linux.pagemap import ENTRY_PRESENT, FILE, HUGE, PFNZERO, Pagemap
from vmdedup.linux.process import Process
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES, PAGE_SHIFT

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_LEFT_ALONE = (errno.EINVAL, errno.ENOMEM)
"""A range that is locked or of another kind, and one that is not mapped any more."""


class Backing(Protocol):
    """What of a region decides whether the kernel swaps it."""

    @property
    def share(self) -> bool: ...
    @property
    def filesystem(self) -> str: ...


def swappable(regions: Sequence[Backing], space: PageSpace) -> Bools:
    """Whether each page of the page space lies in memory that the kernel would swap out."""
    may = np.zeros(space.pages, dtype=np.bool_)
    for index, region in enumerate(regions):
        may[space.slice_of(index)] = not region.share or region.filesystem in IN_MEMORY
    return may


def untouched(
    pagemap: Pagemap, regions: Sequence[Backing], space: PageSpace, page: Int64s
) -> tuple[Bools, Bools]:
    """Which of these pages (ascending) are in memory, and were not written since last asked.

    False for pages that belong to the page cache. The second result is which are mapped as
    parts of huge pages. Raises VmGoneError.
    """
    start, length = page_runs(page, space.first_page)
    address = space.hva(start)
    found = pagemap.unwritten(address, address + length * PAGE_BYTES)
    pages = (found.end - found.start) >> PAGE_SHIFT
    number = space.hva(page) >> PAGE_SHIFT
    kinds = np.full(len(page), PFNZERO, dtype=np.int64)
    at = np.searchsorted(number, ranges(found.start >> PAGE_SHIFT, pages))
    kinds[at] = np.repeat(found.categories, pages)
    private = np.array([not region.share for region in regions])[space.region_of(page)]
    good = (kinds & PFNZERO == 0) & ~(private & (kinds & FILE != 0))
    return np.asarray(good), np.asarray(kinds & HUGE != 0)


def in_part(space: PageSpace, page: Int64s, is_huge: Bools) -> Bools:
    """Which of these pages are parts of huge pages that are not all among them."""
    block = space.hva(page) // HUGE_PAGE_BYTES
    known, row, count = np.unique(block[is_huge], return_inverse=True, return_counts=True)
    partial = np.zeros(len(page), dtype=np.bool_)
    if len(known):
        partial[is_huge] = (count < HUGE_PAGE_BYTES // PAGE_BYTES)[row]
    return partial


def page_out(process: Process, pagemap: Pagemap, space: PageSpace, page: Int64s) -> Bools:
    """Page these pages (ascending) out; returns which of them are not in memory any more.

    Raises VmGoneError, and OSError if the kernel permits none of it.
    """
    start, length = page_runs(page, space.first_page)
    address = space.hva(start)
    # SAFETY: this changes no content. The kernel brings a page back when it is touched, and
    # leaves what is locked, pinned or mapped by others. If an address has come to mean other
    # memory of this process, that is paged out. A kill right here leaves pages swapped out.
    _advise(process, list(zip(address.tolist(), (length * PAGE_BYTES).tolist(), strict=True)))
    faults.reached("paged-out")
    return ~are_present(pagemap, space, page)


def are_present(pagemap: Pagemap, space: PageSpace, page: Int64s) -> Bools:
    """Which of these pages (ascending) are in memory now. Raises VmGoneError."""
    entries = pagemap.entries_of(*address_runs(space.hva(page)))
    return np.asarray(entries & ENTRY_PRESENT != 0)


def _advise(process: Process, left: list[tuple[int, int]]) -> None:
    """Give the advice for all ranges, except for those that the kernel leaves alone.

    A call ends at the first range that it refuses, and tells how many bytes it did before.
    """
    while left:
        try:
            done_bytes = syscalls.process_madvise(
                process.pidfd, left[: syscalls.IOV_MAX], mman.MADV_PAGEOUT
            )
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error
            if error.errno == errno.EAGAIN:
                return  # the kernel is out of something: what is left stays in memory
            if error.errno not in _LEFT_ALONE:
                why = os.strerror(error.errno or 0)
                raise OSError(error.errno, f"paging out: {why}") from error
            done_bytes = 0
        left = _after(left, done_bytes) if done_bytes else left[1:]


def _after(some: list[tuple[int, int]], done_bytes: int) -> list[tuple[int, int]]:
    """What is left of (address, length) ranges after so many bytes."""
    for row, (address, size_bytes) in enumerate(some):
        if done_bytes < size_bytes:
            return [(address + done_bytes, size_bytes - done_bytes), *some[row + 1 :]]
        done_bytes -= size_bytes
    return []
