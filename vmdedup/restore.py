"""Unmerging a whole VM: rounds of `unmerge`, as far as memory safely allows.

Owns the memory check (KSM's documentation warns that unmerging too much at once
"will ... arouse the OOM killer"), which looks at the host and at the cgroups that
will be charged, and the rounds. Promises to leave the VM
either wholly its own or merged with a stated rest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.account import MappingState, StoreId, open_ram_file, unfreed_pages
from vmdedup.closing import Closing
from vmdedup.core.gate_size import USUAL
from vmdedup.core.rmap import FIRST_SLOT, OWN
from vmdedup.memory.store import PublishedPages
from vmdedup.models import UnmergedVm
from vmdedup.policy.hazards import unmerging
from vmdedup.procfs.cgroup import headroom
from vmdedup.reapply import Reapply
from vmdedup.release import punch_merged
from vmdedup.sessions import Host, approach, borrow_thread, open_session, told_as_merge_error
from vmdedup.tenant import Tenant
from vmdedup.units import MIB, PAGE_BYTES
from vmdedup.unmerge import HomeRegion, VmUnmerger, join_mappings, takes_blocks

_EMPTY_LIVE_ROUNDS = 10
"""Rounds in which no page came home, before the rest is done in a pause: what a guest writes
at each timer tick comes home in some of them, what it writes all the time in none."""
_EMPTY_STOPPED_ROUNDS = 2
_RESERVE_BYTES = 256 * MIB
"""Available memory that an unmerge leaves to the host."""
_GROUP_RESERVE_BYTES = 16 * MIB
"""What it leaves to a cgroup: a quarter of a gate, page tables, what QEMU itself takes."""


def memory_bytes() -> tuple[int, int]:
    """MemAvailable and MemTotal of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available * 1024, total * 1024


def available_bytes() -> int:
    """MemAvailable of /proc/meminfo."""
    return memory_bytes()[0]


def spendable(pid: int) -> tuple[int, str]:
    """Bytes of new memory that unmerging this VM may take, and what bounds them.

    Pages of a RAM file are charged to our own cgroup, other pages to the VM's
    (mm/shmem.c: shmem_file_write_iter; mm/memory.c: do_anonymous_page).
    """
    bounds = [(available_bytes() - _RESERVE_BYTES, "the host")]
    for who in (pid, os.getpid()):
        found = headroom(who)
        if found is not None:
            bounds.append((found.left_bytes - _GROUP_RESERVE_BYTES, f"cgroup {found.group}"))
    left_bytes, where = min(bounds)
    return max(0, left_bytes), where


class MappedStores(Closing):
    """Stores mapped here to be read, each once, however many VMs stand on it.

    For several threads at once.
    """

    def __init__(self) -> None:
        self._pages: dict[StoreId, PublishedPages] = {}
        self._opening = threading.Lock()

    def most_used(self, state: MappingState) -> PublishedPages | None:
        """The store that most of the VM's pages stand on, where it can be read here."""
        on_store = state.store[state.merged]
        if not len(on_store):
            return None
        store = state.stores[int(np.bincount(on_store).argmax())]
        with self._opening:
            if store not in self._pages and store.path is not None:
                with suppress(OSError):
                    self._pages[store] = PublishedPages.open(store.path, store.device, store.inode)
            return self._pages.get(store)

    def close(self) -> None:
        """Unmap them."""
        while self._pages:
            self._pages.popitem()[1].close()


