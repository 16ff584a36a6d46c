"""Moving whole blocks of 2 MiB onto new memory, each as one mapping again.

A block that was merged in parts lies in many mappings, and so do its pages after an unmerge,
or after the guest has written them: the kernel makes no huge page of it (`collapse`). So what
is still merged in it comes home, and its other pages move too.

Owns the session in which that is done. Promises what `unmerge` does: at each instant every
address shows the guest's bytes, and a kill leaves each page where it was or moved. Refuses to
pause a VM for it, to take memory that is not there, and to wait for a busy disk. Refuses VMs
whose guest has given memory back: a merged page may be part of that, and would take memory
again. Refuses hosts with several NUMA nodes: new memory would lie on the node on which we run.
The choice of the blocks is `collapse`'s: private anonymous memory, of which all is there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmdedup.core.gate_size import USUAL
from vmdedup.linux.mapping_room import shortage
from vmdedup.linux.numa import has_several_nodes
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.new_memory import Unmerges
from vmdedup.remap.session import approach, open_session
from vmdedup.remap.unmerge_vm import homes_of, unmerger_of, with_own
from vmdedup.units import HUGE_PAGE_BYTES, PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


def may_gather(vm: AttachedVm) -> bool:
    """Whether blocks of this VM can be moved now: as for a merge, but never in a pause.

    Raises VmError when the VM cannot be asked.
    """
    if not vm.live or vm.record.leaving or vm.storage.is_put_off or vm.storage.rests:
        return False
    if has_several_nodes() or vm.disturbed():
        return False
    vm.ask_balloon()
    return not vm.has_given_back


def gather(host: Host, vm: AttachedVm, block: npt.NDArray[np.int64]) -> None:
    """Move these blocks, each 2 MiB of private anonymous memory, as far as that works now.

    A block that the guest keeps writing stays as it is, or is moved in part. Raises VmError.
    """
    page = vm.scan.blocks.pages(block)[0]
    which = np.zeros(vm.space.pages, dtype=np.bool_)
    which[page] = True
    start = vm.space.hva(vm.scan.blocks.start_page[block])
    spans = np.stack([start, start + HUGE_PAGE_BYTES], axis=1)
    # A power of two: neither a piece nor a stretch of `unmerge` ends within a block then.
    longest_run = 1 << min(USUAL.pages, host.settings.gate_pages).bit_length() - 1
    with (
        told_as_merge_error(vm, "unmerge"),
        Unmerges() as among,
        among.memory.granted(vm.pid, len(page)) as granted_pages,
        approach(host, vm) as approached,
    ):
        # While old and new memory are mapped, the host has promised both.
        lacks_room = shortage(vm.pid, committed_bytes=len(page) * PAGE_BYTES) is not None
        if granted_pages < len(page) or lacks_room or not approached.live:
            return
        homes = with_own(vm, homes_of(vm), approached.lend, approached.give)
        # SAFETY: a page of the VM's own may move only where it could be merged as well: a
        # device that has pinned it would go on with the old one. So the VM is one that may be
        # merged (`may_gather`), and the session looks for new devices once more, after the
        # drain. Killed anywhere: as `unmerge` says; the kernel collapses nothing by itself.
        with open_session(host, vm, approached, spans) as session:
            state = vm.scan.known_state()
            published = among.stores.most_used(state)
            unmerger = unmerger_of(vm, homes, approached.remote, published, whole=which)
            unmerger.unmerge(session, state, len(page), longest_run)
