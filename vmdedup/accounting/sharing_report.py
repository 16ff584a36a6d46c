"""The typed report, from the kernel's state of all VMs.

Owns the numbers of `SharingReport`. Promises that they come from the page
tables read for this call, and that the VMs' saved bytes sum to the host's. Memory
that still waits to be freed does not count as saved, nor do a balloon's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from vmdedup.accounting.cold_pages import ColdCount, cold_counts
from vmdedup.accounting.repeated_contents import Slots, repeated_contents
from vmdedup.core.counters import SharingCounts, sharing_counts
from vmdedup.core.rmap import KNOWN, OWN, STILL, UNSHARED
from vmdedup.core.scan import count
from vmdedup.errors import VmError, VmGoneError
from vmdedup.guest.huge_pages import huge_blocks
from vmdedup.guest.mapping_state import (
    HELD,
    MappingState,
    StoreId,
    cached_pages,
    published_digests,
    swapped_slots,
    unfreed_pages,
)
from vmdedup.linux.pagemap import PRESENT, SWAPPED
from vmdedup.models import (
    Durations,
    HostReport,
    Matrix,
    RepeatedContent,
    SharingReport,
    VmReport,
    VmStatus,
)
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_SLOT_BITS = 32

VMA_BYTES = 256
"""Kernel memory of one mapping: vm_area_struct and its share of maple tree nodes
(/proc/slabinfo: vm_area_struct 184 to 232 bytes, by configuration)."""


@dataclass(frozen=True)
class PastTotals:
    """Totals of VMs that have left: sums over all VMs must never decrease."""

    pages_scanned: int = 0
    pages_skipped: int = 0
    cow_breaks: int = 0
    stopped_ms: float = 0.0
    huge_pages_split: int = 0

    def plus(self, vm: AttachedVm) -> PastTotals:
        """The totals with those of another VM added."""
        return PastTotals(
            self.pages_scanned + vm.scan.pages_scanned,
            self.pages_skipped + vm.scan.ages.pages_skipped,
            self.cow_breaks + vm.totals.cow_breaks,
            self.stopped_ms + vm.totals.stopped_ms,
            self.huge_pages_split + vm.totals.huge_pages_split,
        )


@dataclass(frozen=True)
class ScanTotals:
    """Totals that only a merging engine can know."""

    full_scans: int
    process_bytes: int
    """PSS of our processes in bytes, including the columns of all pages."""
    past: PastTotals


def sharing_report(
    attached: Sequence[AttachedVm],
    absent: Sequence[VmReport],
    *,
    converged: bool | None,
    scan: ScanTotals | None,
    refresh: bool,
) -> SharingReport:
    """The report from the state of every VM, the `absent` ones last. Raises VmGoneError.

    With `refresh` the state is read again, else the state of the last pass is enough.
    """
    if refresh:
        for each in attached:
            each.ask_balloon()
    states = [each.scan.refresh() if refresh else each.scan.known_state() for each in attached]
    counts, contents, copies, store_swapped = _counts(states)
    unfreed = [_unfreed(each, state) for each, state in zip(attached, states, strict=True)]
    # Without vmdedup a balloon's pages would take no memory either.
    ballooned = [
        min(int(np.count_nonzero(state.merged | state.zero)), each.ballooned_pages(state))
        for each, state in zip(attached, states, strict=True)
    ]
    saved = _saved_bytes(counts, [sum(lost) for lost in zip(unfreed, ballooned, strict=True)])
    cold = cold_counts(attached, states)
    vms = [
        _vm_report(
            each,
            state,
            counts,
            number,
            saved_bytes=saved[number],
            ballooned=ballooned[number],
            cold=cold[number],
            converged=converged,
            scanned=scan is not None,
        )
        for number, (each, state) in enumerate(zip(attached, states, strict=True))
    ]
    vms += absent
    saved_bytes = sum(vm.saved_bytes for vm in vms)
    overhead = _overhead_bytes(attached, states, scan)
    totals = reduce(PastTotals.plus, attached, scan.past) if scan is not None else None
    found = [count(each.scan.columns) for each in attached]
    return SharingReport(
        converged=converged,
        host=HostReport(
            pages_shared=counts.pages_shared,
            pages_sharing=counts.pages_sharing,
            pages_unshared=None if scan is None else sum(each.unshared_pages for each in found),
            pages_volatile=None if scan is None else sum(each.volatile_pages for each in found),
            zero_pages=counts.zero_pages,
            cow_broken_pages=sum(vm.cow_broken_pages for vm in vms),
            full_scans=None if scan is None else scan.full_scans,
            pages_scanned=None if totals is None else totals.pages_scanned,
            saved_bytes=saved_bytes,
            overhead_bytes=overhead,
            profit_bytes=None if overhead is None else saved_bytes - overhead,
            pages_skipped=None if totals is None else totals.pages_skipped,
            ksm_zero_pages=counts.zero_pages,
            stable_node_dups=copies,
            store_swapped_pages=store_swapped,
            cold_pages=sum(vm.cold_pages for vm in vms),
            cold_bytes_saved=sum(vm.cold_bytes_saved for vm in vms),
            cold_refaults_per_s=round(sum(vm.cold_refaults_per_s for vm in vms), 3),
            general_profit=None if overhead is None else saved_bytes - overhead,
            kernel_pages_allocated=counts.pages_shared,
            stopped_ms=None if totals is None else totals.stopped_ms,
            cow_breaks=None if totals is None else totals.cow_breaks,
            huge_pages=_sum([vm.huge_pages for vm in vms]),
            huge_pages_split=None if totals is None else totals.huge_pages_split,
            pages_kept_in_huge=_sum([vm.pages_kept_in_huge for vm in vms]),
            gate_ms=durations([ms for t in attached for ms in t.totals.gate_ms]),
            drain_ms=durations([ms for t in attached for ms in t.totals.drain_ms]),
        ),
        vms=vms,
        matrix=Matrix(vms=[t.name for t in attached], pages=counts.matrix.tolist()),
        contents=contents,
    )


def _unfreed(vm: AttachedVm, state: MappingState) -> int:
    """Number of merged pages whose old memory is not free yet, including broken pages.

    Pages of RAM files that cannot be read now, for lack of a descriptor for instance, do not
    count. Raises VmGoneError.
    """
    kept = int(vm.record.kept.pages.sum())
    where = vm.pid, vm.regions, vm.space, state
    try:
        unfreed = unfreed_pages(*where, only_memory=True) | cached_pages(*where)
    except VmGoneError:
        raise
    except VmError:
        return kept
    return int(np.count_nonzero(unfreed)) + kept


def _saved_bytes(counts: SharingCounts, lost_pages: Sequence[int]) -> list[int]:
    """Saved bytes of each VM: its fair share less its lost pages.

    No VM is below `0`: a deficit is taken from the VMs that save most.
    """
    shares = zip(counts.vm_saved_bytes, lost_pages, strict=True)
    saved = [share - lost * PAGE_BYTES for share, lost in shares]
    lacking = -sum(each for each in saved if each < 0)
    for at in sorted(range(len(saved)), key=lambda at: -saved[at]):
        taken = max(0, min(lacking, saved[at]))
        lacking -= taken
        saved[at] = max(0, saved[at] - taken)
    return saved


def _counts(
    states: Sequence[MappingState],
) -> tuple[SharingCounts, list[RepeatedContent], int, int]:
    """Counts over all VMs, the most repeated contents, and two numbers of store pages.

    These are the further copies of a content, and the pages that are swapped out. Slots of
    different stores have different numbers; copies have equal digests.
    """
    numbers: dict[StoreId, int] = {}
    keys = [_keys(state, numbers) for state in states]
    used, dense = np.unique(
        np.concatenate([np.empty(0, dtype=np.int64), *keys]), return_inverse=True
    )
    content = np.arange(len(used), dtype=np.int64)
    swapped = 0
    for store, number in numbers.items():
        mine = np.flatnonzero(used >> _SLOT_BITS == number)
        slot = used[mine] & ((1 << _SLOT_BITS) - 1)
        swapped += int(np.count_nonzero(swapped_slots(store, slot)))
        published = published_digests(store)
        if published is not None and len(mine):
            digest = published[1][slot]
            content[mine] = mine[0] + np.unique(digest, return_inverse=True)[1]
    sites = np.split(dense, np.cumsum([len(each) for each in keys])[:-1]) if keys else []
    zero_pages = [int(np.count_nonzero(state.zero)) for state in states]
    counts = sharing_counts(sites, zero_pages, content)
    where = Slots(used >> _SLOT_BITS, used & ((1 << _SLOT_BITS) - 1), content, tuple(numbers))
    contents = repeated_contents(sites, zero_pages, where)
    return counts, contents, len(used) - len(np.unique(content)), swapped


def _keys(state: MappingState, numbers: dict[StoreId, int]) -> npt.NDArray[np.int64]:
    """Each merged page's store and slot as one number; new stores get a number."""
    merged = state.merged
    slot = state.slot[merged].astype(np.int64)
    if state.stores:
        bases = [numbers.setdefault(store, len(numbers)) << _SLOT_BITS for store in state.stores]
        slot += np.array(bases, dtype=np.int64)[state.store[merged]]
    return slot


