"""Making huge pages again of blocks of 2 MiB that are wholly the VM's own.

A block loses its huge page by other causes than a merge too: by dirty tracking that protected
it, or by an unmerge, after which all its pages are there again but lie scattered. khugepaged
would mend that in the course of an hour, if it ran; MADV_COLLAPSE does it at once (Linux 6.1,
mm/khugepaged.c: madvise_collapse).

Owns the choice of such blocks, and the call. Promises that a block with anything of ours in
it is left alone: each block has to lie in a single mapping, and that one not ours, by what
/proc/PID/maps says right before. Refuses regions for which QEMU has not asked for huge pages,
RAM files, and blocks with pages that are still to be merged. The kernel refuses others; these
are tried again much later.
"""

from __future__ import annotations

import errno
import time

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.rmap import KNOWN, OWN, STILL, UNSHARED
from vmdedup.errors import VmGoneError
from vmdedup.guest.mapping_state import MappingState
from vmdedup.guest.page_out import are_present
from vmdedup.linux import mman
from vmdedup.linux.maps import is_merged_onto, read_maps
from vmdedup.linux.pagemap import FILE, HUGE, PFNZERO, PRESENT, SWAPPED
from vmdedup.linux.syscalls import process_madvise
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_REFUSED_S = 600.0
"""Time after which blocks that the kernel refused are tried again, seconds."""
_LEAST_PASSES = 3
"""Passes until what can be merged in a new VM is known."""

Int64s = npt.NDArray[np.int64]


def collapse_some(vm: AttachedVm, most: int) -> int:
    """Collapse up to so many blocks of a VM; returns how many the kernel collapsed.

    Raises VmGoneError, or as `PageScan.refresh`.
    """
    record = vm.record
    if record.passes < _LEAST_PASSES and not record.resting:
        return 0
    if time.monotonic() - record.collapse_refused_at > _REFUSED_S:
        record.collapse_refused = record.collapse_refused[:0]
    block = _candidates(vm, vm.scan.known_state())
    block = block[~np.isin(block, record.collapse_refused)]
    block = block[_in_one_mapping(vm, _address(vm, block))][:most]
    block = block[_are_there(vm, block)]
    if not len(block):
        return 0
    done = 0
    for number, address in zip(block.tolist(), _address(vm, block).tolist(), strict=True):
        if vm.scan.dirty_tracking is not None:
            # Its pages count as written then; a protected page would not be collapsed.
            vm.scan.dirty_tracking.leave_alone(address, HUGE_PAGE_BYTES)
        if _collapse(vm, address):
            done += 1
        else:
            record.collapse_refused = np.append(record.collapse_refused, number)
            record.collapse_refused_at = time.monotonic()
    vm.scan.remapped()
    return done


def _candidates(vm: AttachedVm, state: MappingState) -> Int64s:
    """The blocks that are present, wholly the VM's own, and not huge; nothing is to be merged."""
    kinds = state.categories & (PRESENT | FILE | SWAPPED | PFNZERO | HUGE)
    suits = (kinds == PRESENT) & (state.slot == OWN)
    for index, region in enumerate(vm.regions):
        if region.share or "hg" not in vm.region_flags[index]:
            suits[vm.space.slice_of(index)] = False
    if not vm.record.resting:
        flags = vm.scan.columns.flags
        suits &= (flags & KNOWN != 0) & (flags & (STILL | UNSHARED) != STILL)
    blocks = vm.scan.blocks
    whole = blocks.pages_of * PAGE_BYTES == HUGE_PAGE_BYTES
    return np.flatnonzero(blocks.full(suits) & whole)


def _address(vm: AttachedVm, block: Int64s) -> Int64s:
    return vm.space.hva(vm.scan.blocks.start_page[block])


def _in_one_mapping(vm: AttachedVm, address: Int64s) -> npt.NDArray[np.bool_]:
    """Whether each block, by its address, lies in one mapping, which is not ours."""
    if not len(address):
        return np.zeros(0, dtype=np.bool_)
    maps = read_maps(vm.name, vm.pid)
    row = np.searchsorted(maps.start.astype(np.int64), address, side="right") - 1
    fits = (row >= 0) & (address + HUGE_PAGE_BYTES <= maps.end[row].astype(np.int64))
    for at in np.flatnonzero(fits).tolist():
        fits[at] = not is_merged_onto(maps.path[row[at]])
    return np.asarray(fits)


def _are_there(vm: AttachedVm, block: Int64s) -> npt.NDArray[np.bool_]:
    """Whether all pages of each block are still there: the kernel would fill discarded ones."""
    page, begin = vm.scan.blocks.pages(block)
    present = are_present(vm.pagemap, vm.space, page)
    return np.asarray(np.logical_and.reduceat(present, begin)) if len(block) else present


def _collapse(vm: AttachedVm, address: int) -> bool:
    """Have the kernel make one huge page of a block. Raises VmGoneError."""
    # SAFETY: the kernel copies the block's pages into a huge page while nobody can write them,
    # and changes no content. Pages that are pinned for DMA, or shared by anything else, it
    # refuses. If a page was merged since the mappings were read (only we do that, on this
    # thread), the block has several mappings, and the kernel refuses it. A kill right here
    # leaves a huge page, or not.
    try:
        process_madvise(vm.process.pidfd, [(address, HUGE_PAGE_BYTES)], mman.MADV_COLLAPSE)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise VmGoneError(vm.name, "the VM's process ended", pid=vm.pid) from error
        return False
    faults.reached("collapsed")
    return True
