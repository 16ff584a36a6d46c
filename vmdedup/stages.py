"""The stages of a pass that change something in a VM: merge, release.

Owns what each needs to be opened and closed around it. Promises that a failure
leaves the VM's memory whole: a page is either as it was, or equal and freed, or
equal and freed by the next engine (`finish_release`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import numpy as np

from vmdedup import faults
from vmdedup.account import MappingState, unfreed_pages
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import OWN
from vmdedup.core.scan import forget
from vmdedup.errors import MergeError
from vmdedup.memory.store import open_zero_device
from vmdedup.merge import Contents, MappedFds, MergeOutcome, VmMerger
from vmdedup.procfs.cgroup import headroom
from vmdedup.procfs.pagemap import HUGE
from vmdedup.reapply import STORE_FLAGS, Reapply
from vmdedup.release import punch_merged, split_huge_pages
from vmdedup.sessions import Host, open_session, told_as_merge_error
from vmdedup.stores import DomainStore
from vmdedup.tenant import Tenant
from vmdedup.units import MIB, PAGE_BYTES

_MAPPINGS_BYTES = MIB
"""More than the mappings and page tables of one gate take."""


def _require_room_for_mappings(tenant: Tenant) -> None:
    """Raise MergeError when new mappings alone could have the VM killed for lack of memory."""
    found = headroom(tenant.pid)
    if found is None or found.left_bytes + found.swap_bytes >= _MAPPINGS_BYTES:
        return
    reason = f"its cgroup {found.group} is full: raise its limit"
    raise MergeError(tenant.name, "merge", reason, pid=tenant.pid)


def merge_vm(
    host: Host, tenant: Tenant, store: DomainStore, wanted: Runs, contents: Contents
) -> MergeOutcome:
    """Open a session on one VM, merge the runs, free what they stood on. Raises VmError."""
    assert store.file is not None
    if tenant.disturbed():
        reason = "its devices or its state have just changed; it is examined again first"
        raise MergeError(tenant.name, "merge", reason, pid=tenant.pid)
    _require_room_for_mappings(tenant)
    with ExitStack() as exits:
        exits.enter_context(told_as_merge_error(tenant, "merge"))
        store_fd = store.file.open_read_only()
        exits.callback(os.close, store_fd)
        zero_fd = open_zero_device(store.domain)
        exits.callback(os.close, zero_fd)
        start = tenant.space.hva(wanted.start_page)
        end = start + wanted.length * PAGE_BYTES
        ranges = list(zip(start.tolist(), end.tolist(), strict=True))
        session, remote, lend = exits.enter_context(open_session(host, tenant, ranges))
        merger = VmMerger(
            tenant.name,
            tenant.pid,
            space=tenant.space,
            contents=contents,
            fds=MappedFds(store=lend(store_fd, "store"), zero=lend(zero_fd, "zero")),
            reapply=[
                Reapply.of(region, flags & STORE_FLAGS)
                for region, flags in zip(tenant.regions, tenant.region_flags, strict=True)
            ],
            row_address=remote.row_address,
            stop=host.stop,
        )
        outcome = merger.merge(session, wanted)
    _release(tenant, outcome)
    return outcome


def _release(tenant: Tenant, outcome: MergeOutcome) -> None:
    """Free what the merged pages stood on before, and note them in the rmap."""
    state = tenant.state
    assert state is not None
    huge = [np.empty(0, dtype=np.int64)]
    for part in outcome.merged:
        pages, slots = part.page_slots()
        huge.append(pages[state.categories[pages] & HUGE != 0])
        tenant.columns.merge(pages, slots)
        state.note_remapped(pages)
    for rejected in outcome.rejected:
        # What was known of them was wrong (DMA is not tracked): look anew.
        forget(tenant.columns, rejected)
    pages = np.concatenate(
        [np.empty(0, dtype=np.int64), *(part.page_slots()[0] for part in outcome.merged)]
    )
    faults.reached("merged")
    punch_merged(tenant.process, tenant.regions, tenant.space, pages)
    faults.reached("punched")
    split_huge_pages(tenant.process, tenant.space, np.concatenate(huge))
    faults.reached("released")


def finish_release(tenant: Tenant, state: MappingState) -> None:
    """Do what a predecessor that was killed after its remaps had not done yet."""
    merged = np.flatnonzero(state.slot != OWN)
    if not len(merged):
        return
    unfreed = unfreed_pages(tenant.pid, tenant.regions, tenant.space, state)
    punch_merged(tenant.process, tenant.regions, tenant.space, np.flatnonzero(unfreed))
    split_huge_pages(tenant.process, tenant.space, merged)
