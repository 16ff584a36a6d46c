"""What the kernel's KSM would save on the same VMs now (`vmdedup report --compare KSM`).

Owns one look at all memory of attached VMs, piece by piece: each page is read and digested
once. Then it is counted by the rules of both, which needs no VM. KSM's: every mapping that
QEMU has registered (VmFlags `mg`), so private memory alone, ROM and video memory too; pages
that are anonymous and in memory; over all trust domains. Ours: registered backends, share=on
too, within each trust domain.
Pages that vmdedup has merged count as if each VM still had its own.

Promises that nothing changes by it, except that a store page that was swapped out is read
in. Both figures are what would be reached if no page changed: a page that changes too
fast, too few VMAs, and pinned pages are left out of neither.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.core.counters import SharingCounts, sharing_counts
from vmdedup.core.digest import zero_digest
from vmdedup.core.ksm_rules import RMAP_ITEM_BYTES, ksm_sites
from vmdedup.guest.page_reader import digests_at
from vmdedup.linux.ksm import KernelKsm, zero_pages_of
from vmdedup.linux.pagemap import FILE, HUGE, PFNZERO, PRESENT
from vmdedup.linux.smaps import flagged_vmas
from vmdedup.models import KsmComparison, KsmVm
from vmdedup.policy.domains import ZERO_ONLY
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

Digests = npt.NDArray[np.uint64]

_KSM_RUNS = "kernel-ksm"
"""Refusal of a VM only for the time while KSM runs."""
_UNLIMITED = 2**62


@dataclass(frozen=True)
class KsmContents:
    """Digests of one VM's pages; zero pages are among them."""

    name: str
    pid: int
    domain: str | None
    has_huge_pages: bool
    ksm: Digests
    """Pages that KSM would scan."""
    registered: Digests
    """Pages that vmdedup could merge; none if it refuses the VM."""
    ksm_zero_pages: int
    """Pages that KSM has put on the zero page already, which are in no column."""


def ksm_comparison(vms: Sequence[KsmContents], kernel: KernelKsm, seed: int) -> KsmComparison:
    """Count these VMs, whose digests were made with `seed`."""
    zero = np.uint64(zero_digest(seed))
    theirs = _counted_as_ksm(vms, kernel, zero)
    ours = _saved_by_us(vms, zero)
    scanned = [len(vm.ksm) for vm in vms]
    rows = [
        KsmVm(
            name=vm.name,
            pid=vm.pid,
            scanned_pages=scanned[number],
            merging_pages=theirs.vm_merged_pages[number],
            zero_pages=theirs.vm_zero_pages[number],
            saved_bytes=theirs.vm_saved_bytes[number],
            vmdedup_saved_bytes=ours[number],
        )
        for number, vm in enumerate(vms)
    ]
    return KsmComparison(
        max_page_sharing=kernel.max_page_sharing,
        use_zero_pages=kernel.use_zero_pages,
        pages_shared=theirs.pages_shared,
        pages_sharing=theirs.pages_sharing,
        zero_pages=theirs.zero_pages,
        saved_bytes=theirs.saved_bytes,
        general_profit=theirs.saved_bytes - sum(scanned) * RMAP_ITEM_BYTES,
        vmdedup_saved_bytes=sum(ours),
        vms=rows,
        notes=_notes(kernel, has_huge_pages=any(vm.has_huge_pages for vm in vms)),
    )


def _notes(kernel: KernelKsm, *, has_huge_pages: bool) -> list[str]:
    notes = []
    if has_huge_pages:
        notes.append("huge pages are counted as if KSM split them all; it leaves some whole")
    if not kernel.exists:
        notes.append("this kernel has no KSM: counted with the defaults of its settings")
    if not kernel.merge_across_nodes:
        notes.append("merge_across_nodes=0: pages of different NUMA nodes are counted as merged")
    return notes


def ksm_contents(vm: AttachedVm, seed: int) -> Generator[None, None, KsmContents]:
    """Look at one VM; stops after each piece. Raises VmError."""
    state, page, digest = yield from vm.scan.held_digests(seed)
    private = np.zeros(vm.space.pages, dtype=np.bool_)
    for number, region in enumerate(vm.regions):
        private[vm.space.slice_of(number)] = not region.share
    zero = np.full(vm.space.pages, zero_digest(seed), dtype=np.uint64)
    on_zero = [zero[state.zero & private], zero[state.zero & vm.registered]]
    is_ours = vm.refusal is None or vm.refusal_key == _KSM_RUNS
    ours = np.concatenate([digest[vm.registered[page]], on_zero[1]])
    return KsmContents(
        name=vm.name,
        pid=vm.pid,
        domain=vm.domain,
        has_huge_pages=bool(np.any(state.categories & HUGE)),
        ksm=np.concatenate([digest[private[page]], on_zero[0], _elsewhere(vm, seed)]),
        registered=ours if is_ours else ours[:0],
        ksm_zero_pages=zero_pages_of(vm.pid),
    )


def _elsewhere(vm: AttachedVm, seed: int) -> Digests:
    """Digests of the pages outside the backends that KSM would scan: ROMs, video memory."""
    spans = vm.space.spans()
    addresses = [np.empty(0, dtype=np.int64)]
    for vma in flagged_vmas(vm.name, vm.pid):
        if "mg" not in vma.flags or any(low <= vma.start < high for low, high in spans):
            continue
        category = vm.pagemap.categories(vma.start, (vma.end - vma.start) // PAGE_BYTES)
        anonymous = np.flatnonzero(category & (PRESENT | FILE | PFNZERO) == PRESENT)
        addresses.append(vma.start + anonymous * PAGE_BYTES)
    digest, is_read = digests_at(vm.name, vm.pid, np.concatenate(addresses), seed)
    return digest[is_read]


def _counted_as_ksm(
    vms: Sequence[KsmContents], kernel: KernelKsm, zero: np.uint64
) -> SharingCounts:
    digests = [vm.ksm for vm in vms]
    zero_pages = [vm.ksm_zero_pages for vm in vms]
    if kernel.use_zero_pages:
        for number, each in enumerate(digests):
            digests[number] = each[each != zero]
            zero_pages[number] += len(each) - len(digests[number])
    return sharing_counts(ksm_sites(digests, kernel.max_page_sharing), zero_pages)


def _saved_by_us(vms: Sequence[KsmContents], zero: np.uint64) -> list[int]:
    """Bytes that vmdedup would save of each VM, by the same contents."""
    saved = [0] * len(vms)
    for domain in {vm.domain for vm in vms if vm.domain is not None}:
        members = [number for number, vm in enumerate(vms) if vm.domain == domain]
        digests = [vms[number].registered for number in members]
        others = [each[each != zero] for each in digests]
        zero_pages = [len(all_) - len(rest) for all_, rest in zip(digests, others, strict=True)]
        if domain == ZERO_ONLY:
            others = [each[:0] for each in others]
        counts = sharing_counts(ksm_sites(others, _UNLIMITED), zero_pages)
        for number, each in zip(members, counts.vm_saved_bytes, strict=True):
            saved[number] = each
    return saved
