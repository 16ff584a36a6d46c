"""The stages of a pass that change something: publish, merge, release.

Owns what each needs to be opened and closed around it. Promises that a failure
leaves the VM's memory whole: a page is either as it was, or equal and freed, or
equal and freed by the next engine (`finish_release`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.account import MappingState, unfreed_pages
from vmdedup.core.digest import apart_by_node, digest_pages
from vmdedup.core.nominate import NewPages
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.core.scan import forget
from vmdedup.errors import MergeError, StoreError, VmGoneError
from vmdedup.memory.nodes import NO_NODE, allocating_on, nodes_of
from vmdedup.memory.reader import PageVanishedError, page_buffer, read_runs
from vmdedup.memory.space import page_runs
from vmdedup.memory.store import PublishedPages, StableStore, open_zero_device
from vmdedup.merge import MappedFds, MergeOutcome, VmMerger
from vmdedup.procfs.cgroup import headroom
from vmdedup.reapply import STORE_FLAGS, Reapply
from vmdedup.release import punch_merged, split_huge_pages
from vmdedup.sessions import Host, open_session, told_as_merge_error
from vmdedup.stores import DomainStore
from vmdedup.tenant import Tenant
from vmdedup.units import MIB, PAGE_BYTES

Digests = npt.NDArray[np.uint64]

_PUBLISH_PAGES = MIB // PAGE_BYTES
"""Copied at once: 1 MiB stays in the L2 cache."""
_GROUP_RESERVE_BYTES = 16 * MIB
"""What publishing leaves of our cgroup's memory to ourselves."""
_MAPPINGS_BYTES = MIB
"""More than the mappings and page tables of one gate take."""


class Publisher:
    """Copies the new contents of a nomination into the store, in the order of their slots.

    Each only when a VM that is to show it is about to be merged: so merging the VMs
    before it has freed the memory that it takes. Without any protection: a page that
    changed meanwhile, or is torn, is published as what was copied, under that digest, so it
    is found only by pages that are the same, and `tell` is told of it. The gate compares
    bytes.
    """

    def __init__(
        self,
        store: DomainStore,
        tenants: Sequence[Tenant],
        new: NewPages,
        tell: Callable[[Digests], None],
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._new = new
        self._tell = tell
        self._done = 0
        self._buffer = page_buffer(min(len(new), _PUBLISH_PAGES))

    def publish_for(self, wanted: Runs) -> None:
        """Publish what these runs show. Raises StoreError when there is no room for all."""
        end = int((wanted.slot + wanted.length).max(initial=0, where=wanted.slot != ZERO))
        upto = min(len(self._new), end - self._new.first_slot)
        if upto <= self._done:
            return
        _require_room((upto - self._done) * PAGE_BYTES)
        vm = self._new.vm[self._done : upto]
        edges = self._done + 1 + np.flatnonzero(np.diff(vm))
        first_slot = self._store.next_slot
        keys: list[Digests] = []
        try:
            for first, last in pairwise([self._done, *edges.tolist(), upto]):
                for begin in range(first, last, _PUBLISH_PAGES):
                    keys += self._publish(slice(begin, min(last, begin + _PUBLISH_PAGES)))
        finally:
            if keys:
                key = np.concatenate(keys)
                self._store.tree.insert(key, first_slot + np.arange(len(key), dtype=np.int32))

    def _publish(self, rows: slice) -> Iterator[Digests]:
        """Publish some contents of one VM; yields the digests under which they are known."""
        store = self._store
        assert store.file is not None
        tenant, page = self._tenants[self._new.vm[rows.start]], self._new.page[rows]
        content = self._buffer[: len(page)]
        _copy(tenant, page, content)
        digest = digest_pages(content.reshape(-1).data, store.seed)
        if store.by_node:
            node = _nodes(tenant, page)
            key = apart_by_node(digest, node, store.seed)
            self._tell(key[key != self._new.digest[rows]])
            yield from _publish_by_node(store, content, digest, node, key)
        else:
            self._tell(digest[digest != self._new.digest[rows]])
            store.file.publish(content, digest)
            faults.reached("published")
            yield digest
        self._done = rows.stop


def _publish_by_node(
    store: DomainStore,
    content: npt.NDArray[np.uint8],
    digest: Digests,
    node: npt.NDArray[np.int32],
    key: Digests,
) -> Iterator[Digests]:
    """Publish in the same order, each stretch of one NUMA node on that node.

    `key`: the digests under which the tree is to have them.
    """
    assert store.file is not None
    edges = np.flatnonzero(np.diff(node)) + 1
    for part in np.split(np.arange(len(node)), edges):
        with allocating_on(int(node[part[0]])):
            store.file.publish(content[part], digest[part])
        faults.reached("published")
        yield key[part]


def _nodes(tenant: Tenant, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The NUMA node of each page now, `NO_NODE` where its VM has ended."""
    try:
        return nodes_of(tenant.pid, tenant.space.hva(page))
    except OSError:
        return np.full(len(page), NO_NODE, dtype=np.int32)


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
            published=_mapped(store.file, wanted, exits),
            fds=fds,
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


def _mapped(store: StableStore, wanted: Runs, exits: ExitStack) -> PublishedPages | None:
    """The store's pages, to be compared with; None where only zero pages are wanted."""
    if (wanted.slot == ZERO).all():
        return None
    return exits.enter_context(store.mapped())


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


def _copy(tenant: Tenant, page: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> None:
    """The pages' content now; zeroes from where one vanished on, which nothing will match."""
    start, length = page_runs(page, tenant.space.first_page)
    try:
        read_runs(tenant.name, tenant.pid, tenant.space.hva(start), length, content)
    except PageVanishedError as vanished:
        content[vanished.pages_read :] = 0
    except VmGoneError:
        content[:] = 0
