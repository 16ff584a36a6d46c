"""Publishing: the new contents of a nomination into the store, in the order of their slots.

Owns the copying, and the view of the store with which pages are compared. Each content
is copied only when a VM that is to show it is being merged: by then, merging the VMs before
it has freed the memory that the copy takes.

VMs that are merged on several threads at once publish one at a time. Each goes on as soon as
the contents that it shows itself exist, whoever has copied them.

Promises: a page that changed meanwhile, or is torn, is published as it was copied, under the
digest of the copy. So only equal pages find it; pages that were nominated for its old content
must be merged with something else (`is_as_nominated`). The copy of a page that was protected
while it was copied needs no comparison: `is_source` names the pages that were copied for their
own VM just now, after the pages that it merges next were witnessed.
If the store has no room, nothing more is published, and `shortage` says why; existing store
pages can still be shared. Room that RAM files on the same filesystem may still need does not
count as free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.closing import Closing
from vmdedup.core.digest import apart_by_node, zero_digest
from vmdedup.core.nominate import NewPages
from vmdedup.core.plan import Runs, runs
from vmdedup.core.rmap import ZERO
from vmdedup.errors import StoreError, StuckError, VmGoneError
from vmdedup.guest.page_reader import copies_at
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import page_buffer
from vmdedup.linux.cgroup import headroom
from vmdedup.linux.numa import NO_NODE, allocating_on, nodes_of
from vmdedup.remap.domain_store import DomainStore
from vmdedup.store.stable_store import PublishedPages
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.vm.ram_files import RamFiles

Digests = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

_PUBLISH_PAGES = MIB // PAGE_BYTES
"""Pages copied at once: 1 MiB stays in the L2 cache."""
_ROOM_PAGES = 16 * MIB // PAGE_BYTES
"""Fewest pages for which room is checked at once, since a check takes a millisecond."""
_GROUP_RESERVE_BYTES = 16 * MIB
"""Memory of our cgroup that publishing leaves to ourselves."""


class Source(Protocol):
    """A VM whose pages are copied: an `AttachedVm`."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def space(self) -> PageSpace: ...