def _vm_report(
    vm: AttachedVm,
    state: MappingState,
    counts: SharingCounts,
    number: int,
    *,
    saved_bytes: int,
    ballooned: int,
    cold: ColdCount,
    converged: bool | None,
    scanned: bool,
) -> VmReport:
    mapped = counts.vm_merged_pages[number] + counts.vm_zero_pages[number]
    status: VmStatus = "merged" if mapped or converged else "scanning"
    if vm.failure is not None:
        status = "failed"
    reason = None
    if vm.refusal is not None:
        status, reason = "refused", vm.refusal
    elif vm.hindrance is not None:
        reason = vm.hindrance
    elif vm.left_to_unmerge_pages:
        reason = vm.record.left_reason
        if vm.leaves_domain is not None:
            reason = f"it leaves trust domain {vm.leaves_domain}: {reason or 'unmerged soon'}"
    elif vm.record.crowded is not None:
        reason = vm.record.crowded
    elif vm.record.trouble is not None:
        reason = vm.record.trouble
        if vm.record.waiting_pages:
            reason = f"{vm.record.waiting_pages} mergeable pages wait for room: {reason}"
    elif len(vm.record.deferred):
        reason = (
            f"{len(vm.record.deferred)} mergeable pages wait for VMAs; "
            f"vm.max_map_count={vm.record.needed_max_map_count} would admit them"
        )
    return VmReport(
        name=vm.name,
        pid=vm.pid,
        uuid=vm.identity.uuid,
        status=status,
        reason=reason,
        hint=vm.hint,
        trust_domain=vm.domain,
        ram_bytes=vm.space.pages * PAGE_BYTES,
        present_bytes=state.held_bytes() - ballooned * PAGE_BYTES,
        ballooned_pages=ballooned,
        perhaps_discarded_pages=vm.perhaps_discarded_pages(state),
        merged_pages=counts.vm_merged_pages[number],
        zero_pages=counts.vm_zero_pages[number],
        cow_broken_pages=int(np.count_nonzero(state.broken)),
        deferred_pages=len(vm.record.deferred) + vm.record.waiting_pages if scanned else None,
        needed_max_map_count=vm.record.needed_max_map_count,
        vmas=state.process_vmas,
        saved_bytes=saved_bytes,
        gates=vm.totals.gates if scanned else None,
        stops=vm.totals.stops if scanned else None,
        ksm_rmap_items=vm.space.pages,
        ksm_zero_pages=counts.vm_zero_pages[number],
        ksm_merging_pages=counts.vm_merged_pages[number],
        ksm_process_profit=saved_bytes - _kept_bytes(vm, state),
        ksm_mergeable=vm.refusal is None and vm.registration.pages > 0,
        refusal=None if vm.refusal is None else vm.refusal_key,
        cow_breaks=vm.totals.cow_breaks if scanned else None,
        left_to_unmerge_pages=vm.left_to_unmerge_pages,
        leaves_domain=vm.leaves_domain,
        huge_pages=_huge_pages(vm, state),
        huge_pages_split=vm.totals.huge_pages_split if scanned else None,
        pages_kept_in_huge=vm.record.kept_in_huge_pages if scanned else None,
        cold_pages=cold.pages,
        cold_bytes_saved=cold.saved_bytes,
        cold_refaults_per_s=cold.refaults_per_s,
        **whereabouts(state, vm.scan.columns.flags if scanned else None),
    )


