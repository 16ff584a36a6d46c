"""The looks at one VM's pages: the kernel's state of each, its digest, and its next look.

Owns the columns, ages and agenda of its pages, the mapping state as it was last read, and
dirty tracking. Promises that each state comes from the kernel, at most as old as stated. A
page that came due and was not read counts as written. Changes nothing in the VM.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.core.agenda import Agenda
from vmdedup.core.cold import ColdAges
from vmdedup.core.digest import apart_by_node
from vmdedup.core.plan import vma_count
from vmdedup.core.rmap import BROKEN, KNOWN, OWN, STILL, PageColumns
from vmdedup.core.scan import forget, mark_broken, mark_written, observe
from vmdedup.core.smart_scan import ScanAges
from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.guest.dirty_tracking import DirtyTracking, Written
from vmdedup.guest.huge_pages import blocks_of, huge_blocks, huge_mask
from vmdedup.guest.mapping_state import (
    MappingState,
    note_unmapped,
    read_categories,
    read_mapping_state,
)
from vmdedup.guest.page_reader import digests_at
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import PageVanishedError, address_runs
from vmdedup.inject.in_place import digests_in_place
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.numa import nodes_of
from vmdedup.linux.pagemap import ENTRY_PRESENT, FILE, PFNZERO, PRESENT, SWAPPED, Pagemap
from vmdedup.linux.process import Process
from vmdedup.vm.timings import Totals

_HELD_PAGES = 1 << 18
"""Pages of one piece of a look at all contents: about a quarter of a second."""

_LOOK_PAGES = 16384
"""Pages whose digests are noted at once."""

_DISCARDABLE_PAGES = 1024
"""The same for a guest that gives memory back: few, so that they are read soon after it was
seen that they are there."""

_LONGEST_FOLLOWED_S = 20.0
"""Longest time that passes rely on dirty tracking alone, seconds; then the kernel's whole state
is read again."""
_FRESH_S = 1.0
"""Age up to which the kernel's state is good for a report, or for a look if dirty tracking
tells which pages were written meanwhile; seconds."""
_UNTRACKED_FRESH_S = 0.05
"""Age up to which the kernel's state is good for a look without dirty tracking, seconds."""


@dataclass
class _Rounds:
    """The passes since the kernel's whole state was read."""

    must_refresh: bool = True
    refreshed_at: float = 0.0
    """Time of that read, seconds (time.monotonic)."""
    covered_pages: int | None = None
    """Known pages, counted when first asked for; `None` until then."""


class ScannedVm(Protocol):
    """The parts of a VM that its looks need."""

    name: str
    pid: int
    process: Process
    regions: list[Region]
    space: PageSpace
    pagemap: Pagemap
    totals: Totals
    thread: RemoteThread | None

    @property
    def registered(self) -> npt.NDArray[np.bool_]: ...
    @property
    def may_discard(self) -> bool: ...
    def let_thread_go(self) -> None: ...


