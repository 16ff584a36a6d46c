"""Merged pages whose virtio-mem device has nothing plugged any more: mapped back, emptied.

QEMU discards the memory of a block when it is unplugged. A page that is mapped from a store
has none there: it shows the store's page again, and the store keeps that page. Owns mapping
such pages back onto untouched memory of the VM's own, so that the store page can go.

Only a device without a plugged block is emptied, as it is after a reset: QEMU tells how much
is plugged, and not which blocks. Promises that a block which is plugged meanwhile keeps what
the guest writes there. What a plugged block holds before is undefined (Virtio 1.3, 5.15.6).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmdedup.core.rmap import OWN
from vmdedup.remap.context import Host
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.vm.attached_vm import AttachedVm


def map_back_unplugged(host: Host, vm: AttachedVm) -> int:
    """Map back what is merged in wholly unplugged devices; returns the pages. Raises VmError."""
    state = vm.scan.state
    if state is None or not vm.has_unplugged:
        return 0
    which = vm.unplugged_mask() & (state.slot != OWN)
    if not which.any():
        return 0

    def still_unplugged() -> npt.NDArray[np.bool_]:
        vm.ask_taken()
        return vm.unplugged_mask()

    # SAFETY: killed at any point, each page shows its store page or untouched memory. Both are
    # right for a block that is not plugged, and for one that the guest has not written yet.
    return unmerge_vm(host, vm, which, given_up=still_unplugged).restored_pages
