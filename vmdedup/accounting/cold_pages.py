"""What cold pages give back, VM by VM.

Owns the sharing out of what compressed swap takes: each page that is swapped out takes the
same part of the memory of zram and zswap, by their own figures. Promises that swapped pages
which vmdedup did not page out count for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmdedup.guest.mapping_state import MappingState
from vmdedup.linux.pagemap import PRESENT, SWAPPED
from vmdedup.linux.swap import read_swap
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm


@dataclass(frozen=True)
class ColdCount:
    """The cold pages of one VM: those that are out, what they give back, and what comes back."""

    pages: int
    saved_bytes: int
    refaults_per_s: float


def cold_counts(vms: Sequence[AttachedVm], states: Sequence[MappingState]) -> list[ColdCount]:
    """The counts of all VMs, from the state of each."""
    pages = [_cold_pages(vm, state) for vm, state in zip(vms, states, strict=True)]
    saved_share = read_swap().saved_share if any(pages) else 0.0
    return [
        ColdCount(
            count,
            int(count * PAGE_BYTES * saved_share),
            round(vm.record.cold_pace.refaults_per_s, 3),
        )
        for vm, count in zip(vms, pages, strict=True)
    ]


def _cold_pages(vm: AttachedVm, state: MappingState) -> int:
    if vm.scan.cold is None:
        return 0
    is_out = state.categories & (PRESENT | SWAPPED) == SWAPPED
    return int(np.count_nonzero(vm.scan.cold.out() & is_out))
