"""The stages of a pass that change something: publish, merge, release.

Owns what each needs to be opened and closed around it. Promises that a failure
leaves the VM's memory whole: a page is either as it was, or equal and freed, or
equal and freed by the next engine (`finish_release`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.account import MappingState, unfreed_pages
from vmdedup.core.digest import apart_by_node, digest_pages
from vmdedup.core.nominate import NewPages
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import OWN
from vmdedup.core.scan import forget
from vmdedup.errors import MergeError, StoreError, VmGoneError
from vmdedup.memory.nodes import NO_NODE, allocating_on, nodes_of
from vmdedup.memory.reader import PageVanishedError, page_buffer, read_runs
from vmdedup.memory.space import page_runs
from vmdedup.memory.store import open_zero_device
from vmdedup.merge import MappedFds, MergeOutcome, VmMerger
from vmdedup.procfs.cgroup import headroom
from vmdedup.reapply import STORE_FLAGS, Reapply
from vmdedup.release import punch_merged, split_huge_pages
from vmdedup.sessions import Host, open_session, told_as_merge_error
from vmdedup.stores import DomainStore
from vmdedup.tenant import Tenant
from vmdedup.units import MIB, PAGE_BYTES

Digests = npt.NDArray[np.uint64]

_PUBLISH_PAGES = 1024
_GROUP_RESERVE_BYTES = 16 * MIB
"""What publishing leaves of our cgroup's memory to ourselves."""
_MAPPINGS_BYTES = MIB
"""More than the mappings and page tables of one gate take."""


def publish(
    store: DomainStore, tenants: list[Tenant], new: NewPages, tell: Callable[[Digests], None]
) -> None:
    """Copy the new contents into the store, without any protection.

    A page that changed meanwhile, or is torn, is published as what was copied: under
    that digest, so it is found only by pages that are the same, and `tell` is told of it.
    The gate compares bytes.
    """
    assert store.file is not None
    buffer = page_buffer(_PUBLISH_PAGES)
    for first in range(0, len(new), _PUBLISH_PAGES):
        rows = slice(first, first + _PUBLISH_PAGES)
        content = buffer[: len(new.page[rows])]
        _require_room(content.nbytes)
        for vm in np.unique(new.vm[rows]).tolist():
            mine = np.flatnonzero(new.vm[rows] == vm)
            content[mine] = _copy(tenants[vm], new.page[rows][mine])
        digest = digest_pages(content.reshape(-1).data, store.seed)
        node = _nodes(tenants, new.vm[rows], new.page[rows]) if store.by_node else None
        key = digest if node is None else apart_by_node(digest, node, store.seed)
        tell(key[key != new.digest[rows]])
        if node is None:
            slot = store.file.publish(content, digest)
            faults.reached("published")
            store.tree.insert(key, slot + np.arange(len(key), dtype=np.int32))
        else:
            _publish_by_node(store, content, digest, node, key)


def _publish_by_node(
    store: DomainStore,
    content: npt.NDArray[np.uint8],
    digest: Digests,
    node: npt.NDArray[np.int32],
    key: Digests,
) -> None:
    """Publish in the same order, each stretch of one NUMA node on that node.

    `key`: the digests under which the tree is to have them.
    """
    assert store.file is not None
    edges = np.flatnonzero(np.diff(node)) + 1
    for part in np.split(np.arange(len(node)), edges):
        with allocating_on(int(node[part[0]])):
            slot = store.file.publish(content[part], digest[part])
        faults.reached("published")
        store.tree.insert(key[part], slot + np.arange(len(part), dtype=np.int32))


