"""Merged pages whose virtio-mem device has nothing plugged any more: mapped back, emptied.

QEMU discards the memory of a block when it is unplugged. A page that is mapped from a store
has none there: it shows the store's page again, and the store keeps that page. Owns mapping
such pages back onto untouched memory of the VM's own, so that the store page can go.

Only a device without a plugged block is emptied, as it is after a reset: QEMU tells how much
is plugged, and not which blocks. That a block's own pages are gone proves nothing: the kernel
may have reclaimed them from the page cache. Promises that a block which is plugged meanwhile
keeps what the guest writes there. What a plugged block holds before is undefined (Virtio 1.3,
5.15.6).
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import OWN
from vmdedup.core.sorting import page_runs
from vmdedup.guest.mapping_state import open_ram_file
from vmdedup.linux.sparse_file import allocated, punch_holes
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


def map_back_unplugged(host: Host, vm: AttachedVm) -> int:
    """Map back what is merged in wholly unplugged devices; returns the pages. Raises VmError."""
    state = vm.scan.state
    if state is None or vm.storage.is_put_off or not vm.has_unplugged:
        return 0
    unplugged = vm.unplugged_mask()
    with told_as_merge_error(vm, "unmerge"):
        _free_private_files(vm, unplugged)
    which = unplugged & (state.slot != OWN)
    if not which.any():
        return 0

    def still_unplugged() -> npt.NDArray[np.bool_]:
        vm.ask_taken()
        return vm.unplugged_mask()

    # SAFETY: killed at any point, each page shows its store page or untouched memory. Both are
    # right for a block that is not plugged, and for a page that the guest has not written yet.
    return unmerge_vm(host, vm, which, given_up=still_unplugged).restored_pages


def _free_private_files(vm: AttachedVm, unplugged: npt.NDArray[np.bool_]) -> None:
    """Free what the files behind private memory have there. Raises VmError, OSError.

    A look at a page that was discarded a moment before makes the file's page, and nothing else
    would free it. SAFETY: the guest's writes are never in that file, and the hole leaves them
    alone. The file is zeroes throughout: QEMU empties it when the device is made.
    """
    for index, region in enumerate(vm.regions):
        where = unplugged[vm.space.slice_of(index)]
        if region.share or region.ram_file is None or not where.any():
            continue
        fd = open_ram_file(vm.pid, region, os.O_RDWR)
        try:
            held = where & allocated(fd, region.ram_offset_bytes, region.pages)
            first, length = page_runs(np.flatnonzero(held), np.zeros(1, dtype=np.int64))
            punch_holes(fd, region.ram_offset_bytes + first * PAGE_BYTES, length * PAGE_BYTES)
        finally:
            os.close(fd)
