"""The counts of shared pages, in KSM's words, and of the rest of the RAM.

Owns the arithmetic from the slot that each shared site is mapped to, to the
report's numbers. Promises the identities below, exactly, in integers. Refuses to
know where the sites come from: `guest.mapping_state` reads them from the page tables.

    pages_shared + pages_sharing           = shared sites
    pages_sharing + zero_pages             = saved pages
    sum of the VMs' saved_bytes            = the host's saved_bytes
    sum of the funnel                      = RAM pages

KSM's meanings are kept: pages_shared are store pages in use, pages_sharing the
further sites that share them, hence pages saved. Zero pages need no store page
and each saves a whole one; KSM likewise counts them apart (ksm_zero_pages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.matrix import common_contents
from vmdedup.core.rmap import BROKEN, FIRST_SLOT, STILL, ZERO, PageColumns
from vmdedup.errors import UsageError
from vmdedup.models import Funnel
from vmdedup.units import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class SharingCounts:
    """Sharing over a number of VMs: one trust domain, or the whole host."""

    pages_shared: int
    """Store pages that at least one site is mapped to."""

    pages_sharing: int
    """Sites on store pages beyond the first of each: pages saved."""

    zero_pages: int
    """Sites on the zero page: pages saved as well."""

    vm_merged_pages: tuple[int, ...]
    """Sites on store pages, per VM."""

    vm_zero_pages: tuple[int, ...]

    vm_saved_bytes: tuple[int, ...]
    """Fair share of the savings, per VM. Each of the k sites of a store page saves
    1 - 1/k of a page, each zero page a whole one; within one byte of that quotient."""

    matrix: NDArray[np.int64]
    """(i, j): distinct non-zero store contents that VMs i and j both map; (i, i):
    those that VM i maps."""

    @property
    def saved_bytes(self) -> int:
        """All savings; equals the sum of `vm_saved_bytes`."""
        return (self.pages_sharing + self.zero_pages) * PAGE_BYTES


def sharing_counts(
    sites: Sequence[NDArray[np.integer[Any]]],
    zero_pages: Sequence[int],
    content_of_slot: NDArray[np.int64] | None = None,
) -> SharingCounts:
    """Count the sharing of some VMs; VM v is row v of both sequences.

    `sites[v]` holds the slot of every site of VM v that really shares it now
    (not broken), `zero_pages[v]` its sites on the zero page. To count several
    stores at once, number their slots apart (add each store's base). If several
    slots hold copies of one content, `content_of_slot` numbers the contents
    (indexed by slot), so that the matrix counts each content once. Pages are
    counted by slot regardless, since each slot occupies memory.

    Raises UsageError when the two sequences differ in length.
    """
    if len(sites) != len(zero_pages):
        raise UsageError(f"sites of {len(sites)} VMs but zero pages of {len(zero_pages)}")
    vm, slot, sites_here = _sites_by_slot(sites)
    used, row = np.unique(slot, return_inverse=True)
    sites_of = np.bincount(row, weights=sites_here, minlength=len(used)).astype(np.int64)
    content = (
        row if content_of_slot is None else np.unique(content_of_slot[slot], return_inverse=True)[1]
    )
    pages_sharing = int(sites_here.sum()) - len(used)
    return SharingCounts(
        pages_shared=len(used),
        pages_sharing=pages_sharing,
        zero_pages=sum(zero_pages),
        vm_merged_pages=tuple(len(slots) for slots in sites),
        vm_zero_pages=tuple(zero_pages),
        vm_saved_bytes=_fair_shares(vm, sites_here, sites_of[row], zero_pages, pages_sharing),
        matrix=common_contents(vm, content, len(sites)),
    )


def _sites_by_slot(
    sites: Sequence[NDArray[np.integer[Any]]],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Each VM's distinct slots, all VMs end to end: vm, slot, number of sites."""
    per_vm = [np.unique(slots, return_counts=True) for slots in sites]
    none = np.empty(0, dtype=np.int64)
    return (
        np.repeat(np.arange(len(sites), dtype=np.int32), [len(slots) for slots, _ in per_vm]),
        np.concatenate([none, *(slots for slots, _ in per_vm)]),
        np.concatenate([none, *(counts for _, counts in per_vm)]),
    )


_FRACTION_BITS = 64


def _fair_shares(
    vm: NDArray[np.int32],
    sites_here: NDArray[np.int64],
    sites_of: NDArray[np.int64],
    zero_pages: Sequence[int],
    pages_sharing: int,
) -> tuple[int, ...]:
    """Split the saved bytes over the VMs by largest remainder.

    Per VM the sites are added up by k, the sharers of their slot. Each k is weighed
    once in 64-bit fixed point with Python's integers: floats would lose bytes,
    fractions would grow with every k. The bytes left over by rounding down, at most
    one a VM, go to the largest remainders, earlier VMs first.
    """
    fixed: list[int] = []
    for index, zero in enumerate(zero_pages):
        mine = vm == index
        share = (zero * PAGE_BYTES) << _FRACTION_BITS
        sites_by_k = np.bincount(sites_of[mine], weights=sites_here[mine])
        for k in np.flatnonzero(sites_by_k).tolist():
            share += int(sites_by_k[k]) * (((k - 1) * PAGE_BYTES << _FRACTION_BITS) // k)
        fixed.append(share)
    whole = [share >> _FRACTION_BITS for share in fixed]
    left_over = (pages_sharing + sum(zero_pages)) * PAGE_BYTES - sum(whole)
    remainder_mask = (1 << _FRACTION_BITS) - 1
    by_remainder = sorted(range(len(fixed)), key=lambda at: -(fixed[at] & remainder_mask))
    for index in by_remainder[:left_over]:
        whole[index] += 1
    return tuple(whole)


def funnel(
    name: str,
    columns: PageColumns,
    *,
    absent: NDArray[np.int64],
    swapped: NDArray[np.int64],
    deferred: NDArray[np.int64],
    kept_in_huge: NDArray[np.int64],
    pending: NDArray[np.int64],
    other_domain: NDArray[np.int64],
) -> Funnel:
    """Sort every page of the VM of that name into the funnel.

    The arguments are page indices as the last pass left them; they may overlap,
    the order below decides.
    """
    shared = columns.shared()
    stages = {
        "merged_pages": shared & (columns.slot >= FIRST_SLOT),
        "zero_pages": shared & (columns.slot == ZERO),
        "broken_pages": columns.flags & BROKEN != 0,
        "absent_pages": _mask(columns, absent),
        "swapped_pages": _mask(columns, swapped),
        "volatile_pages": columns.flags & STILL == 0,
        "deferred_pages": _mask(columns, deferred),
        "kept_in_huge_pages": _mask(columns, kept_in_huge),
        "pending_pages": _mask(columns, pending),
        "other_domain_pages": _mask(columns, other_domain),
    }
    left = np.ones(len(columns), dtype=np.bool_)
    counts: dict[str, int] = {}
    for part, stage in stages.items():
        counts[part] = int(np.count_nonzero(left & stage))
        left &= ~stage
    unique = int(np.count_nonzero(left))
    return Funnel(name=name, ram_pages=len(columns), unique_pages=unique, **counts)


def _mask(columns: PageColumns, page_index: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(len(columns), dtype=np.bool_)
    mask[page_index] = True
    return mask