class Publisher(Closing):
    """Publishes the `new` contents of one trust domain; a context manager.

    `vms` are the VMs of the nomination; `tell` is called with digests that were published
    but nominated for nobody; `beside` are the RAM files on the store's filesystem.
    """

    def __init__(
        self,
        store: DomainStore,
        vms: Sequence[Source],
        new: NewPages,
        tell: Callable[[Digests], None],
        beside: RamFiles | None = None,
    ) -> None:
        self.shortage: str | None = None
        """Why nothing more is published, `None` while publishing is possible."""
        self._store = store
        self._tenants = vms
        self._new = new
        self._tell = tell
        self._beside = beside
        self._done = 0
        self._turn = threading.Condition()
        self._publishing = False
        self._room_pages = 0
        self._copied = np.zeros(len(new), dtype=np.bool_)
        self._changed = np.zeros(len(new), dtype=np.bool_)
        self._buffer = page_buffer(min(len(new), _PUBLISH_PAGES))
        self._mapped: PublishedPages | None = None

    def close(self) -> None:
        """Unmap the store."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def for_vm(self, number: int) -> PublishedContents:
        """The contents for the VM in that row of the nomination."""
        return PublishedContents(self, number)

    def existing(self, wanted: Runs, first_page: Int64s) -> Runs:
        """The part of the runs whose store pages exist."""
        if _end_of(wanted) <= self._store.next_slot:
            return wanted
        page, slot = wanted.page_slots()
        exists = slot < self._store.next_slot
        return runs(page[exists], slot[exists], first_page)

    def publish_for(self, number: int, wanted: Runs) -> None:
        """Publish the contents for these runs of the VM in that row, unless there is a shortage."""
        upto = min(len(self._new), _end_of(wanted) - self._new.first_slot)
        with self._turn:
            self._turn.wait_for(lambda: self._is_over(upto) or not self._publishing)
            if self._is_over(upto):
                return
            self._publishing = True
        try:
            pages, shortage = self._room(upto - self._done)
            if pages:
                self._publish_until(self._done + pages, number)
            self.shortage = shortage
        except StoreError as error:
            self.shortage = str(error)
        finally:
            with self._turn:
                self._publishing = False
                self._turn.notify_all()

    def _is_over(self, upto: int) -> bool:
        return upto <= self._done or self.shortage is not None

    def _room(self, pages: int) -> tuple[int, str | None]:
        """How many of `pages` there is room for, and why not for all.

        Raises StoreError if our cgroup does not leave that much for the store.
        """
        if self._room_pages >= pages:
            self._room_pages -= pages
            return pages, None
        self._room_pages = min(max(pages, _ROOM_PAGES), len(self._new) - self._done)
        found = headroom(os.getpid())
        size_bytes = self._room_pages * PAGE_BYTES
        if found is not None and found.left_bytes < size_bytes + _GROUP_RESERVE_BYTES:
            raise StoreError(
                f"cgroup {found.group} leaves us {found.left_bytes // MIB} MiB, too little"
                " for the store: raise its limit"
            )
        shortage = self._leave_to_others(pages)
        pages = min(pages, self._room_pages)
        self._room_pages -= pages
        return pages, shortage

    def _leave_to_others(self, pages: int) -> str | None:
        """Limit the room to what RAM files beside the store do not need.

        Returns why that is too little for `pages`, `None` if it is enough.
        """
        file = self._store.file
        if self._beside is None or file is None:
            return None
        try:
            room = self._beside.room()
        except OSError as error:
            raise StoreError(f"store {file.path}: {error.strerror}") from error
        if room.reserve_bytes:
            # Without RAM files the filesystem itself says when it is full.
            self._room_pages = min(self._room_pages, room.left_bytes // PAGE_BYTES)
        if self._room_pages >= pages:
            return None
        return (
            f"store {file.path}: {room.free_bytes // MIB} MiB are free there, and RAM files beside"
            f" it may still need {room.promised_bytes // MIB} MiB; enlarge that filesystem, or set"
            " store_dir to a tmpfs of its own"
        )

    def _publish_until(self, upto: int, number: int) -> None:
        vm = self._new.vm[self._done : upto]
        edges = self._done + 1 + np.flatnonzero(np.diff(vm))
        first_slot = self._store.next_slot
        keys: list[Digests] = []
        try:
            for first, last in pairwise([self._done, *edges.tolist(), upto]):
                for begin in range(first, last, _PUBLISH_PAGES):
                    rows = slice(begin, min(last, begin + _PUBLISH_PAGES))
                    keys += self._publish(rows, number)
                    with self._turn:
                        self._done = rows.stop
                        self._turn.notify_all()
        finally:
            if keys:
                key = np.concatenate(keys)
                self._store.tree.insert(key, first_slot + np.arange(len(key), dtype=np.int32))

    def _publish(self, rows: slice, number: int) -> Iterator[Digests]:
        """Publish some contents of one VM; yields the digests under which they are known.

        `number`: the row of the VM that is being merged now.
        """
        store = self._store
        assert store.file is not None
        vm, page = self._tenants[self._new.vm[rows.start]], self._new.page[rows]
        content = self._buffer[: len(page)]
        try:
            digest, is_copied = _copy(vm, page, store.seed, content)
        except StuckError:
            # The stuck read may still write into the old buffer at any time.
            self._buffer = np.empty_like(self._buffer)
            content = self._buffer[: len(page)]
            digest, is_copied = _nothing(len(page), store.seed, content)
        # SAFETY: only this VM's pages count as copied; those of another VM may be written
        # between this copy and their own session.
        self._copied[rows] = is_copied & (self._new.vm[rows.start] == number)
        if store.by_node:
            node = _nodes(vm, page)
            key = apart_by_node(digest, node, store.seed)
            self._note_changed(key, rows)
            yield from _publish_by_node(store, content, digest, node, key)
        else:
            self._note_changed(digest, rows)
            store.file.publish(content, digest)
            faults.reached("published")
            yield digest

    def _note_changed(self, digest: Digests, rows: slice) -> None:
        changed = digest != self._new.digest[rows]
        self._changed[rows] = changed
        if changed.any():
            self._tell(digest[changed])

    @property
    def done(self) -> int:
        """How many contents are published."""
        return self._done

    def is_source(
        self, vm: int, page: Int64s, slot: npt.NDArray[np.int32], since: int
    ) -> npt.NDArray[np.bool_]:
        """Which of these pages of a VM were themselves copied into these slots for it.

        Counts only copies made after the first `since` contents were published.
        """
        row = slot.astype(np.int64) - self._new.first_slot
        found = (row >= since) & (row < self._done)
        row = row[found]
        new = self._new
        found[found] = self._copied[row] & (new.vm[row] == vm) & (new.page[row] == page[found])
        return found

    def is_as_nominated(self, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of these existing slots hold the contents that were nominated for them."""
        row = slot.astype(np.int64) - self._new.first_slot
        is_new = row >= 0
        found = ~is_new
        found[is_new] = ~self._changed[row[is_new]]
        return found

    @property
    def slots(self) -> int:
        """The slot after the last one that may have a page once all is published."""
        return self._new.first_slot + len(self._new)

    def address(self, slot: npt.NDArray[np.int32]) -> Int64s:
        """The addresses in our own memory of these existing slots' pages."""
        return self._pages().address(slot)

    def _pages(self) -> PublishedPages:
        if self._mapped is None:
            with self._turn:
                if self._mapped is None:
                    assert self._store.file is not None
                    self._mapped = self._store.file.mapped(self.slots)
        return self._mapped