def _huge_pages(vm: AttachedVm, state: MappingState) -> int | None:
    """Number of huge pages that back a VM's RAM now, `None` if the kernel does not tell."""
    is_huge = huge_blocks(vm.pagemap, vm.scan.blocks, state)
    return None if is_huge is None else int(np.count_nonzero(is_huge))


def _sum(counts: Sequence[int | None]) -> int | None:
    """The sum of those that are known, `None` if none is."""
    known = [each for each in counts if each is not None]
    return sum(known) if known else None


def whereabouts(state: MappingState, flags: npt.NDArray[np.uint8] | None) -> dict[str, int | None]:
    """Numbers of pages that were never merged, by their state; no page counts twice.

    `flags` is the pass's column; `None`: no pass has run.
    """
    own = state.slot == OWN
    present = own & ((state.categories & PRESENT) != 0)
    swapped = own & ~present & ((state.categories & SWAPPED) != 0)
    absent = own & (state.categories & HELD == 0)
    known: dict[str, int | None] = {"unique_pages": None, "volatile_pages": None}
    if flags is not None:
        volatile = present & ((flags & (KNOWN | STILL)) == KNOWN)
        known["unique_pages"] = int(np.count_nonzero(present & (flags & UNSHARED != 0)))
        known["volatile_pages"] = int(np.count_nonzero(volatile))
    return {
        "absent_pages": int(np.count_nonzero(absent)),
        "swapped_pages": int(np.count_nonzero(swapped)),
        **known,
    }


