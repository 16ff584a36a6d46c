"""Paging out cold pages: which VMs, how much of each, and what came back.

Owns when ages advance, and the round over all VMs. Promises that only a page is paged out
that was looked at at least twice, is like no other page, and is neither merged nor zero; and
that nothing is paged out to swap that is slow, unless the settings say so. A page that is out
is forgotten as if it had never been looked at, so that no merge reads it in. Refuses VMs that
may not be merged now (migration, dump, pinned memory: the hazards), that have news, that ask
to be left, or whose writes nothing tells of. Runs between sessions: no VM is armed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from vmdedup.core.cold import TICKS, ColdAges
from vmdedup.core.rmap import OWN, UNSHARED
from vmdedup.core.scan import forget
from vmdedup.engine.served import Served
from vmdedup.engine.terms import Terms
from vmdedup.guest.page_out import are_present, in_part, page_out, swappable, untouched
from vmdedup.linux.cgroup import swap_left_bytes
from vmdedup.linux.pagemap import HUGE, PRESENT, SWAPPED
from vmdedup.linux.process import ProcessId, is_running
from vmdedup.linux.swap import Swap, memory_pressure_percent, read_swap
from vmdedup.policy.cold_pace import FIRST_PACE, next_pace
from vmdedup.settings import Settings
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

SHORT_AFTER_S = 60
"""Age from which pages are cold for short memory alone (`cold_after_s` is 0), seconds."""
PORTION_PAGES = 4096
"""Most pages of one VM that are paged out at once: some 30 ms of work with lz4."""
_LONGEST_S = 5.0
"""Longest time that a round stands for, seconds: a pause is not made up for."""


@dataclass(frozen=True)
class PagedOut:
    """The result of a round."""

    pages: int = 0
    hindrance: str | None = None
    """Why nothing may be paged out on this host now; `None` if it may."""


class ColdPaging:
    """The cold pages of all VMs of an engine."""

    def __init__(self, terms: Terms, served: Served) -> None:
        self._terms = terms
        self._served = served
        self._ages: dict[ProcessId, tuple[list[tuple[int, int]], ColdAges]] = {}
        """The ages of each VM with where its memory lies: it may be attached anew."""
        self._ticked_at = time.monotonic()
        self._served_at = time.monotonic()

    @property
    def _after_s(self) -> int:
        """Age from which pages are cold, seconds; `0` if none is ever to be paged out."""
        controls = self._terms.settings.controls
        return controls.cold_after_s or (SHORT_AFTER_S if controls.shortage_page_out else 0)

    def pass_ended(self) -> None:
        """Let all pages age, if a quarter of that time has passed; follow the controls."""
        now_s = time.monotonic()
        is_due = now_s - self._ticked_at >= self._after_s / TICKS
        if is_due:
            self._ticked_at = now_s
        for vm in self._served.vms:
            cold = vm.scan.cold
            if not self._is_wanted(vm):
                vm.record.cold_pace = FIRST_PACE
                if cold is not None:
                    _settle(vm, cold)
                    # What is out is counted until it has come back.
                    vm.scan.cold = cold if cold.out().any() else None
            elif cold is None:
                vm.scan.cold = self._ages_of(vm)
            elif is_due:
                cold.tick()
        self._forget_others()

    def _ages_of(self, vm: AttachedVm) -> ColdAges:
        """New ages; those of a VM that was attached before tell only what is out."""
        spans = vm.space.spans()
        known, ages = self._ages.get(vm.identity.process_id, (None, None))
        if ages is None or known != spans:
            ages = ColdAges(vm.space.pages)
        elif vm.scan.state is not None:
            ages.written(np.flatnonzero(vm.scan.state.categories & PRESENT))
        self._ages[vm.identity.process_id] = spans, ages
        return ages

    def _forget_others(self) -> None:
        """Keep the ages that are in use, and of VMs that may be attached again."""
        attached = {vm.identity.process_id: vm.scan.cold for vm in self._served.vms}
        for process in list(self._ages):
            in_use = attached.get(process) is not None
            may_come = self._after_s and process not in attached and is_running(process)
            if not in_use and not may_come:
                del self._ages[process]

    def _is_wanted(self, vm: AttachedVm) -> bool:
        """Whether cold pages of the VM may be paged out at all."""
        return bool(self._after_s) and not is_left_alone(vm, self._terms.settings)

    def page_out(self, *, at_once: bool = False) -> PagedOut:
        """A round: note what came back, and page some cold pages of each VM out.

        VMs of low priority come first. `at_once`, for short memory: a whole portion of each
        VM, whatever its pace, and only to zram. Raises nothing of a VM: one that fails is
        dropped.
        """
        if not self._after_s:
            return PagedOut(hindrance="cold_after_s is 0")
        now_s = time.monotonic()
        elapsed_s, self._served_at = min(_LONGEST_S, now_s - self._served_at), now_s
        swap, pressure_percent = read_swap(), memory_pressure_percent()
        hindrance = why_not(swap, self._terms.settings, at_once=at_once)
        vms = [vm for vm in reversed(self._served.now()) if self._is_wanted(vm)]

        def serve(vm: AttachedVm) -> int:
            cold = vm.scan.cold
            if cold is None or vm.scan.state is None:
                return 0  # no pass has ended since it came
            self._note_refaults(vm, cold, now_s, elapsed_s, pressure_percent)
            if hindrance is not None:
                return 0
            pages = PORTION_PAGES if at_once else vm.record.cold_pace.due_pages(elapsed_s)
            return _page_out_of(vm, cold, min(pages, PORTION_PAGES), swap, now_s)

        return PagedOut(sum(self._served.each(vms, serve).values()), hindrance)

    def _note_refaults(
        self,
        vm: AttachedVm,
        cold: ColdAges,
        now_s: float,
        elapsed_s: float,
        pressure_percent: float | None,
    ) -> None:
        """Find out what came back, and set the VM's pace by it."""
        recent = cold.recent(now_s)
        back = recent[are_present(vm.pagemap, vm.space, recent)]
        cold.came_back_soon(back)
        _settle(vm, cold)
        vm.record.cold_pace = next_pace(
            vm.record.cold_pace,
            elapsed_s=elapsed_s,
            refaults=len(back),
            most_refaults_per_s=self._terms.settings.controls.cold_max_refaults,
            pressure_percent=pressure_percent,
        )


