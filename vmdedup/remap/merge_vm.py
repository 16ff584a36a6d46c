"""The stages of a pass that change something in a VM: merge, release.

Owns the resources that each stage opens and closes. Promises that a failure
leaves the VM's memory whole: a page is either as it was, or equal and freed, or
equal and freed by the next engine (`finish_release`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.core.plan import Runs, joined
from vmdedup.core.rmap import OWN
from vmdedup.core.scan import forget
from vmdedup.errors import DisturbedError, MergeError, VmError
from vmdedup.guest.huge_pages import count_split, huge_among
from vmdedup.guest.large_folios import MOST_FOLIO_PAGES, NOTHING_KEPT, kept_memory, suspects
from vmdedup.guest.mapping_state import MappingState, cached_pages, unfreed_pages
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.mapping_room import shortage
from vmdedup.linux.pagemap import HUGE
from vmdedup.remap.advice import STORE_FLAGS, Reapply
from vmdedup.remap.borrowed_thread import reads_in_place
from vmdedup.remap.compare import Comparer, FromCopies, InPlace
from vmdedup.remap.context import Host, told_as_merge_error
from vmdedup.remap.domain_store import DomainStore
from vmdedup.remap.gate import Session
from vmdedup.remap.merge import Contents, MappedFds, MergeOutcome, VmMerger
from vmdedup.remap.release import punch_merged, split_large_folios
from vmdedup.remap.session import Approach, approach, lend_ram_files, open_session
from vmdedup.remap.small_pages import SmallPages
from vmdedup.store.zero_device import open_zero_device
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_RETRY_S = 10.0
"""Pause between two attempts to free memory that the kernel keeps for merged pages."""
LEAST_IN_PLACE_PAGES = 1024
"""Fewer pages are compared by copies: mapping the store inside QEMU takes a millisecond."""


def _require_room_for_mappings(vm: AttachedVm, wanted: Runs | None = None) -> None:
    """Raise MergeError if new mappings alone could get the VM killed.

    `wanted`: the runs to be mapped, `None` for scratch memory only.
    """
    committed_bytes = 0
    if wanted is not None:
        region = vm.space.region_of(wanted.start_page)
        is_shared = np.array([each.share for each in vm.regions], dtype=np.bool_)[region]
        committed_bytes = int(wanted.length[is_shared].sum()) * PAGE_BYTES
    reason = shortage(vm.pid, committed_bytes=committed_bytes)
    if reason is not None:
        raise MergeError(vm.name, "merge", reason, pid=vm.pid)


@dataclass(frozen=True)
class Planned:
    """The runs to be merged in a VM, and the contents that they are to show."""

    wanted: Runs
    contents: Contents
    in_any_order: bool
    """Whether every order of merging the runs keeps the VMA budget."""


@dataclass
class ReadyVm:
    """A VM in which everything for a merge is prepared, but no page is armed."""

    host: Host
    vm: AttachedVm
    approached: Approach
    fds: MappedFds
    outcome: MergeOutcome | None = None
    """The result of the merge; `None` if nothing was planned."""


@contextmanager
def ready_vm(
    host: Host, vm: AttachedVm, store: DomainStore, *, foreground: bool = False
) -> Iterator[ReadyVm]:
    """Prepare one VM for `merge_vm`, which may be called once in the block, or not at all.

    However the block ends, the memory that the merged pages used before is then freed.
    `foreground`: another look follows soon. Raises VmError.
    """
    assert store.file is not None
    if vm.disturbed():
        reason = "it has changed; it is examined again first"
        raise DisturbedError(vm.name, "merge", reason, pid=vm.pid)
    _require_room_for_mappings(vm)
    ready = None
    try:
        with told_as_merge_error(vm, "merge"), ExitStack() as exits:
            store_fd = store.file.open_read_only()
            exits.callback(os.close, store_fd)
            zero_fd = open_zero_device(store.domain)
            exits.callback(os.close, zero_fd)
            approached = exits.enter_context(approach(host, vm, foreground=foreground))
            fds = _fds(vm, approached, store_fd, zero_fd)
            ready = ReadyVm(host, vm, approached, fds)
            yield ready
    except VmError:
        # Pages merged before the error stay merged, so their old memory is freed too.
        if ready is not None and ready.outcome is not None:
            with suppress(VmError, OSError):
                _release(vm, ready.outcome)
        raise
    if ready.outcome is not None:
        _release(vm, ready.outcome)


def merge_vm(ready: ReadyVm, plan: Planned) -> None:
    """Open a session on the VM and merge what is planned. Raises VmError.

    The result is in the `outcome` of `ready`, even if this raises.
    """
    host, vm, approached = ready.host, ready.vm, ready.approached
    outcome = ready.outcome = MergeOutcome()
    _require_room_for_mappings(vm, plan.wanted)
    start = vm.space.hva(plan.wanted.start_page)
    ranges = np.stack([start, start + plan.wanted.length * PAGE_BYTES], axis=1)
    with open_session(host, vm, approached, ranges) as session:
        merger = VmMerger(
            vm.name,
            vm.pid,
            space=vm.space,
            contents=plan.contents,
            comparer=_comparer(host, vm, approached.remote, session, plan, ready.fds.store),
            fds=ready.fds,
            reapply=[
                Reapply.of(region, flags & STORE_FLAGS)
                for region, flags in zip(vm.regions, vm.region_flags, strict=True)
            ],
            small_pages=SmallPages.of_this_kernel(use_map_stack=host.settings.has("map-stack")),
            row_address=approached.remote.row_address,
            stop=host.stop,
            totals=vm.totals,
        )
        merger.merge(session, plan.wanted, outcome, in_any_order=plan.in_any_order)


def _fds(vm: AttachedVm, approached: Approach, store_fd: int, zero_fd: int) -> MappedFds:
    """Lend the files that will be mapped, and the RAM files to undo failed remaps from."""
    lend = approached.lend
    with vm.monitor.turn():
        ram = lend_ram_files(vm, lend, only_shared=True)
        lent = [number for index, number in ram.items() if vm.regions[index].ram_fd is None]
        store, zero, *own = approached.give([lend(store_fd, "store"), lend(zero_fd, "zero"), *lent])
    ram |= dict(zip([index for index in ram if ram[index] in lent], own, strict=True))
    return MappedFds(
        store,
        zero,
        {index: (fd, vm.regions[index].ram_offset_bytes) for index, fd in ram.items()},
    )


def _comparer(
    host: Host,
    vm: AttachedVm,
    remote: RemoteThread,
    session: Session,
    plan: Planned,
    store_fd: int,
) -> Comparer:
    """The comparer: in place if possible and worthwhile, else from copies.

    `store_fd`: the store's descriptor number inside QEMU.
    """
    contents, run = plan.contents, session.reading
    is_worth_it = plan.wanted.pages >= LEAST_IN_PLACE_PAGES
    if run is not None and is_worth_it and remote.uses_stub and reads_in_place(host, vm):
        with suppress(OSError):  # no mapping is left for the store: by copies then
            return InPlace(remote, run, vm.space, store_fd, contents.slots)
    return FromCopies(vm.name, vm.pid, vm.space, contents.address)


def _release(vm: AttachedVm, outcome: MergeOutcome) -> None:
    """Free the memory that the merged pages used before, and note them in the rmap."""
    state = vm.scan.state
    assert state is not None
    pages, slots = joined(*outcome.merged).page_slots()
    is_huge = state.categories[pages] & HUGE != 0
    were_huge = huge_among(vm.pagemap, vm.scan.blocks, state, pages[is_huge])
    vm.scan.columns.merge(pages, slots)
    state.note_remapped(pages)
    vm.totals.huge_pages_split += count_split(vm.scan.blocks, state, were_huge)
    for rejected in outcome.rejected:
        # What was known of them was wrong (DMA is not tracked): look again.
        forget(vm.scan.columns, rejected)
    faults.reached("merged")
    punch_merged(vm.process, vm.regions, vm.space, pages)
    faults.reached("punched")
    split_folios(vm, pages, is_huge)
    faults.reached("released")


def split_folios(
    vm: AttachedVm, page: npt.NDArray[np.int64], is_huge: npt.NDArray[np.bool_]
) -> None:
    """Make the kernel split the folios at these merged pages, and those that it could not before.

    `is_huge`: which of the pages were part of a huge page.
    """
    page, most_pages = suspects(page, is_huge)
    if len(vm.record.kept.page):
        page, most_pages = np.union1d(page, vm.record.kept.page), MOST_FOLIO_PAGES
    vm.record.kept = split_large_folios(
        vm.process, vm.pagemap, vm.space, vm.scan.columns.slot, page, most_pages
    )
    vm.record.kept_since = time.monotonic()


def retry_to_split(vm: AttachedVm) -> None:
    """Try again, now and then, to split folios that could not be split, for example pinned ones."""
    if len(vm.record.kept.page) and time.monotonic() - vm.record.kept_since > _RETRY_S:
        nothing = np.empty(0, dtype=np.int64)
        split_folios(vm, nothing, nothing.astype(np.bool_))


def note_kept(vm: AttachedVm) -> None:
    """Find the memory that large folios keep, without changing anything."""
    merged = np.flatnonzero(vm.scan.columns.slot != OWN)
    page, most_pages = suspects(merged, np.ones(len(merged), dtype=np.bool_))
    found = kept_memory(vm.pagemap, vm.space, vm.scan.columns.slot, page, most_pages)
    vm.record.kept = found or NOTHING_KEPT


def free_cache(vm: AttachedVm) -> None:
    """Free merged pages that a disk filesystem kept in its cache: it may have written them now.

    Tried only now and then: each hole is a transaction of the filesystem's journal.
    """
    assert vm.scan.state is not None
    if time.monotonic() - vm.record.cache_freed_at < _RETRY_S:
        return
    vm.record.cache_freed_at = time.monotonic()
    with suppress(VmError, OSError):  # it is tried again; a VM that has ended is met next
        cached = cached_pages(vm.pid, vm.regions, vm.space, vm.scan.state)
        punch_merged(vm.process, vm.regions, vm.space, np.flatnonzero(cached))


def finish_release(vm: AttachedVm, state: MappingState) -> None:
    """Free what a predecessor merged but, killed after its remaps, had not freed."""
    merged = np.flatnonzero(state.slot != OWN)
    if not len(merged):
        return
    unfreed = unfreed_pages(vm.pid, vm.regions, vm.space, state)
    punch_merged(vm.process, vm.regions, vm.space, np.flatnonzero(unfreed))
    split_folios(vm, merged, np.ones(len(merged), dtype=np.bool_))