def _nodes(
    tenants: list[Tenant], vm: npt.NDArray[np.int32], page: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The NUMA node of each page now, `NO_NODE` where its VM has ended."""
    node = np.full(len(page), NO_NODE, dtype=np.int32)
    for index in np.unique(vm).tolist():
        mine = vm == index
        with suppress(OSError):
            node[mine] = nodes_of(tenants[index].pid, tenants[index].space.hva(page[mine]))
    return node


def _require_room(size_bytes: int) -> None:
    """Raise StoreError when our cgroup does not leave that much for the store."""
    found = headroom(os.getpid())
    if found is not None and found.left_bytes < size_bytes + _GROUP_RESERVE_BYTES:
        raise StoreError(
            f"cgroup {found.group} leaves us {found.left_bytes // MIB} MiB, too little for the"
            " store: raise its limit"
        )


def _require_room_for_mappings(tenant: Tenant) -> None:
    """Raise MergeError when new mappings alone could have the VM killed for lack of memory."""
    found = headroom(tenant.pid)
    if found is None or found.left_bytes + found.swap_bytes >= _MAPPINGS_BYTES:
        return
    reason = f"its cgroup {found.group} is full: raise its limit"
    raise MergeError(tenant.name, "merge", reason, pid=tenant.pid)


def merge_vm(host: Host, tenant: Tenant, store: DomainStore, wanted: Runs) -> MergeOutcome:
    """Open a session on one VM, merge the runs, free what they stood on. Raises VmError."""
    settings = host.settings
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
        fds = MappedFds(
            store=exits.enter_context(tenant.lent(store_fd, "store")),
            zero=exits.enter_context(tenant.lent(zero_fd, "zero")),
        )
        start = tenant.space.hva(wanted.start_page)
        end = start + wanted.length * PAGE_BYTES
        ranges = list(zip(start.tolist(), end.tolist(), strict=True))
        session, remote = exits.enter_context(open_session(host, tenant, ranges))
        merger = VmMerger(
            tenant.name,
            tenant.pid,
            space=tenant.space,
            store=store.file,
            fds=fds,
            reapply=[
                Reapply.of(region, flags & STORE_FLAGS)
                for region, flags in zip(tenant.regions, tenant.region_flags, strict=True)
            ],
            row_address=remote.row_address,
            gate_runs=settings.gate_runs,
            gate_pages=settings.gate_pages,
            stop=host.stop,
        )
        outcome = merger.merge(session, wanted)
    _release(tenant, outcome)
    return outcome


def _release(tenant: Tenant, outcome: MergeOutcome) -> None:
    """Free what the merged pages stood on before, and note them in the rmap."""
    assert tenant.state is not None
    for part in outcome.merged:
        pages, slots = part.page_slots()
        tenant.columns.merge(pages, slots)
    for rejected in outcome.rejected:
        # What was known of them was wrong (DMA is not tracked): look anew.
        forget(tenant.columns, rejected)
    pages = np.concatenate(
        [np.empty(0, dtype=np.int64), *(part.page_slots()[0] for part in outcome.merged)]
    )
    faults.reached("merged")
    punch_merged(tenant.process, tenant.regions, tenant.space, pages)
    faults.reached("punched")
    split_huge_pages(tenant.process, tenant.space, pages, tenant.state.categories)
    faults.reached("released")


def finish_release(tenant: Tenant, state: MappingState) -> None:
    """Do what a predecessor that was killed after its remaps had not done yet."""
    merged = np.flatnonzero(state.slot != OWN)
    if not len(merged):
        return
    unfreed = unfreed_pages(tenant.pid, tenant.regions, tenant.space, state)
    punch_merged(tenant.process, tenant.regions, tenant.space, np.flatnonzero(unfreed))
    split_huge_pages(tenant.process, tenant.space, merged, None)


def _copy(tenant: Tenant, page: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The pages' content now; zeroes from where one vanished on, which nothing will match."""
    content = np.zeros((len(page), PAGE_BYTES), dtype=np.uint8)
    start, length = page_runs(page, tenant.space.first_page)
    with suppress(PageVanishedError, VmGoneError):
        read_runs(tenant.name, tenant.pid, tenant.space.hva(start), length, content)
    return content
