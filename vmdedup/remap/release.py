"""Giving the memory of merged pages back to the host.

On some backends a remap by itself frees nothing. Owns the two steps that then free the
memory: punching the RAM file of share=on RAM, and making the kernel split large folios of
which only parts are still mapped. Both can be repeated safely: what a killed predecessor did
in part is finished by doing it again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.core.sorting import page_runs
from vmdedup.errors import MergeError, VmGoneError
from vmdedup.guest.large_folios import NOTHING_KEPT, KeptMemory, kept_memory, still_kept
from vmdedup.guest.mapping_state import open_ram_file
from vmdedup.guest.page_space import PageSpace
from vmdedup.linux import mman, syscalls
from vmdedup.linux.pagemap import Pagemap
from vmdedup.linux.process import Process
from vmdedup.linux.sparse_file import punch_holes
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES


def punch_merged(
    process: Process, regions: Sequence[Region], space: PageSpace, page: npt.NDArray[np.int64]
) -> int:
    """Free the RAM file's pages behind merged page indices; returns the pages punched.

    Pages of backends that are not share=on are skipped: their old memory went
    with the remap.
    """
    punched = 0
    for index, region in enumerate(regions):
        if not region.share:
            continue
        first = int(space.first_page[index])
        inside = page[(page >= first) & (page < first + region.pages)] - first
        if not len(inside):
            continue
        try:
            fd = open_ram_file(process.pid, region, os.O_RDWR)
        except OSError as error:
            process.require_alive()
            raise MergeError(process.vm, "punch", str(error), pid=process.pid) from error
        try:
            start, length = page_runs(np.sort(inside), np.empty(0, dtype=np.int64))
            # SAFETY: the kernel confirmed that QEMU maps these addresses onto the
            # store, and no other process maps the file (checked at attach). So
            # nobody can reach the freed pages. Killed in between: the rest stays
            # allocated until the next pass punches it.
            offset = region.ram_offset_bytes + start * PAGE_BYTES
            punch_holes(fd, offset, length * PAGE_BYTES)
        finally:
            os.close(fd)
        punched += len(inside)
    return punched


def split_large_folios(
    process: Process,
    pagemap: Pagemap,
    space: PageSpace,
    slot: npt.NDArray[np.int32],
    page: npt.NDArray[np.int64],
    most_pages: int,
) -> KeptMemory:
    """Make the kernel split the large folios that had pages at or near these merged pages.

    `most_pages`: the size of the largest folio. Returns the memory kept by folios that could
    not be split, as far as it can be known. MADV_COLD splits a folio that is partly mapped or
    advised in part (mm/madvise.c: madvise_cold_or_pageout_pte_range), so one page is enough.
    """
    page = np.sort(page)
    kept = kept_memory(pagemap, space, slot, page, most_pages)
    if kept is None:
        _advise_cold(process, _blocks_around(space, page))
        return NOTHING_KEPT
    if not len(kept.page):
        return kept
    _advise_cold(process, [(address, PAGE_BYTES) for address in space.hva(kept.page).tolist()])
    return still_kept(pagemap, space, kept)


def _blocks_around(space: PageSpace, page: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The (address, length) of all huge pages that these pages can be part of."""
    number = space.hva(page) // HUGE_PAGE_BYTES
    start, length = page_runs(np.unique(number), np.empty(0, dtype=np.int64))
    spans = space.spans()
    blocks = []
    for low, count in zip(start.tolist(), length.tolist(), strict=True):
        first, last = low * HUGE_PAGE_BYTES, (low + count) * HUGE_PAGE_BYTES
        blocks += [
            (max(first, begin), min(last, end) - max(first, begin))
            for begin, end in spans
            if first < end and last > begin
        ]
    return blocks


def _advise_cold(process: Process, ranges: Sequence[tuple[int, int]]) -> None:
    for first in range(0, len(ranges), syscalls.IOV_MAX):
        _advise_some_cold(process, ranges[first : first + syscalls.IOV_MAX])


def _advise_some_cold(process: Process, ranges: Sequence[tuple[int, int]]) -> None:
    try:
        syscalls.process_madvise(process.pidfd, ranges, mman.MADV_COLD)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid) from error
        # Not permitted or unknown to this kernel: the pages stay merged, but the rest
        # of their large folios is freed later, when memory gets short.
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            raise
