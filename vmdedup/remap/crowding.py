"""VMs that have more mappings than vm.max_map_count less QEMU's headroom allows.

The limit can be lowered while VMs are merged. QEMU then aborts when it next starts a thread,
which needs mappings of its own. Owns removing the excess: runs are unmerged, the shortest
first, since the longest save most per mapping. Promises to unmerge no more than it must.
Refuses if nothing can be mapped any more, by us or by QEMU: then only a higher limit helps.
"""

from __future__ import annotations

import numpy as np

from vmdedup.core.plan import runs
from vmdedup.core.rmap import OWN
from vmdedup.remap.context import Host
from vmdedup.remap.unmerge_vm import unmerge_vm
from vmdedup.vm.attached_vm import AttachedVm

_TRIES = 8
_SESSION_VMAS = 32
"""Mappings that an unmerge session itself takes, besides the runs that it maps back."""
_MOST_GAIN = 2.0
_LEAST_GAIN = 0.25
"""Bounds of the mappings that unmerging one run removes: two if it joins both its neighbours,
few or none if the neighbours cannot join."""
_SLACK_SHARE = 16
"""The limit may be exceeded by this fraction of the headroom, as QEMU's own mappings vary."""


def is_crowded(vm: AttachedVm, max_map_count: int, headroom: int) -> bool:
    """Whether the mappings of a VM, as last read, leave QEMU clearly less than its headroom."""
    if vm.scan.state is None:
        return False
    return vm.scan.state.process_vmas > max_map_count - headroom + headroom // _SLACK_SHARE


def keep_headroom(host: Host, vm: AttachedVm, max_map_count: int) -> str | None:
    """Unmerge runs of a VM until its mappings fit the limit less the headroom.

    Returns why it still has more mappings, `None` if they fit. Raises VmError.
    """
    most = max_map_count - host.settings.vma_headroom
    state = vm.scan.refresh()
    gain, why = _MOST_GAIN, "the rest is QEMU's own, or was split by merges that are undone"
    for _ in range(_TRIES):
        over, merged = state.process_vmas - most, np.flatnonzero(state.slot != OWN)
        if over <= 0:
            return None
        room = max_map_count - state.process_vmas - _SESSION_VMAS
        if room <= 0:
            why = "nothing can be mapped in it any more, not by QEMU either"
        if room <= 0 or not len(merged):
            break
        found = runs(merged, state.slot[merged], vm.space.first_page)
        count = min(room, max(1, int(over / gain)))
        shortest = found.take(np.argsort(found.length, kind="stable")[:count])
        which = np.zeros(vm.space.pages, dtype=np.bool_)
        which[shortest.page()] = True
        done = unmerge_vm(host, vm, which)
        before, state = state.process_vmas, vm.scan.refresh()
        if done.reason is not None and not done.restored_pages:
            why = done.reason
            break
        gain = min(_MOST_GAIN, max(_LEAST_GAIN, (before - state.process_vmas) / len(shortest)))
    over = state.process_vmas - most
    if over <= 0:  # uncovered: takes a last try that suffices just so
        return None
    return (
        f"it has {over} mappings more than vm.max_map_count less vma_headroom leaves it ({why});"
        f" sysctl vm.max_map_count={state.process_vmas + host.settings.vma_headroom}"
    )
