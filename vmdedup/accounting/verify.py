"""Checking merges in place: contents against checksums, and no leftovers.

Owns `vmdedup verify`. Reads every merged page through QEMU's own mapping, so it
sees what the guest sees. Compares the page with the digest that was recorded when
it was published. Changes nothing. Reading enters a store page into QEMU's page table
if it is not there yet, which takes no new memory. Reading would swap in pages that are
swapped out, so these are only counted unless requested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from vmdedup.core.digest import zero_digest
from vmdedup.errors import MonitorError, VmdedupError, VmGoneError
from vmdedup.guardian.runtime_dir import read_notes
from vmdedup.guest.mapping_state import (
    MappingState,
    StoreId,
    published_digests,
    swapped_slots,
    unfreed_pages,
)
from vmdedup.inject.scratch import is_open_here
from vmdedup.inject.scratch_files import scratch_fds, scratch_mappings
from vmdedup.linux.descriptors import USERFAULTFD, descriptor_links
from vmdedup.linux.maps import is_store_path, may_name_store
from vmdedup.linux.unsynced_stat import file_behind
from vmdedup.models import Verification, VerifiedVm
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm

_ENDING_S = 1.0
"""Longest time from a killed process's release of its memory to its end, in seconds."""


def verify(
    attached: Sequence[AttachedVm],
    settings: Settings,
    lost: Callable[[AttachedVm, VmGoneError], None],
    *,
    read_swapped: bool = False,
) -> Verification:
    """Check every VM; `lost` is called for each that ends meanwhile. Raises VmError.

    `read_swapped`: also check pages that are swapped out, which reading swaps in.
    """
    vms, gone = [], []
    for each in attached:
        try:
            vms.append(_verify_vm(each, settings, read_swapped))
        except (VmdedupError, OSError) as error:
            if each.process.alive(for_s=_ENDING_S):
                raise
            ended = VmGoneError(each.name, "it ended before it was checked", pid=each.pid)
            ended.__cause__ = error
            gone.append(str(ended))
            lost(each, ended)
    ok = all(vm.wrong_pages == 0 and not vm.leftovers for vm in vms)
    return Verification(ok=ok, vms=vms, gone=gone)


def _verify_vm(vm: AttachedVm, settings: Settings, read_swapped: bool) -> VerifiedVm:
    state = vm.scan.refresh()
    checked = wrong = unchecked = swapped = 0
    for number, store in enumerate(state.stores):
        page = np.flatnonzero(state.merged & (state.store == number))
        if not read_swapped:
            is_here = ~_swapped(store, state.slot[page])
            swapped += len(page) - int(np.count_nonzero(is_here))
            page = page[is_here]
        published = published_digests(store)
        if published is None:
            unchecked += len(page)
            continue
        seed, digest = published
        expected = digest[state.slot[page]]
        different = vm.scan.digests(page, seed) != expected
        checked += len(page)
        wrong += _still_wrong(vm, page[different], state)
    zero = np.flatnonzero(state.zero)
    checked += len(zero)
    wrong += _wrong_zero(vm, zero, state)
    return VerifiedVm(
        name=vm.name,
        pid=vm.pid,
        checked_pages=checked,
        wrong_pages=wrong,
        unchecked_pages=unchecked,
        swapped_pages=swapped,
        leftovers=_leftovers(vm, state, settings),
    )


def _swapped(store: StoreId, slot: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of these slots' pages are swapped out."""
    distinct, which = np.unique(slot.astype(np.int64), return_inverse=True)
    return swapped_slots(store, distinct)[which]


def _still_wrong(vm: AttachedVm, page: npt.NDArray[np.int64], before: MappingState) -> int:
    """Number of differing pages that the guest has not written meanwhile."""
    if not len(page):
        return 0
    now = vm.scan.refresh()
    same = (now.slot[page] == before.slot[page]) & ~now.broken_at(page)
    return int(np.count_nonzero(same))


def _wrong_zero(vm: AttachedVm, page: npt.NDArray[np.int64], state: MappingState) -> int:
    zero = np.uint64(zero_digest(0))
    return _still_wrong(vm, page[vm.scan.digests(page, 0) != zero], state)


def _leftovers(vm: AttachedVm, state: MappingState, settings: Settings) -> list[str]:
    """Our resources inside the VM, or notes about it, that should exist only in a session.

    A foreground merge keeps a session open from pass to pass.
    """
    found = [
        f"scratch mapping at {vma.start:#x}"
        for scratch, vma in scratch_mappings(vm.pid, vm=vm.name)
        if not is_open_here(scratch)
    ]
    found += [f"scratch descriptor {fd}" for _, fd in scratch_fds(vm.pid, vm=vm.name)]
    # QEMU closes lent descriptors only while the guest runs (monitor_fdset_cleanup).
    closes_lent = False
    with suppress(MonitorError):
        closes_lent = vm.monitor.status() == "running"
    stores = {(store.device, store.inode) for store in state.stores}
    for fd, target in descriptor_links(vm.pid).items():
        is_store = is_store_path(target) or (
            may_name_store(target) and file_behind(vm.pid, fd) in stores
        )
        if (closes_lent and is_store) or target == USERFAULTFD:
            found.append(f"descriptor {fd} on {target}")
    unfreed = unfreed_pages(vm.pid, vm.regions, vm.space, state, only_memory=True)
    if unfreed.any():
        found.append(f"{int(np.count_nonzero(unfreed))} merged pages not freed in the RAM file")
    found += [
        "a note that it was stopped"
        for _, note in read_notes(settings.runtime_dir)
        if note.pid == vm.pid
    ]
    return found
