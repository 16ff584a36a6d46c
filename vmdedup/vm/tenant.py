"""A tenant: one attached VM, and all that is kept about it between passes.

Owns the VM's monitor, pinned process, page space, rmap columns and cumulative
timings, and the looks at its pages. Promises that closing leaves nothing of ours
in the QEMU but its merges. Refuses at construction what the hazard table or the
domain rules refuse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.attach.discover import Attachment
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.ranges import Region, find_backends, find_regions
from vmdedup.attach.storage import Storage
from vmdedup.core.agenda import Agenda
from vmdedup.core.digest import apart_by_node
from vmdedup.core.plan import vma_count
from vmdedup.core.rmap import BROKEN, KNOWN, OWN, PageColumns
from vmdedup.core.scan import forget, mark_broken, mark_written, observe
from vmdedup.core.smart_scan import ScanAges
from vmdedup.errors import InjectionError, MonitorError, RefusedError, VmError, VmGoneError
from vmdedup.guest.dirty_tracking import ChangeTracker, Written
from vmdedup.guest.large_folios import NOTHING_KEPT
from vmdedup.guest.mapping_state import (
    HELD,
    MappingState,
    note_unmapped,
    read_categories,
    read_mapping_state,
)
from vmdedup.guest.page_reader import digests_at
from vmdedup.guest.page_space import PageSpace
from vmdedup.guest.vm_readv import PageVanishedError
from vmdedup.inject.in_place import digests_in_place
from vmdedup.inject.remote import Landmarks, RemoteThread
from vmdedup.linux.maps import is_merged_onto, read_maps
from vmdedup.linux.numa import nodes_of
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, Pagemap, has_pagemap_scan
from vmdedup.linux.smaps import flagged_vmas
from vmdedup.models import BackendListing
from vmdedup.policy import registry
from vmdedup.policy.domains import ZERO_ONLY, domain_of
from vmdedup.policy.hazards import (
    Finding,
    Verdict,
    examine,
    refused_backends,
    verdict,
    zero_only,
)
from vmdedup.policy.watch import Watch, halted_by
from vmdedup.settings import DomainRule, Settings
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.timings import Totals

_LOOK_PAGES = 16384
"""Pages whose digests are noted at once."""

_LONGEST_FOLLOWED_S = 20.0
"""How long rounds go by the change tracker alone before the kernel's whole state is read again."""
_FRESH_S = 1.0
"""How long that is as good as read anew, for a report or where change tracking tells what was
written meanwhile."""
_UNTRACKED_FRESH_S = 0.05
"""And for a look where nothing does."""


_QEMU_DEFAULT_FLAGS = frozenset({"dc", "hg", "mg"})
"""What QEMU sets on guest RAM (softmmu/physmem.c: ram_block_add, qemu_ram_setup_dump)."""


MEMORY_CHANGED = "its memory changed"
"""What `Tenant.changed` says of other memory, plugged or unplugged."""

Lend = Callable[[int, str], int]
"""Gives QEMU a copy of a descriptor, for a purpose; returns its number there."""


@dataclass
class _Rounds:
    """Of the rounds since the kernel's whole state was read."""

    must_refresh: bool = True
    refreshed_at: float = 0.0
    """time.monotonic"""
    covered_pages: int | None = None
    """Known pages, counted when it is asked for."""
    seed: int | None = None
    """Of the digests in the columns, None while there are none."""