class NewMemory:
    """The memory that unmerges under way may take: no two of them count on the same."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._granted_pages = 0

    @contextmanager
    def granted(self, pid: int, pages: int) -> Iterator[int]:
        """How many of so many pages this VM may take of the memory while in the block.

        Where that is not all, it waits first for what others give back or have taken.
        """
        with self._turn:
            while True:
                left_pages = spendable(pid)[0] // PAGE_BYTES - self._granted_pages
                if left_pages >= pages or not self._granted_pages:
                    break
                self._turn.wait()
            pages = max(0, min(pages, left_pages))
            self._granted_pages += pages
        try:
            yield pages
        finally:
            with self._turn:
                self._granted_pages -= pages
                self._turn.notify_all()


class Unmerges(Closing):
    """What unmerges of several VMs share, one after the other or at the same time."""

    def __init__(self) -> None:
        self.stores = MappedStores()
        self.memory = NewMemory()

    def close(self) -> None:
        """Unmap the stores."""
        self.stores.close()


def restore(
    host: Host,
    tenant: Tenant,
    which: npt.NDArray[np.bool_] | None = None,
    *,
    among: Unmerges | None = None,
) -> UnmergedVm:
    """Unmerge one VM, or only the pages of the mask `which` over its page space.

    `among`: those that it is one of. Raises VmError.
    """
    with told_as_merge_error(tenant, "unmerge"), ExitStack() as exits:
        return _restore(host, tenant, which, among or exits.enter_context(Unmerges()))


def _restore(
    host: Host,
    tenant: Tenant,
    which: npt.NDArray[np.bool_] | None,
    among: Unmerges,
) -> UnmergedVm:
    restored = 0
    reason = shortage = None
    # What was written since this was read, each gate finds by itself.
    state = _limited(tenant.known_state(), which)
    how = unmerging(tenant.findings)
    if _merged_pages(state) and how.refusal is None:
        _punch_leftovers(tenant, state)
        with ExitStack() as exits:
            homes = _homes(tenant, exits)
            longest_run = min(USUAL.pages, host.settings.gate_pages)
            empty_rounds = 0
            most_empty_rounds = _EMPTY_LIVE_ROUNDS + _EMPTY_STOPPED_ROUNDS
            while _merged_pages(state) and empty_rounds < most_empty_rounds:
                stopped = how.stopped or empty_rounds >= _EMPTY_LIVE_ROUNDS
                with among.memory.granted(tenant.pid, _merged_pages(state)) as most_pages:
                    if most_pages == 0:
                        break
                    round_ = _Round(most_pages, longest_run, stopped=stopped)
                    done, shortage = _run_round(host, tenant, homes, state, round_, among.stores)
                restored += done
                empty_rounds = 0 if done else empty_rounds + 1
                longest_run = max(1, longest_run // 8)
                state = _limited(tenant.refresh(), which)
                if shortage is not None and not done:
                    break  # no pause of the VM would make room
            if which is None and not _merged_pages(state):
                _join(host, tenant, homes)
            if _merged_pages(state):
                _punch_leftovers(tenant, state)
        tenant.start_over()
    remaining = _merged_pages(state)
    if remaining and how.refusal is not None:
        reason = f"{remaining} pages stay merged: {how.refusal}"
    elif remaining and shortage is not None:
        reason = (
            f"{remaining} pages stay merged: they need {remaining * PAGE_BYTES // MIB} MiB and"
            f" {shortage}, and unmerge again"
        )
    elif remaining:
        needed_bytes = _needing_memory(tenant, state) * PAGE_BYTES
        reason = f"{remaining} pages stay merged: the guest wrote them at each attempt"
        left_bytes, where = spendable(tenant.pid)
        if needed_bytes > left_bytes:
            reason = (
                f"{remaining} pages stay merged: {needed_bytes // MIB} MiB are needed, "
                f"{left_bytes // MIB} MiB may be taken of {where};"
                " free memory or raise its limit, and unmerge again"
            )
    return UnmergedVm(
        name=tenant.name,
        pid=tenant.pid,
        uuid=tenant.identity.uuid,
        restored_pages=restored,
        remaining_pages=remaining,
        reason=reason,
    )


def _merged_pages(state: MappingState) -> int:
    return int(np.count_nonzero(state.slot != OWN))


def _needing_memory(tenant: Tenant, state: MappingState) -> int:
    """Merged pages that need memory at once: zero pages only where they take blocks."""
    needs = state.slot >= FIRST_SLOT
    for index, region in enumerate(tenant.regions):
        if takes_blocks(region):
            where = tenant.space.slice_of(index)
            needs[where] |= state.slot[where] != OWN
    return int(np.count_nonzero(needs))


def _limited(state: MappingState, which: npt.NDArray[np.bool_] | None) -> MappingState:
    """The state with the pages outside of `which` taken for the VM's own."""
    if which is None:
        return state
    return replace(state, slot=np.where(which, state.slot, OWN).astype(np.int32))


@dataclass(frozen=True)
class _Round:
    """How one round is done. `stopped`: what guests write all the time needs a pause."""

    most_pages: int
    longest_run: int
    stopped: bool


def _run_round(
    host: Host,
    tenant: Tenant,
    homes: list[HomeRegion],
    state: MappingState,
    how: _Round,
    stores: MappedStores,
) -> tuple[int, str | None]:
    """Pages that came home, and which room is lacking, if any is."""
    tenant.stop_tracking()
    whole = np.array(tenant.space.spans(), dtype=np.int64)
    with (
        approach(host, tenant, stopped=how.stopped) as approached,
        open_session(host, tenant, approached, whole) as session,
    ):
        unmerger = VmUnmerger(
            tenant.name,
            tenant.pid,
            space=tenant.space,
            homes=homes,
            remote=approached.remote,
            published=stores.most_used(state),
        )
        done = unmerger.unmerge(session, state, how.most_pages, how.longest_run)
        return done, unmerger.shortage


def _join(host: Host, tenant: Tenant, homes: list[HomeRegion]) -> None:
    """Give regions whose pieces the kernel can not join by itself their one mapping back."""
    split = [home for home in homes if home.is_shared and home.region.ram_fd is None]
    if split:
        with borrow_thread(host, tenant) as remote:
            for home in split:
                join_mappings(tenant.name, remote, home)
                faults.reached("joined")


def _punch_leftovers(tenant: Tenant, state: MappingState) -> None:
    """A RAM file must be empty behind merged pages, so that zero pages read as zero there."""
    unfreed = unfreed_pages(tenant.pid, tenant.regions, tenant.space, state)
    punch_merged(tenant.process, tenant.regions, tenant.space, np.flatnonzero(unfreed))


def _homes(tenant: Tenant, exits: ExitStack) -> list[HomeRegion]:
    """Where each region's pages go; a RAM file that QEMU keeps no descriptor of is lent to it."""
    homes = []
    lend = exits.enter_context(tenant.lending())
    for index, region in enumerate(tenant.regions):
        qemu_fd = region.ram_fd
        if region.ram_file is not None and qemu_fd is None:
            flags = os.O_RDWR if region.share else os.O_RDONLY
            fd = open_ram_file(tenant.pid, region, flags)
            exits.callback(os.close, fd)
            qemu_fd = lend(fd, "ram")
        reapply = Reapply.of(region, tenant.region_flags[index])
        homes.append(HomeRegion(region, index, qemu_fd, reapply))
    return homes