def is_left_alone(vm: AttachedVm, settings: Settings) -> bool:
    """Whether the VM's own description, or a setting, says that it is never paged out."""
    policy = vm.identity.policy
    return policy.cold_never or any(fnmatchcase(vm.name, name) for name in settings.cold_never)


def why_not(swap: Swap, settings: Settings, *, at_once: bool = False) -> str | None:
    """Why nothing may be paged out to this swap; `None` if it may. `at_once`: for short memory."""
    if not swap.next_devices:
        return "there is no swap with room; add zram, or a swap file behind zswap"
    if not swap.is_memory and not settings.cold_any_swap:
        return (
            f"swap ({swap.what}) is not memory: use zram or zswap, or set cold_any_swap if it is"
            " fast"
        )
    if at_once and not swap.is_zram:
        return "memory is short, and only zram gives some: other swap counts as there already"
    return None


def _settle(vm: AttachedVm, cold: ColdAges) -> None:
    """Note what the state, as it was last read, has in memory again."""
    if vm.scan.state is not None:
        cold.settle(vm.scan.state.categories & PRESENT != 0)


def _page_out_of(vm: AttachedVm, cold: ColdAges, most_pages: int, swap: Swap, now_s: float) -> int:
    """Page up to so many cold pages of a VM out, the oldest first; returns how many are out."""
    scan = vm.scan
    assert scan.state is not None
    room_bytes = min(swap.free_bytes, swap_left_bytes(vm.pid))
    most_pages = min(most_pages, room_bytes // PAGE_BYTES)
    # What a hazard forbids is examined soon, by whoever watches the VMs.
    if most_pages <= 0 or scan.dirty_tracking is None or vm.disturbed(at_leisure=True):
        return 0
    page = cold.cold(_unique(vm))
    page = page[~in_part(vm.space, page, scan.state.categories[page] & HUGE != 0)]
    page = np.sort(page[:most_pages])
    fit, is_huge = untouched(vm.pagemap, vm.regions, vm.space, page)
    cold.written(page[~fit])
    page = page[fit & ~in_part(vm.space, page, fit & is_huge)]
    if not len(page):
        return 0
    try:
        is_out = page_out(vm.process, vm.pagemap, vm.space, page)
    except OSError as error:
        vm.record.trouble = str(error)
        return 0
    cold.written(page[~is_out])  # in use by others: not tried again in each round
    page = page[is_out]
    forget(scan.columns, page)
    scan.ages.restart(page)
    scan.state.note(page, np.full(len(page), SWAPPED, dtype=np.uint8))
    cold.went_out(page, now_s)
    return len(page)


def _unique(vm: AttachedVm) -> npt.NDArray[np.bool_]:
    """The VM's own pages in memory that were compared with all others, and are like none."""
    state = vm.scan.state
    assert state is not None
    unique = vm.scan.columns.flags & UNSHARED != 0
    unique &= (state.slot == OWN) & (state.categories & PRESENT != 0)
    unique &= swappable(vm.regions, vm.space)
    return np.asarray(unique)