@dataclass
class PublishedContents:
    """The contents of a nomination for one of its VMs."""

    publisher: Publisher
    vm: int
    _since: int = 0
    """How many contents were published before the last `publish_for`."""

    def publish_for(self, wanted: Runs, first_page: Int64s) -> Runs:
        """Publish the contents of these runs; returns the part of the runs that exists then."""
        self._since = self.publisher.done
        self.publisher.publish_for(self.vm, wanted)
        return self.publisher.existing(wanted, first_page)

    def is_source(self, page: Int64s, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of these pages the last `publish_for` has copied into these slots."""
        return self.publisher.is_source(self.vm, page, slot, self._since)

    def is_as_nominated(self, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of these existing slots hold the contents that were nominated for them."""
        return self.publisher.is_as_nominated(slot)

    def address(self, slot: npt.NDArray[np.int32]) -> Int64s:
        """The addresses in our own memory of these existing slots' pages."""
        return self.publisher.address(slot)

    @property
    def slots(self) -> int:
        """The slot after the last one that may have a page once all is published."""
        return self.publisher.slots


def _end_of(wanted: Runs) -> int:
    """The slot after the last one that the runs show."""
    return int((wanted.slot + wanted.length).max(initial=0, where=wanted.slot != ZERO))


def _publish_by_node(
    store: DomainStore,
    content: npt.NDArray[np.uint8],
    digest: Digests,
    node: npt.NDArray[np.int32],
    key: Digests,
) -> Iterator[Digests]:
    """Publish in the same order, each stretch of one NUMA node on that node.

    `key`: the digests under which the tree will list them.
    """
    assert store.file is not None
    edges = np.flatnonzero(np.diff(node)) + 1
    for part in np.split(np.arange(len(node)), edges):
        with allocating_on(int(node[part[0]])):
            store.file.publish(content[part], digest[part])
        faults.reached("published")
        yield key[part]


def _nodes(vm: Source, page: Int64s) -> npt.NDArray[np.int32]:
    """The NUMA node of each page now, `NO_NODE` if its VM has ended."""
    try:
        return nodes_of(vm.pid, vm.space.hva(page))
    except OSError:
        return np.full(len(page), NO_NODE, dtype=np.int32)


def _copy(
    vm: Source, page: Int64s, seed: int, content: npt.NDArray[np.uint8]
) -> tuple[Digests, npt.NDArray[np.bool_]]:
    """Read the pages' content now; returns digests and which pages were read, others as zeroes."""
    try:
        digest, is_copied = copies_at(vm.name, vm.pid, vm.space.hva(page), seed, content)
    except VmGoneError:
        return _nothing(len(page), seed, content)
    if not is_copied.all():
        content[~is_copied] = 0
        digest[~is_copied] = zero_digest(seed)
    return digest, is_copied


def _nothing(
    pages: int, seed: int, content: npt.NDArray[np.uint8]
) -> tuple[Digests, npt.NDArray[np.bool_]]:
    """As `_copy`, if no page could be read."""
    content[:] = 0
    digest = np.full(pages, zero_digest(seed), dtype=np.uint64)
    return digest, np.zeros(pages, dtype=np.bool_)