def absent_report(
    name: str,
    pid: int | None,
    status: VmStatus,
    reason: str,
    *,
    uuid: str | None,
    refusal: str = "other",
) -> VmReport:
    """The report of a VM that is known but not attached: refused, unreachable, gone.

    `refusal` is one of `policy.refusals.REFUSALS`, and left out of a VM that is gone.
    """
    return VmReport(
        name=name,
        pid=pid,
        uuid=uuid,
        status=status,
        reason=reason,
        trust_domain=None,
        ram_bytes=0,
        present_bytes=0,
        merged_pages=0,
        zero_pages=0,
        cow_broken_pages=0,
        deferred_pages=None,
        vmas=0,
        saved_bytes=0,
        gates=None,
        stops=None,
        refusal=refusal if status == "refused" else None,
    )


def _overhead_bytes(
    vms: Sequence[AttachedVm], states: Sequence[MappingState], scan: ScanTotals | None
) -> int | None:
    """Bytes that merging costs: mappings beyond one for each region, and our processes."""
    if scan is None:
        return None
    added = sum(_added_vmas(vm, state) for vm, state in zip(vms, states, strict=True))
    return added * VMA_BYTES + scan.process_bytes


def _added_vmas(vm: AttachedVm, state: MappingState) -> int:
    return max(0, state.ram_vmas - len(vm.regions))


def _kept_bytes(vm: AttachedVm, state: MappingState) -> int:
    """Bytes kept for one VM: its columns and its added mappings."""
    columns = vm.scan.columns.memory_bytes + vm.scan.ages.memory_bytes
    return columns + _added_vmas(vm, state) * VMA_BYTES


def durations(milliseconds: Sequence[float]) -> Durations:
    """Percentiles of durations, by nearest rank, so that each value was really measured."""
    if not milliseconds:
        return Durations()
    ranked = np.sort(np.array(milliseconds))
    p50, p95, p99 = (
        round(float(value), 3)
        for value in np.quantile(ranked, (0.5, 0.95, 0.99), method="inverted_cdf")
    )
    most = round(float(ranked[-1]), 3)
    return Durations(count=len(ranked), p50=p50, p95=p95, p99=p99, max=most)
