"""The looks at one VM's pages: what the kernel says of each, what it held, and when to look.

Owns the columns, ages and agenda of its pages, the mapping state as it was last read, and
dirty tracking. Promises that each state is the kernel's word, at most as old as is said, and
that a page which came due and was not read counts as written. Changes nothing in the VM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.attach.ranges import Region
from vmdedup.core.agenda import Agenda
from vmdedup.core.digest import apart_by_node
from vmdedup.core.plan import vma_count
from vmdedup.core.rmap import BROKEN, KNOWN, OWN, PageColumns
from vmdedup.core.scan import forget, mark_broken, mark_written, observe
from vmdedup.core.smart_scan import ScanAges
from vmdedup.errors import InjectionError, VmGoneError
from vmdedup.guest.dirty_tracking import DirtyTracking, Written
from vmdedup.guest.mapping_state import (
    MappingState,
    note_unmapped,
    read_categories,
    read_mapping_state,
)
from vmdedup.guest.page_reader import digests_at
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import PageVanishedError
from vmdedup.inject.in_place import digests_in_place
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.numa import nodes_of
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, Pagemap
from vmdedup.linux.process import Process
from vmdedup.vm.timings import Totals

_LOOK_PAGES = 16384
"""Pages whose digests are noted at once."""

_LONGEST_FOLLOWED_S = 20.0
"""How long rounds go by the dirty tracking alone before the kernel's whole state is read again."""
_FRESH_S = 1.0
"""How long that is as good as read anew, for a report or where dirty tracking tells what was
written meanwhile."""
_UNTRACKED_FRESH_S = 0.05
"""And for a look where nothing does."""


@dataclass
class _Rounds:
    """Of the rounds since the kernel's whole state was read."""

    must_refresh: bool = True
    refreshed_at: float = 0.0
    """time.monotonic"""
    covered_pages: int | None = None
    """Known pages, counted when it is asked for."""


class ScannedVm(Protocol):
    """What a scan needs of its VM."""

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
    def let_thread_go(self) -> None: ...


