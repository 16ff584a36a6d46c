"""Making huge pages again of blocks of 2 MiB in which nothing, or next to nothing, is saved.

A block loses its huge page by merges, of which little may be left once the guest has written
the pages; by an unmerge, after which all its pages are there again but lie scattered; or by
dirty tracking that protected it. khugepaged would mend that in the course of an hour, if it
ran, and only where a block lies in one mapping. MADV_COLLAPSE does it at once (Linux 6.1,
mm/khugepaged.c: madvise_collapse), after `gather` where the block lies in several.

Owns the choice of such blocks, and the call. Promises that the kernel is asked only for blocks
that lie in a single mapping, and that one not ours, by what /proc/PID/maps says right before.
Refuses regions for which QEMU has not asked for huge pages, RAM files, memory that is not
registered, and blocks in which too much is saved, or could be. The kernel refuses others, and
blocks that the guest keeps writing are not gathered; these are tried again much later.
"""

from __future__ import annotations

import errno
import time
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.rmap import KNOWN, OWN, STILL, UNSHARED
from vmdedup.errors import InjectionError, MergeError, VmGoneError
from vmdedup.guest.mapping_state import MappingState
from vmdedup.guest.page_out import are_present
from vmdedup.linux import mman
from vmdedup.linux.maps import is_merged_onto, read_maps
from vmdedup.linux.pagemap import FILE, HUGE, PFNZERO, PRESENT, SWAPPED
from vmdedup.linux.syscalls import process_madvise
from vmdedup.remap.context import Host
from vmdedup.remap.gather import gather, may_gather
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_REFUSED_S = 600.0
"""Time after which blocks that could not be made huge pages are tried again, seconds."""
_LEAST_PASSES = 3
"""Passes until what can be merged in a new VM is known."""

Int64s = npt.NDArray[np.int64]


def collapse_some(vm: AttachedVm, host: Host, *, most: int, most_savable: int) -> int:
    """Collapse up to so many blocks of a VM; returns how many the kernel collapsed.

    Blocks with more than `most_savable` savable pages stay split. Raises VmGoneError, or as
    `PageScan.refresh` and `may_gather`.
    """
    record = vm.record
    if record.passes < _LEAST_PASSES and not record.resting:
        return 0
    if time.monotonic() - record.collapse_refused_at > _REFUSED_S:
        record.collapse_refused = record.collapse_refused[:0]
    state = vm.scan.known_state()
    block = _candidates(vm, state, most_savable)
    block = block[~np.isin(block, record.collapse_refused)]
    is_one = _in_one_mapping(vm, block)
    if not is_one.all() and not may_gather(vm):
        block, is_one = block[is_one], is_one[is_one]
    block, is_one = block[:most], is_one[:most]
    is_there = _are_there(vm, state, block)
    block, is_one = block[is_there], is_one[is_there]
    if not len(block):
        return 0
    if not is_one.all():
        with suppress(MergeError, InjectionError):  # the VM is intact
            gather(host, vm, block[~is_one])
        is_one = _in_one_mapping(vm, block)
        _note_refused(vm, block[~is_one])
        block = block[is_one]
    done = 0
    for number, address in zip(block.tolist(), _address(vm, block).tolist(), strict=True):
        if vm.scan.dirty_tracking is not None:
            # Its pages count as written then; a protected page would not be collapsed.
            vm.scan.dirty_tracking.leave_alone(address, HUGE_PAGE_BYTES)
        if _collapse(vm, address):
            done += 1
        else:
            _note_refused(vm, np.array([number]))
    # A pass that is under way must know at once which pages came home, in huge pages.
    vm.scan.refresh()
    return done


def _note_refused(vm: AttachedVm, block: Int64s) -> None:
    """Note blocks that could not be moved, or collapsed, to be left alone for a while."""
    record = vm.record
    if len(block) and not len(record.collapse_refused):
        record.collapse_refused_at = time.monotonic()
    record.collapse_refused = np.append(record.collapse_refused, block)


def _candidates(vm: AttachedVm, state: MappingState, most_savable: int) -> Int64s:
    """The blocks that are present and not huge, and in which at most so many pages are savable.

    Savable are merged pages, and those of the VM's own that have an equal. A VM at rest is
    not merged, so nothing of it is savable.
    """
    kinds = state.categories & (PRESENT | FILE | SWAPPED | PFNZERO | HUGE)
    suits = (kinds == PRESENT) & ((state.slot == OWN) | state.broken) & vm.registered
    savable = np.zeros(len(suits), dtype=np.bool_)
    if not vm.record.resting:
        flags = vm.scan.columns.flags
        savable = state.merged | state.zero
        suits = (suits & (flags & KNOWN != 0)) | savable
        savable |= flags & (STILL | UNSHARED) == STILL
    for index, region in enumerate(vm.regions):
        is_file = region.share or region.ram_file is not None
        if is_file or "hg" not in vm.region_flags[index]:
            suits[vm.space.slice_of(index)] = False
    blocks = vm.scan.blocks
    whole = blocks.pages_of * PAGE_BYTES == HUGE_PAGE_BYTES
    return np.flatnonzero(blocks.full(suits) & whole & (blocks.count(savable) <= most_savable))


def _address(vm: AttachedVm, block: Int64s) -> Int64s:
    return vm.space.hva(vm.scan.blocks.start_page[block])


def _in_one_mapping(vm: AttachedVm, block: Int64s) -> npt.NDArray[np.bool_]:
    """Whether each block lies in one mapping, which is not ours."""
    if not len(block):
        return np.zeros(0, dtype=np.bool_)
    address = _address(vm, block)
    maps = read_maps(vm.name, vm.pid)
    row = np.searchsorted(maps.start.astype(np.int64), address, side="right") - 1
    fits = (row >= 0) & (address + HUGE_PAGE_BYTES <= maps.end[row].astype(np.int64))
    for at in np.flatnonzero(fits).tolist():
        fits[at] = not is_merged_onto(maps.path[row[at]])
    return np.asarray(fits)


def _are_there(vm: AttachedVm, state: MappingState, block: Int64s) -> npt.NDArray[np.bool_]:
    """Whether all of the VM's own pages of each block are still there.

    The kernel would fill those that were discarded, and so would `gather`.
    """
    page, begin = vm.scan.blocks.pages(block)
    present = are_present(vm.pagemap, vm.space, page) | (state.slot[page] != OWN)
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
        if error.errno == errno.ESRCH:  # uncovered: it ends between two of our calls
            raise VmGoneError(vm.name, "the VM's process ended", pid=vm.pid) from error
        return False
    faults.reached("collapsed")
    return True