class PageScan:
    """The looks at a VM's pages, since it was attached. Close with `stop_dirty_tracking`."""

    dirty_tracking: DirtyTracking | None = None
    cold: ColdAges | None = None
    """Times since the pages were written; `None` while cold pages are not wanted."""

    def __init__(self, vm: ScannedVm, store_dir: Path) -> None:
        self.vm = vm
        self._store_dir = store_dir
        self.columns, self.ages = PageColumns(vm.space.pages), ScanAges(vm.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.blocks = blocks_of(vm.space)
        """Its blocks of 2 MiB."""
        self.state: MappingState | None = None
        self.pages_scanned = 0
        self.seed: int | None = None
        """Seed of the digests in the columns, `None` while there are none."""
        self._least_vmas: int | None = None
        self._rounds = _Rounds()

    def stop_dirty_tracking(self) -> None:
        """Close dirty tracking; from now on every look reads every page."""
        if self.dirty_tracking is not None:
            self.dirty_tracking.close()
            self.dirty_tracking = None

    def owe(self, page: npt.NDArray[np.int64]) -> None:
        """Note pages that came due and were not read: they count as written until they are."""
        mark_written(self.columns, page)
        self.ages.owe(page)

    def start_over(self) -> None:
        """Forget all looks: digests under the seed of a store that is gone mean nothing.

        The kernel's state of the mappings stays known.
        """
        self.columns = PageColumns(self.vm.space.pages)
        self.ages = ScanAges(self.vm.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.seed = None
        self._rounds = replace(self._rounds, covered_pages=None)
        if self.state is not None:
            self._adopt(self.state)

    def consider_all(self) -> None:
        """Have the next pass consider every page, as the registration has changed."""
        self._rounds.must_refresh = True

    def _adopt(self, state: MappingState) -> None:
        """Bring the rmap in line with the kernel's mappings."""
        merged = np.flatnonzero(state.slot != OWN)
        self.columns.slot = state.slot  # one column serves both, the state and the rmap
        mark_broken(self.columns, merged, state.broken_at(merged))

    def refresh(self) -> MappingState:
        """Read the kernel's state and bring the rmap in line with it.

        Raises VmGoneError, RefusedError when the VM maps pages it was never given.
        """
        self.vm.process.require_alive()
        state = read_mapping_state(
            self.vm.name, self.vm.pid, self.vm.space, self.vm.pagemap, self._store_dir
        )
        note_unmapped(self.vm.pid, self.vm.regions, self.vm.space, state)
        if self.state is not None:
            newly = state.broken & (self.columns.flags & BROKEN == 0)
            self.vm.totals.cow_breaks += int(np.count_nonzero(newly))
        came_loose = np.flatnonzero((self.columns.slot != OWN) & (state.slot == OWN))
        self._adopt(state)
        came_home = np.flatnonzero((state.slot == OWN) & (self.columns.flags != 0))
        mark_broken(self.columns, came_home, np.zeros(len(came_home), dtype=np.bool_))
        self.agenda.settle(came_loose)
        self.state = state
        self._least_vmas = None
        self._rounds.refreshed_at = time.monotonic()
        self._rounds.must_refresh = False
        return state

    def freshen(self) -> None:
        """Read which pages exist now. Raises as `refresh`.

        If nothing is merged and the mappings were read a short while ago, it reads nothing
        else.
        """
        state = self.state
        is_known = self._is_known_for(_LONGEST_FOLLOWED_S)
        if state is None or not is_known or (state.slot != OWN).any():
            self.refresh()
            return
        _clear(state.categories, 0xFF)
        read_categories(self.vm.space, self.vm.pagemap, state.categories)
        note_unmapped(self.vm.pid, self.vm.regions, self.vm.space, state)

    def remapped(self) -> None:
        """Have the next pass read the kernel's state again, as mappings were changed."""
        self._rounds.must_refresh = True

    def follows(self) -> bool:
        """Whether the next pass may rely on dirty tracking alone.

        Now and then it must not, as dirty tracking misses discarded pages, and never after
        a remap.
        """
        return self.dirty_tracking is not None and self._is_known_for(_LONGEST_FOLLOWED_S)

    def is_fresh(self) -> bool:
        """Whether a look may rely on the kernel's state as it was read before."""
        if self.dirty_tracking is None:
            return self._is_known_for(_UNTRACKED_FRESH_S)
        return self._is_known_for(_LONGEST_FOLLOWED_S if self._is_told_all else _FRESH_S)

    @property
    def _is_told_all(self) -> bool:
        """Whether dirty tracking is about to report every page that exists.

        It does not report merged pages that were broken and then discarded.
        """
        if self.dirty_tracking is None or not self.dirty_tracking.is_new or self.state is None:
            return False
        return bool((self.state.slot == OWN).all())

    def _is_known_for(self, most_s: float) -> bool:
        known = self.state is not None and not self._rounds.must_refresh
        return known and time.monotonic() - self._rounds.refreshed_at < most_s

    def known_state(self) -> MappingState:
        """The state known from the last pass if it is reliable, else a `refresh`ed one."""
        is_known = self.follows() or self._is_known_for(_FRESH_S)
        return self.state if self.state is not None and is_known else self.refresh()

    def _follow(self, state: MappingState, written: Written) -> None:
        """Bring state and rmap in line with the written pages, without reading the rest."""
        state.note(written.page, written.categories)
        if self.cold is not None:
            self.cold.written(written.page[written.categories & PRESENT != 0])
        merged = written.page[state.slot[written.page] != OWN]
        broken = state.broken_at(merged)
        newly = broken & (self.columns.flags[merged] & BROKEN == 0)
        self.vm.totals.cow_breaks += int(np.count_nonzero(newly))
        mark_broken(self.columns, merged, broken)

    def huge_blocks(self) -> npt.NDArray[np.bool_] | None:
        """Which blocks are huge pages, by the state last read; `None` if that is not known."""
        return None if self.state is None else huge_blocks(self.vm.pagemap, self.blocks, self.state)

    def readable(self, state: MappingState, page: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each page (ascending) may be read and merged: in memory, and the VM's own.

        In private regions only anonymous pages count: a page that still shows the
        backing file belongs to the page cache, and merging it would free nothing.
        """
        categories = state.categories[page]
        present = (categories & (PRESENT | SWAPPED)) == PRESENT
        anonymous = (categories & (FILE | PFNZERO)) == 0
        mine = state.slot[page] == OWN
        for index, region in enumerate(self.vm.regions):
            inside = self.vm.space.slice_of(index)
            where = slice(*np.searchsorted(page, (inside.start, inside.stop)).tolist())
            if not region.share:
                mine[where] &= anonymous[where]
            elif region.ram_fd is None:
                # Its RAM file is reachable only through a mapping: leave one.
                mine[where] &= page[where] != inside.stop - 1
        return np.asarray(present & (mine | state.broken_at(page)))

    def pages_to_look(
        self, *, smart: bool, follow: bool, everywhere: bool, spare_huge: bool = False
    ) -> npt.NDArray[np.int64]:
        """The pages of one look: readable ones that may have changed.

        Without dirty tracking these are all readable pages. `smart`: pages that stayed
        unique are passed over now and then (KSM's smart_scan), and unless `everywhere` so
        is memory that has long been known. `follow` (only when `follows`) considers only
        the pages that dirty tracking reports, else the known state must be fresh (`is_fresh`).
        `spare_huge`: huge pages are not tracked, as that would split them.
        """
        state, tracking = self.state, self.dirty_tracking
        assert state is not None
        if tracking is None:
            page = np.arange(self.vm.space.pages)
            return self._due(state, page, None, np.zeros_like(page), smart=smart)
        huge = huge_mask(self.vm.pagemap, state) if spare_huge else None
        if self._is_told_all:
            _clear(state.categories, PRESENT)
        written = tracking.take_written(
            everywhere=everywhere or not (follow and smart), huge=huge, hurry=everywhere
        )
        if written is None:
            return np.empty(0, dtype=np.int64)
        self._follow(state, written)
        page = written.page
        if not follow:
            page = np.arange(self.vm.space.pages)
            self._rounds.covered_pages = None
        if huge is not None:
            page = page[tracking.rounds(page) > 0]
        if follow or huge is not None:
            page = self.agenda.with_open(page, tracking.rounds(self.agenda.open) > 0)
        due = self._due(state, page, written.page, tracking.rounds(page) - 1, smart=smart)
        tracking.renew(due[self.columns.flags[due] & KNOWN == 0])
        return due

    def _due(
        self,
        state: MappingState,
        page: npt.NDArray[np.int64],
        written: npt.NDArray[np.int64] | None,
        missed: npt.NDArray[np.int64],
        *,
        smart: bool,
    ) -> npt.NDArray[np.int64]:
        """The considered pages that are to be read now, see `Agenda.due`."""
        return self.agenda.due(
            page,
            readable=self.readable(state, page) & self.vm.registered[page],
            own=state.slot[page] == OWN,
            written=written,
            missed=missed,
            smart=smart,
        )

    def covered_pages(self) -> int:
        """Pages that the last pass over all pages covered, read or spared."""
        if self._rounds.covered_pages is None or self.dirty_tracking is None:
            self._rounds.covered_pages = int(np.count_nonzero(self.columns.flags & KNOWN))
        return self._rounds.covered_pages

    def look(
        self,
        page: npt.NDArray[np.int64],
        seed: int,
        *,
        by_node: bool = False,
        compared_next: bool = False,
    ) -> None:
        """Read and digest these pages.

        `by_node`: keep digests apart for each NUMA node; `compared_next`: see `observe`.
        """
        at_once = _DISCARDABLE_PAGES if self.vm.may_discard else _LOOK_PAGES
        for first in range(0, len(page), at_once):
            some = page[first : first + at_once]
            if self.vm.may_discard:
                some = self._still_there(some)
            self._look_at(some, seed, by_node=by_node, compared_next=compared_next)
        self.pages_scanned += len(page)

    def _still_there(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The pages that are still present, of those that were; forgets the others.

        SAFETY: reading a page of a file that was discarded since would allocate it again, in
        memory that the guest has given back. One that is discarded from here on still can.
        """
        is_there = self._is_there(page)
        forget(self.columns, page[~is_there])
        return np.asarray(page[is_there])

    def _is_there(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        entries = self.vm.pagemap.entries_of(*address_runs(self.vm.space.hva(page)))
        return np.asarray(entries & ENTRY_PRESENT != 0)

    def digests(self, page: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
        """Digests of these pages as the guest sees them now: uint64, shape (n,).

        Raises PageVanishedError when one is not mapped, VmGoneError.
        """
        digest, is_read = digests_at(self.vm.name, self.vm.pid, self.vm.space.hva(page), seed)
        if not is_read.all():
            raise PageVanishedError(int(is_read.argmin()))
        return digest

    def held_digests(
        self, seed: int
    ) -> Generator[None, None, tuple[MappingState, npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
        """The state now, all pages in memory that may be merged or are, and their digests.

        Stops after each piece, so that other work can go on. Pages that share the zero page
        are not among them, nor those that went meanwhile. Raises as `refresh`, VmGoneError.
        """
        state = self.refresh()
        every = np.arange(self.vm.space.pages)
        page = np.flatnonzero(self.readable(state, every) | state.merged)
        pages, digests = [page[:0]], [np.empty(0, dtype=np.uint64)]
        at_once = _DISCARDABLE_PAGES if self.vm.may_discard else _HELD_PAGES
        for first in range(0, len(page), at_once):
            some = page[first : first + at_once]
            # SAFETY: as in `_still_there`. Reading a store page allocates nothing.
            some = some[state.merged[some] | self._is_there(some)]
            digest, is_read = digests_at(self.vm.name, self.vm.pid, self.vm.space.hva(some), seed)
            pages.append(some[is_read])
            digests.append(digest[is_read])
            yield
        self.vm.process.require_alive()
        return state, np.concatenate(pages), np.concatenate(digests)

    def _look_at(
        self, page: npt.NDArray[np.int64], seed: int, *, by_node: bool, compared_next: bool
    ) -> None:
        digest, is_read = self._digests_at(self.vm.space.hva(page), seed)
        if not is_read.all():
            self.vm.process.require_alive()
            forget(self.columns, page[~is_read])
            page, digest = page[is_read], digest[is_read]
        if len(page):
            if by_node:
                digest = apart_by_node(digest, self._nodes(page), seed)
            before = self.columns.flags[page]
            observe(self.columns, page, digest, compared_next=compared_next)
            self.agenda.observed(page, before)
            if self.cold is not None:
                self.cold.written(page[self.columns.flags[page] & STILL == 0])

    def _digests_at(
        self, address: npt.NDArray[np.int64], seed: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Digests of these pages, and which are valid; in place while a thread is borrowed."""
        if self.vm.thread is not None:
            try:
                digest = digests_in_place(self.vm.thread, self.vm.thread.run, address, seed)
            except InjectionError:
                self.vm.let_thread_go()
            else:
                return digest, np.ones(len(address), dtype=np.bool_)
        return digests_at(self.vm.name, self.vm.pid, address, seed)

    def _nodes(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        try:
            return nodes_of(self.vm.pid, self.vm.space.hva(page))
        except OSError as error:
            self.vm.process.require_alive()
            raise VmGoneError(
                self.vm.name, f"asking for its NUMA nodes: {error}", pid=self.vm.pid
            ) from error

    @property
    def least_vmas(self) -> int:
        """Fewest VMAs that the kernel needs for guest RAM, by the state last read."""
        assert self.state is not None
        if self._least_vmas is None:
            self._least_vmas = vma_count(self.state.slot, self.vm.space.first_page)
        return self._least_vmas


def _clear(categories: npt.NDArray[np.uint8], which: int) -> None:
    """Take pages that have any of these categories for absent."""
    # Elements that are `0` already may be untouched memory: do not write to them.
    categories[categories & which != 0] = 0
