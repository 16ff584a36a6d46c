"""Unmerging a whole VM: rounds of `unmerge`, as far as memory safely allows.

Owns the memory check (KSM's documentation warns that unmerging too much at once
"will ... arouse the OOM killer") and the rounds. Promises to leave the VM
either wholly its own or merged with a stated rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from vmdedup.account import MappingState, open_ram_file, unfreed_pages
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.models import UnmergedVm
from vmdedup.release import punch_merged
from vmdedup.sessions import Host, gate_runs, open_session
from vmdedup.tenant import Tenant
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.unmerge import HomeRegion, VmUnmerger

_MOST_EMPTY_ROUNDS = 8
_RESERVE_BYTES = 256 * MIB
"""Available memory that an unmerge leaves to the host."""

MADV_DONTFORK = 10
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16

_ADVICE_OF_FLAG = {
    "dc": MADV_DONTFORK,
    "dd": MADV_DONTDUMP,
    "hg": MADV_HUGEPAGE,
    "nh": MADV_NOHUGEPAGE,
    "mg": MADV_MERGEABLE,
}
"""VmFlags of a mapping and the madvise that sets them."""


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def restore(host: Host, tenant: Tenant, progress: Callable[[int], None]) -> UnmergedVm:
    """Unmerge one VM. `progress` is told the pages restored. Raises VmError."""
    restored = 0
    reason = None
    state = tenant.refresh()
    if (state.slot != OWN).any():
        _punch_leftovers(tenant, state)
        with ExitStack() as exits:
            homes = _homes(tenant, exits)
            empty_rounds = 0
            while (state.slot != OWN).any() and empty_rounds < _MOST_EMPTY_ROUNDS:
                most_pages = max(0, available_bytes() - _RESERVE_BYTES) // PAGE_BYTES
                if most_pages == 0:
                    break
                done = _round(host, tenant, homes, state, most_pages)
                restored += done
                empty_rounds += 0 if done else 1
                progress(restored)
                state = tenant.refresh()
    remaining = int(np.count_nonzero(state.slot != OWN))
    if remaining:
        needed = int(np.count_nonzero(state.slot != OWN) - np.count_nonzero(state.slot == ZERO))
        reason = (
            f"{remaining} pages stay merged: {needed * PAGE_BYTES // MIB} MiB are needed, "
            f"{available_bytes() // MIB} MiB are available; free memory and unmerge again"
        )
    return UnmergedVm(
        name=tenant.name,
        pid=tenant.pid,
        restored_pages=restored,
        remaining_pages=remaining,
        reason=reason,
    )


def _round(
    host: Host, tenant: Tenant, homes: list[HomeRegion], state: MappingState, most_pages: int
) -> int:
    tenant.stop_tracking()
    with open_session(host, tenant, tenant.space.spans()) as (session, remote):
        unmerger = VmUnmerger(
            tenant.name,
            tenant.pid,
            space=tenant.space,
            homes=homes,
            pagemap=tenant.pagemap,
            remote=remote,
            gate_runs=gate_runs(host.settings, remote),
            gate_pages=host.settings.gate_pages,
        )
        return unmerger.unmerge(session, state, most_pages)


def _punch_leftovers(tenant: Tenant, state: MappingState) -> None:
    """A RAM file must be empty behind merged pages, so that zero pages read as zero there."""
    unfreed = unfreed_pages(tenant.pid, tenant.regions, tenant.space, state)
    punch_merged(tenant.process, tenant.regions, tenant.space, np.flatnonzero(unfreed))


def _homes(tenant: Tenant, exits: ExitStack) -> list[HomeRegion]:
    """Where each region's pages go; a RAM file that QEMU keeps no descriptor of is lent to it."""
    homes = []
    for index, region in enumerate(tenant.regions):
        qemu_fd = region.ram_fd
        if region.ram_file is not None and qemu_fd is None:
            fd = open_ram_file(tenant.pid, region, os.O_RDWR)
            exits.callback(os.close, fd)
            qemu_fd = exits.enter_context(tenant.lent(fd, "ram"))
        advices = tuple(
            advice for flag, advice in _ADVICE_OF_FLAG.items() if flag in tenant.region_flags[index]
        )
        homes.append(HomeRegion(region, index, qemu_fd, advices))
    return homes
