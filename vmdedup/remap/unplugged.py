"""Merged pages that virtio-mem has unplugged: mapped back, emptied.

QEMU discards the memory of a block when it is unplugged. A page that is mapped from a store
has none there: it shows the store's page again, and the store keeps that page. Owns mapping
such pages back onto untouched memory of the VM's own, so that the store page can go.

Which blocks these are is known of a device without any plugged block (as after a reset), and
of others by `vm.unplugged_blocks`. Promises that a block which is plugged meanwhile keeps what
the guest writes there. What a plugged block holds before is undefined (Virtio 1.3, 5.15.6).
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import OWN
from vmdedup.core.sorting import page_runs
from vmdedup.guest.mapping_state import open_ram_file
from vmdedup.linux.sparse_file import allocated, punch_holes
from vmdedup.remap.context import Host
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


def map_back_unplugged(host: Host, vm: AttachedVm) -> int:
    """Map back what is merged in unplugged blocks; returns the pages. Raises VmError, OSError."""
    state = vm.scan.state
    if state is None or not vm.may_discard:
        return 0
    unplugged = _unplugged(vm)
    _free_private_files(vm, unplugged)
    which = unplugged & (state.slot != OWN)
    if not which.any():
        return 0

    def still_unplugged() -> npt.NDArray[np.bool_]:
        vm.ask_taken()
        vm.scan.refresh()
        return _unplugged(vm)

    # SAFETY: killed at any point, each page shows its store page or untouched memory. Both are
    # right for a block that is not plugged, and for a page that the guest has not written yet.
    return unmerge_vm(host, vm, which, given_up=still_unplugged).restored_pages


def _free_private_files(vm: AttachedVm, unplugged: npt.NDArray[np.bool_]) -> None:
    """Free what the files behind private memory have there. Raises OSError.

    A look at a page that was discarded a moment before makes the file's page, and nothing else
    would free it. SAFETY: the guest's writes are never in that file, and the hole leaves them
    alone. The file is zeroes throughout: QEMU empties it when the device is made.
    """
    for index, region in enumerate(vm.regions):
        if region.share or region.ram_file is None:
            continue
        where = unplugged[vm.space.slice_of(index)]
        if not where.any():
            continue
        fd = open_ram_file(vm.pid, region, os.O_RDWR)
        try:
            held = where & allocated(fd, region.ram_offset_bytes, region.pages)
            first, length = page_runs(np.flatnonzero(held), np.zeros(1, dtype=np.int64))
            punch_holes(fd, region.ram_offset_bytes + first * PAGE_BYTES, length * PAGE_BYTES)
        finally:
            os.close(fd)


def _unplugged(vm: AttachedVm) -> npt.NDArray[np.bool_]:
    """The pages of unplugged blocks, by the last answers and the state last read."""
    proved = vm.unplugged_blocks()
    if proved.any():
        proved &= ~_with_data(vm)
    return vm.unplugged_devices() | proved


def _with_data(vm: AttachedVm) -> npt.NDArray[np.bool_]:
    """The pages of blocks of which the RAM file has something, be it swapped out.

    A state that was read without the file does not tell of such pages. Raises OSError.
    """
    found = np.zeros(vm.space.pages, dtype=np.bool_)
    blocks = {each.where.start: each for each in vm.blocks}
    for index, region in enumerate(vm.regions):
        device = blocks.get(vm.space.slice_of(index).start)
        if device is None or not region.share:
            continue
        fd = open_ram_file(vm.pid, region, os.O_RDONLY)
        try:
            held = allocated(fd, region.ram_offset_bytes, region.pages)
        finally:
            os.close(fd)
        found[device.where] = np.repeat(device.any_of(held), device.block_pages)
    return found