class Tenant:
    """An attached VM. Raises RefusedError or another VmError when it can not be one.

    Takes ownership of the attachment, also when it raises. With `refuse` False a
    VM that must not be merged is taken all the same, to report or unmerge it, and
    `refusal` says why. `by_hand`: backends registered in spite of their merge=off.
    """

    tracker: ChangeTracker | None = None
    thread: RemoteThread | None = None
    """Borrowed over several stages of a hurried round, see `sessions.borrowed`."""
    _lent: Sequence[int] = ()
    """Descriptor sets that QEMU has of us."""
    _is_otherwise = False
    """Whether the last examination found it so changed that it must be taken in anew."""
    crowded: str | None = None
    """Why it has more mappings than it should, None when it has not."""
    waiting_pages = 0
    """Pages that have an equal and wait for room in the store."""
    leaving = False
    """Whether it is to be unmerged before anything else: it must not share as it does."""
    left_reason: str | None = None
    """Why the last unmerge left pages merged."""
    resting = False
    """Unmerged on request: neither scanned nor merged until somebody asks for it."""
    cache_freed_at = -math.inf
    """When memory that a filesystem kept of merged pages was last tried to be freed
    (time.monotonic)."""
    trouble: str | None = None
    """Why the last pass ended early on this VM."""
    kept = NOTHING_KEPT
    """What large folios keep of the memory that its merged pages had."""
    kept_since = 0.0
    """When that was found, by the monotonic clock."""
    may_hold_userfaults = True
    """Whether a userfaultfd that was made in QEMU for us, by whomever, may be left there."""

    def __init__(
        self,
        attachment: Attachment,
        settings: Settings,
        *,
        refuse: bool = True,
        by_hand: Collection[str] = (),
    ) -> None:
        self._attachment = attachment
        self.by_hand = frozenset(by_hand)
        self.monitor = attachment.monitor
        self.process = attachment.process
        self.identity = attachment.identity
        self.name = attachment.identity.name
        self.pid = attachment.identity.pid
        self._settings = settings
        self._exits = ExitStack()
        self._exits.callback(attachment.close)
        try:
            self._watch = Watch(self.monitor, self.process)
            self.storage = Storage(self.monitor)
            self.backends = find_backends(self.monitor)
            found, left_alone = find_regions(self.monitor, self.process, by_hand)
            self.findings = self._examined(found)
            self._first_reasons = {finding.reason for finding in self.findings}
            refused = refused_backends(self.findings)
            self.regions = [region for region in found if region.backend not in refused]
            named = [(name, self.monitor.in_own_words("", why)) for name, why in left_alone]
            self.left_alone = [*named, *refused.items()]
            self.domain: str | None = None
            self.refusal_key = "other"
            self.refusal = self._refusal()
            if self.refusal is not None and (refuse or not self.regions):
                raise RefusedError(self.name, self.refusal, pid=self.pid, key=self.refusal_key)
            self.space = PageSpace(self.regions)
            use_scan = settings.has("pagemap-scan") and has_pagemap_scan()
            self.pagemap = Pagemap(self.name, self.pid, use_scan=use_scan)
            self._exits.callback(self.pagemap.close)
            self.region_flags = [self._flags_of(region) for region in self.regions]
        except BaseException:
            self._exits.close()
            raise
        self.columns, self.ages = PageColumns(self.space.pages), ScanAges(self.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.totals, self.landmarks = Totals(), Landmarks()
        self._registration = registry.first_registration(self.name, self.registrable())
        self._registered = self._registered_mask()
        self._why_stopped = self._stop_hint()
        self.live = self._why_stopped is None
        self.state: MappingState | None = None
        self._least_vmas: int | None = None
        self.deferred = np.empty(0, dtype=np.int64)
        self.needed_max_map_count: int | None = None
        self.missed_pages = self.pages_scanned = self.passes = 0
        self._rounds = _Rounds()

    @property
    def left_to_unmerge_pages(self) -> int:
        """Pages that are to be unmerged and are not yet, as far as is known."""
        if self.state is None or not (self.resting or self.leaving):
            return 0
        return int(np.count_nonzero(self.state.slot != OWN))

    @property
    def leaves_domain(self) -> str | None:
        """The trust domain whose pages it still shares though it is in it no more, if any."""
        is_moving = self.refusal is None or self.refusal_key == "domain"
        if self.state is None or not self.leaving or not is_moving:
            return None
        stores = {store.domain or "unknown" for store in self.state.stores} - {self.domain}
        return ", ".join(sorted(stores)) or None

    def close(self) -> None:
        """Let go of the VM; its merges stay. Idempotent."""
        self.let_thread_go()
        self.stop_tracking()
        self._exits.close()

    def let_thread_go(self) -> None:
        """Remove the scratch memory of a thread that we have borrowed over several stages.

        Where that can not be now, the next session does it.
        """
        thread, self.thread = self.thread, None
        if thread is not None:
            with suppress(VmError):
                thread.close()

    def stop_tracking(self) -> None:
        """Close the change tracker; from now on every look reads every page."""
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None

    @property
    def hindrance(self) -> str | None:
        """Why nothing can be merged on it now, though it lives and may be; None if nothing."""
        return self.monitor.outage or self.storage.away

    @property
    def failure(self) -> str | None:
        """Why nothing is merged on it, though it is to be: an error; None if there was none."""
        if self.resting or self.refusal is not None:
            return None
        reason = self.hindrance or self.trouble
        if reason is None or (self.state is not None and (self.state.slot != OWN).any()):
            return None
        return reason

    @property
    def hint(self) -> str | None:
        """What would have it merged better, in one line; None if nothing is known."""
        stopped = [] if self._why_stopped is None else [self._why_stopped]
        return "; ".join(zero_only(self.findings) + stopped) or None

    def fall_back(self, why: str) -> None:
        """From now on this VM is merged only while stopped."""
        self.live = False
        self._why_stopped = why

    def owe(self, page: npt.NDArray[np.int64]) -> None:
        """These pages came due and were not read: they count as written until they are."""
        mark_written(self.columns, page)
        self.ages.owe(page)

    def disturbed(self, *, at_leisure: bool = False) -> bool:
        """Whether it must be taken in anew (`changed`) before it is merged: a cheap look.

        `at_leisure` a cheaper one, for when it is not about to be merged. Raises VmError
        when the VM can not be asked.
        """
        return self._is_otherwise or self.has_news(at_leisure=at_leisure)

    def has_news(self, *, at_leisure: bool = False) -> bool:
        """Whether anything may have changed since it was last examined; see `disturbed`."""
        return self._watch.has_news(at_leisure=at_leisure)

    def changed(self) -> str | None:
        """What is no more as it was at attaching, in one line; None when nothing is.

        `findings` are then those of now. Raises VmError when the VM can not be asked.
        """
        halted = halted_by(self.process, self.process.status())
        if halted is not None:
            why = f"it does not run ({halted}); goes on when it does"
            raise RefusedError(self.name, why, pid=self.pid, key="halted")
        self._watch.settle()
        self.storage.find_disks()
        found, _ = find_regions(self.monitor, self.process, self.by_hand)
        findings = self._examined(found)
        refused = refused_backends(findings)
        regions = [region for region in found if region.backend not in refused]
        self.findings = findings
        if [_place(region) for region in regions] != [_place(region) for region in self.regions]:
            reason: str | None = MEMORY_CHANGED
        else:
            new = [found for found in findings if found.reason not in self._first_reasons]
            restricting = (Verdict.ZERO_ONLY, *(each for each in Verdict if each >= Verdict.PAUSE))
            blocking = [found.reason for found in new if found.verdict in restricting]
            if self.domain == ZERO_ONLY:
                blocking += self._why_not_zero_only()
            reason = "; ".join(blocking) or None
        self._is_otherwise = reason is not None
        return reason

    def _why_not_zero_only(self) -> list[str]:
        """Why merging zero pages alone is not what it gets any more, in a line, if it is not."""
        try:
            if self.domain_by(self._settings.domains) == ZERO_ONLY:
                return []
        except RefusedError as error:
            return [error.reason]
        return ["more than zero pages may be merged now"]

    def _examined(self, regions: list[Region]) -> list[Finding]:
        """What the hazard table finds, in the words of whoever set the VM up."""
        return [
            replace(found, reason=self.monitor.in_own_words(found.key, found.reason))
            for found in examine(
                self.monitor,
                self.process,
                regions,
                drain_trusted=self._settings.drain_trusted,
            )
        ]

    def ask_balloon(self) -> None:
        """Know anew how much its balloon has; what was known stays where it does not answer."""
        with suppress(VmError):
            self._watch.ask_balloon()

    def ballooned_pages(self, state: MappingState) -> int:
        """How many pages that stand merged its balloon has, at least.

        The others that it has are among those that are absent, or not of our regions.
        """
        balloon = self._watch.balloon
        if balloon is None:
            return 0
        others = max(0, balloon.ram_bytes // PAGE_BYTES - self.space.pages)
        absent = np.count_nonzero((state.slot == OWN) & (state.categories & HELD == 0))
        return max(0, balloon.pages - others - int(absent))

    def use_policy(self, policy: VmPolicy) -> None:
        """Take over what the VM's own description says now; `domain` stays what it was."""
        self.identity = replace(self.identity, policy=policy)
        self._attachment = replace(self._attachment, identity=self.identity)

    def give_up(self) -> Attachment:
        """Close everything but the attachment, and hand that back."""
        self.let_thread_go()
        self.stop_tracking()
        self.pagemap.close()
        self._exits.pop_all()
        return self._attachment

    def use_seed(self, seed: int) -> None:
        """Digests are taken under this seed from now on; what another one gave is forgotten."""
        if self._rounds.seed not in (None, seed):
            self.start_over()
        self._rounds.seed = seed

    def start_over(self) -> None:
        """Forget all looks: digests taken under the seed of a store that went mean nothing.

        What the kernel has said of the mappings stays known.
        """
        self.columns = PageColumns(self.space.pages)
        self.ages = ScanAges(self.space.pages)
        self.agenda = Agenda(self.columns, self.ages)
        self.passes = self.waiting_pages = 0
        self._rounds = replace(self._rounds, covered_pages=None, seed=None)
        if self.state is not None:
            self._adopt(self.state)

    def _adopt(self, state: MappingState) -> None:
        """Bring the rmap in line with the kernel's mappings."""
        merged = np.flatnonzero(state.slot != OWN)
        self.columns.slot = state.slot  # one column for both: the state's is as the rmap's
        mark_broken(self.columns, merged, state.broken_at(merged))

    def backend_listings(self) -> list[BackendListing]:
        """All memory backends, those that are not merged with the reason."""
        reasons = dict(self.left_alone)
        return [
            BackendListing(
                id=each.id,
                kind=each.kind,
                size_bytes=each.size_bytes,
                share=each.share,
                mergeable=each.id not in reasons,
                reason=reasons.get(each.id),
            )
            for each in self.backends
        ]

    def registrable(self) -> list[registry.Backend]:
        """The backends as the registry knows them."""
        reasons = dict(self.left_alone)
        return [
            registry.Backend(
                each.id,
                each.size_bytes // PAGE_BYTES,
                each.merge or each.id in self.by_hand,
                reasons.get(each.id),
            )
            for each in self.backends
        ]

    @property
    def registration(self) -> registry.Registration:
        """What is registered for merging; when it changes the next round considers every page."""
        return self._registration

    @registration.setter
    def registration(self, registration: registry.Registration) -> None:
        self._registration = registration
        self._registered = self._registered_mask()
        self._rounds.must_refresh = True

    def _registered_mask(self) -> npt.NDArray[np.bool_]:
        """Which pages of the page space are registered for merging."""
        mask = self._registration.mask([(region.backend, region.pages) for region in self.regions])
        # Nearly always all of them, which takes no byte a page to say.
        return np.broadcast_to(np.True_, mask.shape) if mask.all() else mask

    def domain_by(self, rules: Sequence[DomainRule]) -> str:
        """Its trust domain by these rules and by what was found on it. Raises RefusedError."""
        domain = domain_of(self.identity, rules)
        return ZERO_ONLY if zero_only(self.findings) else domain

    def _refusal(self) -> str | None:
        """Why this VM must not be merged, None when it may be."""
        try:
            self.domain = self.domain_by(self._settings.domains)
        except RefusedError as error:
            self.refusal_key = error.key
            return error.reason
        blocking = [
            finding
            for finding in self.findings
            if finding.verdict >= Verdict.PAUSE and finding.backend is None
        ]
        if blocking:
            self.refusal_key = max(blocking, key=lambda finding: finding.verdict).key
            return "; ".join(finding.reason for finding in blocking)
        if not self.regions:
            self.refusal_key = "no-memory"
            reasons = [f"{backend}: {reason}" for backend, reason in self.left_alone]
            return f"no mergeable memory ({'; '.join(reasons) or 'it has no memory backend'})"
        return None

    def _stop_hint(self) -> str | None:
        """Why this VM can not be merged live, None when it can."""
        if not self._settings.has("userfaultfd-wp"):
            return "merged only while stopped: userfaultfd write protection is masked"
        if verdict(self.findings) == Verdict.STOP_ONLY:
            reasons = [f.reason for f in self.findings if f.verdict == Verdict.STOP_ONLY]
            return "merged only while stopped: " + "; ".join(reasons)
        return None

    def _flags_of(self, region: Region) -> frozenset[str]:
        """VmFlags that QEMU had set on the region, from a mapping that is still its own."""
        inside = read_maps(self.name, self.pid).within(region.start, region.end)
        ours = {
            start
            for start, path in zip(inside.start.tolist(), inside.path, strict=True)
            if is_merged_onto(path)
        }
        for vma in flagged_vmas(self.name, self.pid):
            if vma.start >= region.end:
                break
            if vma.end > region.start and vma.start not in ours:
                return vma.flags
        flags = _QEMU_DEFAULT_FLAGS
        return flags if region.dump else flags | {"dd"}

    def refresh(self) -> MappingState:
        """Read the kernel's state and bring the rmap in line with it.

        Raises VmGoneError, RefusedError when the VM maps what it was never given.
        """
        self.process.require_alive()
        state = read_mapping_state(
            self.name, self.pid, self.space, self.pagemap, self._settings.store_dir
        )
        note_unmapped(self.pid, self.regions, self.space, state)
        if self.state is not None:
            newly = state.broken & (self.columns.flags & BROKEN == 0)
            self.totals.cow_breaks += int(np.count_nonzero(newly))
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
        read_categories(self.space, self.pagemap, state.categories)
        note_unmapped(self.pid, self.regions, self.space, state)

    def remapped(self) -> None:
        """Mappings of it were changed: the next round reads the kernel's state anew."""
        self._rounds.must_refresh = True

    def follows(self) -> bool:
        """Whether the next round may go by what the change tracker tells.

        Now and then it must not, as the tracker misses discarded pages, and never after
        something was remapped.
        """
        return self.tracker is not None and self._is_known_for(_LONGEST_FOLLOWED_S)

    def is_fresh(self) -> bool:
        """Whether a look may go by the kernel's state as it was read before."""
        if self.tracker is None:
            return self._is_known_for(_UNTRACKED_FRESH_S)
        return self._is_known_for(_LONGEST_FOLLOWED_S if self._is_told_all else _FRESH_S)

    @property
    def _is_told_all(self) -> bool:
        """Whether the tracker is about to tell of every page that is there.

        Of merged pages it does not tell which were broken and then discarded.
        """
        if self.tracker is None or not self.tracker.is_new or self.state is None:
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
        self.totals.cow_breaks += int(np.count_nonzero(newly))
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
        for index, region in enumerate(self.regions):
            inside = self.space.slice_of(index)
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

        Without change tracking that is every one. `smart`: those that stayed unique
        are passed over now and then (KSM's smart_scan), and unless `everywhere` so is
        memory that has long been known. `follow` (only when `follows`) goes by what the
        tracker tells alone, else what is known `is_fresh`.
        """
        state, tracker = self.state, self.tracker
        assert state is not None
        if tracker is None:
            page = np.arange(self.space.pages)
            return self._due(state, page, None, np.zeros_like(page), smart=smart)
        if self._is_told_all:
            _clear(state.categories, PRESENT)
        written = tracker.take_written(everywhere=everywhere or not (follow and smart))
        if written is None:
            return np.empty(0, dtype=np.int64)
        self._follow(state, written)
        if follow:
            asked = tracker.rounds(self.agenda.open) > 0
            page = self.agenda.with_open(written.page, asked)
        else:
            page = np.arange(self.space.pages)
            self._rounds.covered_pages = None
        due = self._due(state, page, written.page, tracker.rounds(page) - 1, smart=smart)
        tracker.renew(due[self.columns.flags[due] & KNOWN == 0])
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
            readable=self.readable(state, page) & self._registered[page],
            own=state.slot[page] == OWN,
            written=written,
            missed=missed,
            smart=smart,
        )

    def covered_pages(self) -> int:
        """Pages that a round speaks of, read or spared, when last all were considered."""
        if self._rounds.covered_pages is None or self.tracker is None:
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
        digest, is_read = digests_at(self.name, self.pid, self.space.hva(page), seed)
        if not is_read.all():
            raise PageVanishedError(int(is_read.argmin()))
        return digest

    def _look_at(
        self, page: npt.NDArray[np.int64], seed: int, *, by_node: bool, compared_next: bool
    ) -> None:
        digest, is_read = self._digests_at(self.space.hva(page), seed)
        if not is_read.all():
            self.process.require_alive()
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
        if self.thread is not None:
            try:
                digest = digests_in_place(self.thread, self.thread.run, address, seed)
            except InjectionError:
                self.let_thread_go()
            else:
                return digest, np.ones(len(address), dtype=np.bool_)
        return digests_at(self.name, self.pid, address, seed)

    def _nodes(self, page: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        try:
            return nodes_of(self.pid, self.space.hva(page))
        except OSError as error:
            self.process.require_alive()
            raise VmGoneError(
                self.name, f"asking for its NUMA nodes: {error}", pid=self.pid
            ) from error

    @property
    def least_vmas(self) -> int:
        """VMAs that the kernel could do with for guest RAM, as it was last read."""
        assert self.state is not None
        if self._least_vmas is None:
            self._least_vmas = vma_count(self.state.slot, self.space.first_page)
        return self._least_vmas

    def vma_budget(self, max_map_count: int, state: MappingState) -> int:
        """VMAs that guest RAM may take, so that QEMU keeps its headroom.

        The plan reckons with as few as the kernel could do with; what it has beyond
        (pieces that it did not join again) is taken off.
        """
        others = state.process_vmas - state.ram_vmas
        others += max(0, state.ram_vmas - self.least_vmas)
        most = self._settings.vma_budget or max_map_count - self._settings.vma_headroom
        return max(0, most - others)

    @contextmanager
    def lending(self) -> Iterator[Lend]:
        """Lends QEMU descriptors for the time of the block; at its end all are taken back."""
        fdsets: list[int] = []
        self._take_back()

        def lend(fd: int, purpose: str) -> int:
            fdset, number = self.monitor.add_fd(fd, f"vmdedup-{purpose}", *fdsets)
            fdsets[:] = [fdset]
            faults.reached("lent")
            return number

        try:
            yield lend
        finally:
            self._lent = [*self._lent, *fdsets]
            with suppress(MonitorError):  # silent just now: the next one takes them back
                self._take_back()

    def _take_back(self) -> None:
        """Have QEMU close what was lent to it. Raises VmError; it is tried again then."""
        if self._lent and self.process.alive():
            self.monitor.remove_fds(list(self._lent))
            self._lent = ()
            faults.reached("taken-back")


def _clear(categories: npt.NDArray[np.uint8], which: int) -> None:
    """Take what has any of these categories for absent."""
    # What is 0 already may be memory that nobody has touched.
    categories[categories & which != 0] = 0


def _place(region: Region) -> tuple[str, int, int]:
    return region.backend, region.start, region.size_bytes