class PageScan:
    """The looks at a VM's pages, from the attaching on. Close with `stop_dirty_tracking`."""

    dirty_tracking: DirtyTracking | None = None

    def __init__(self, vm: ScannedVm, store_dir: Path) -> None:
        self.vm = vm
        self._store_dir = store_dir
        self.columns, self.ages = PageColumns(vm.space.pages), ScanAges(vm.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.state: MappingState | None = None
        self.pages_scanned = 0
        self.seed: int | None = None
        """Seed of the digests in the columns, `None` while there are none."""
        self._least_vmas: int | None = None
        self._rounds = _Rounds()

    def stop_dirty_tracking(self) -> None:
        """Close the dirty tracking; from now on every look reads every page."""
        if self.dirty_tracking is not None:
            self.dirty_tracking.close()
            self.dirty_tracking = None

    def owe(self, page: npt.NDArray[np.int64]) -> None:
        """These pages came due and were not read: they count as written until they are."""
        mark_written(self.columns, page)
        self.ages.owe(page)

    def start_over(self) -> None:
        """Forget all looks: digests taken under the seed of a store that went mean nothing.

        What the kernel has said of the mappings stays known.
        """
        self.columns = PageColumns(self.vm.space.pages)
        self.ages = ScanAges(self.vm.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.seed = None
        self._rounds = replace(self._rounds, covered_pages=None)
        if self.state is not None:
            self._adopt(self.state)

    def consider_all(self) -> None:
        """What is registered has changed: the next round considers every page."""
        self._rounds.must_refresh = True

    def _adopt(self, state: MappingState) -> None:
        """Bring the rmap in line with the kernel's mappings."""
        merged = np.flatnonzero(state.slot != OWN)
        self.columns.slot = state.slot  # one column for both: the state's is as the rmap's
        mark_broken(self.columns, merged, state.broken_at(merged))

    def refresh(self) -> MappingState:
        """Read the kernel's state and bring the rmap in line with it.

        Raises VmGoneError, RefusedError when the VM maps what it was never given.
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
        """Know which pages are there now. Raises as `refresh`.

        Where nothing is merged and mappings have been read a short while ago, nothing
        else is read anew.
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
        """Mappings of it were changed: the next round reads the kernel's state anew."""
        self._rounds.must_refresh = True

    def follows(self) -> bool:
        """Whether the next round may go by what the dirty tracking tells.

        Now and then it must not, as dirty tracking misses discarded pages, and never after
        something was remapped.
        """
        return self.dirty_tracking is not None and self._is_known_for(_LONGEST_FOLLOWED_S)

    def is_fresh(self) -> bool:
        """Whether a look may go by the kernel's state as it was read before."""
        if self.dirty_tracking is None:
            return self._is_known_for(_UNTRACKED_FRESH_S)
        return self._is_known_for(_LONGEST_FOLLOWED_S if self._is_told_all else _FRESH_S)

    @property
    def _is_told_all(self) -> bool:
        """Whether dirty tracking is about to tell of every page that is there.

        Of merged pages it does not tell which were broken and then discarded.
        """
        if self.dirty_tracking is None or not self.dirty_tracking.is_new or self.state is None:
            return False
        return bool((self.state.slot == OWN).all())

    def _is_known_for(self, most_s: float) -> bool:
        known = self.state is not None and not self._rounds.must_refresh
        return known and time.monotonic() - self._rounds.refreshed_at < most_s

    def known_state(self) -> MappingState:
        """The state as the last round knew it, where that can be relied on, else `refresh`ed."""
        is_known = self.follows() or self._is_known_for(_FRESH_S)
        return self.state if self.state is not None and is_known else self.refresh()

    def _follow(self, state: MappingState, written: Written) -> None:
        """Bring state and rmap in line with what was written, without reading the rest."""
        state.note(written.page, written.categories)
        merged = written.page[state.slot[written.page] != OWN]
        broken = state.broken_at(merged)
        newly = broken & (self.columns.flags[merged] & BROKEN == 0)
        self.vm.totals.cow_breaks += int(np.count_nonzero(newly))
        mark_broken(self.columns, merged, broken)

    def readable(self, state: MappingState, page: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these pages (ascending) may be read and merged: in memory, and its own.

        Private regions count only anonymous pages: a page that still shows the
        backing file is the page cache's, and merging it would free nothing.
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
        self, *, smart: bool, follow: bool, everywhere: bool
    ) -> npt.NDArray[np.int64]:
        """The pages of one look of the scan: readable ones that may have changed.

        Without dirty tracking that is every one. `smart`: those that stayed unique
        are passed over now and then (KSM's smart_scan), and unless `everywhere` so is
        memory that has long been known. `follow` (only when `follows`) goes by what
        dirty tracking tells alone, else what is known `is_fresh`.
        """
        state, tracking = self.state, self.dirty_tracking
        assert state is not None
        if tracking is None:
            page = np.arange(self.vm.space.pages)
            return self._due(state, page, None, np.zeros_like(page), smart=smart)
        if self._is_told_all:
            _clear(state.categories, PRESENT)
        written = tracking.take_written(everywhere=everywhere or not (follow and smart))
        if written is None:
            return np.empty(0, dtype=np.int64)
        self._follow(state, written)
        if follow:
            asked = tracking.rounds(self.agenda.open) > 0
            page = self.agenda.with_open(written.page, asked)
        else:
            page = np.arange(self.vm.space.pages)
            self._rounds.covered_pages = None
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
        """Those of the considered pages that are to be read now, see `Agenda.due`."""
        return self.agenda.due(
            page,
            readable=self.readable(state, page) & self.vm.registered[page],
            own=state.slot[page] == OWN,
            written=written,
            missed=missed,
            smart=smart,
        )

    def covered_pages(self) -> int:
        """Pages that a round speaks of, read or spared, when last all were considered."""
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

        `by_node`: apart for each NUMA node they lie on; `compared_next`: see `observe`.
        """
        for first in range(0, len(page), _LOOK_PAGES):
            some = page[first : first + _LOOK_PAGES]
            self._look_at(some, seed, by_node=by_node, compared_next=compared_next)
        self.pages_scanned += len(page)

    def digests(self, page: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
        """Digests of these pages as the guest sees them now: uint64, shape (n,).

        Raises PageVanishedError when one is not mapped, VmGoneError.
        """
        digest, is_read = digests_at(self.vm.name, self.vm.pid, self.vm.space.hva(page), seed)
        if not is_read.all():
            raise PageVanishedError(int(is_read.argmin()))
        return digest

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

    def _digests_at(
        self, address: npt.NDArray[np.int64], seed: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Digests of these pages, and which there are: in place while we have its thread."""
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
        """VMAs that the kernel could do with for guest RAM, as it was last read."""
        assert self.state is not None
        if self._least_vmas is None:
            self._least_vmas = vma_count(self.state.slot, self.vm.space.first_page)
        return self._least_vmas


def _clear(categories: npt.NDArray[np.uint8], which: int) -> None:
    """Take what has any of these categories for absent."""
    # What is 0 already may be memory that nobody has touched.
    categories[categories & which != 0] = 0
