"""Where a VM's RAM went, in parts that add up to all of it.

Pure. Owns the parts' names, order and meaning, for bars, tables and the funnel
of one VM. A part that only a pass can know is left out of a report made
without one; its pages then count as `own`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmdedup.models import VmReport
from vmdedup.units import PAGE_BYTES

PARTS = {
    "merged": "shares a store page",
    "zero": "stands on the zero page",
    "broken": "was merged, the guest has written it since",
    "unique": "no other page has its content",
    "volatile": "changes faster than it is looked at",
    "swapped": "swapped out, left alone",
    "own": "not merged (yet)",
    "absent": "never touched, or discarded",
}

FUNNEL_NOTES = {
    "absent": "never touched, or discarded",
    "swapped": "left alone",
    "volatile": "changes faster than it is looked at",
    "unique": "no other page has its content",
    "other domain": "its equal is in another trust domain",
    "deferred": "has an equal, waits for VMAs",
    "kept in huge": "has an equal, a huge page is kept for speed",
    "pending": "has an equal, merged in the next pass",
    "broken": "was merged, the guest has written it since",
    "merged": "shares a store page",
    "zero": "stands on the zero page",
}
"""Meaning of each part of the funnel, from all of the RAM down to the pages saved."""


def ram_parts(vm: VmReport) -> dict[str, int]:
    """Bytes of each part, in the order of `PARTS`; they sum to the VM's RAM."""
    known = {
        "merged": vm.merged_pages,
        "zero": vm.zero_pages,
        "broken": vm.cow_broken_pages,
        "unique": vm.unique_pages or 0,
        "volatile": vm.volatile_pages or 0,
        "swapped": vm.swapped_pages or 0,
        "absent": vm.absent_pages or 0,
    }
    sizes = {name: pages * PAGE_BYTES for name, pages in known.items()}
    sizes["own"] = max(0, vm.ram_bytes - sum(sizes.values()))
    return {name: sizes[name] for name in PARTS}


def funnel_parts(vm: VmReport) -> dict[str, int]:
    """Pages of each part of the funnel, as far as a report has them; they sum to the VM's RAM.

    Only `explain` finds out which unique pages have an equal in another domain. Pages not
    looked at twice yet are `pending` here.
    """
    pages = {name: size_bytes // PAGE_BYTES for name, size_bytes in ram_parts(vm).items()}
    own = pages.pop("own")
    deferred = min(vm.deferred_pages or 0, own)
    kept = min(vm.pages_kept_in_huge or 0, own - deferred)
    pages |= {"deferred": deferred, "kept in huge": kept, "pending": own - deferred - kept}
    return {name: pages[name] for name in FUNNEL_NOTES if name in pages}


def parts_in_use(vms: Sequence[VmReport]) -> list[str]:
    """The parts that at least one VM has."""
    every = [ram_parts(vm) for vm in vms]
    return [name for name in PARTS if any(parts[name] for parts in every)]
