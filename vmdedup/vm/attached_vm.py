"""One attached VM, and all that is kept about it between passes.

Owns the VM's monitor, pinned process, page space, rmap columns and cumulative
timings, and the looks at its pages. Promises that closing leaves nothing of ours
in the QEMU except its merges. Refuses at construction a VM that the hazard table
or the domain rules refuse.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vmdedup.attach.discover import Attachment
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.ranges import MemoryListing, Region, backends_of, find_regions, list_memory
from vmdedup.attach.storage import Storage
from vmdedup.core.rmap import FIRST_SLOT, OWN
from vmdedup.errors import RefusedError, VmError
from vmdedup.guest.mapping_state import (
    HELD,
    MappingState,
)
from vmdedup.guest.page_space import PageSpace
from vmdedup.inject.remote import Landmarks, RemoteThread
from vmdedup.linux.maps import is_merged_onto, read_maps
from vmdedup.linux.pagemap import PRESENT, Pagemap, has_pagemap_scan
from vmdedup.linux.smaps import flagged_vmas
from vmdedup.models import BackendListing
from vmdedup.policy import registry
from vmdedup.policy.domains import ZERO_ONLY, domain_of
from vmdedup.policy.hazards import (
    PREALLOCATED,
    REPORTS_FREE_PAGES,
    Finding,
    Verdict,
    examine,
    refused_backends,
    stop_only,
    zero_only,
)
from vmdedup.policy.watch import Watch, halted_by
from vmdedup.settings import DomainRule, Settings
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.lent import LentFds
from vmdedup.vm.page_scan import PageScan
from vmdedup.vm.pass_record import PassRecord
from vmdedup.vm.timings import Totals

_QEMU_DEFAULT_FLAGS = frozenset({"dc", "hg", "mg"})
"""VmFlags that QEMU sets on guest RAM (softmmu/physmem.c: ram_block_add, qemu_ram_setup_dump)."""


_HUGE_UNKNOWN = (
    "its huge pages are split whatever huge_page_density says: this kernel does not tell which"
    " pages are huge (Linux 6.7 does)"
)
_LONGEST_UNEXAMINED_S = 60.0
"""Longest time between examinations of a VM if events of its monitor are missed."""

MEMORY_CHANGED = "its memory changed"
"""Reason that `AttachedVm.changed` gives for memory that was plugged or unplugged."""


class AttachedVm:
    """An attached VM. Raises RefusedError or another VmError when it cannot be one.

    Takes ownership of the attachment, also when it raises. With `refuse` False a
    VM that must not be merged is still taken, to report or unmerge it, and
    `refusal` says why. `by_hand`: backends registered in spite of merge=off or prealloc=on.
    """

    thread: RemoteThread | None = None
    """Thread borrowed over several stages of a foreground pass, see
    `remap.borrowed_thread.borrowed`."""
    _is_otherwise = False
    """Whether the last examination found the VM so changed that it must be attached again."""
    _examined_over: int | None = None
    """Number of the monitor's connection over which it was last examined, if that still stood."""
    _examined_at = 0.0
    """When it was last examined (time.monotonic)."""
    may_hold_userfaults = True
    """Whether QEMU may still have a userfaultfd that this or an earlier engine made in it."""

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
        self.lent = LentFds(self.name, self.monitor, self.process)
        self._settings = settings
        self._exits = ExitStack()
        self._exits.callback(attachment.close)
        try:
            self._watch = Watch(self.monitor, self.process)
            self._note_examined()
            self.storage = Storage(self.monitor)
            listing = list_memory(self.monitor)
            self.backends = backends_of(listing)
            found, left_alone, self.findings = self._examined(listing)
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
        self.totals, self.landmarks = Totals(), Landmarks()
        self._registration = registry.first_registration(self.name, self.registrable())
        self.registered = self._registered_mask()
        self._never_live: str | None = None
        self.note_live_hindrance(None)
        self.record = PassRecord()
        self.scan = PageScan(self, settings.store_dir)

    @property
    def left_to_unmerge_pages(self) -> int:
        """Pages still to be unmerged, by the state last read."""
        if self.scan.state is None or not (self.record.resting or self.record.leaving):
            return 0
        return int(np.count_nonzero(self.scan.state.slot != OWN))

    @property
    def leaves_domain(self) -> str | None:
        """The trust domain that the VM has left but whose pages it still shares, if any."""
        is_moving = self.refusal is None or self.refusal_key == "domain"
        if self.scan.state is None or not self.record.leaving or not is_moving:
            return None
        stores = {store.domain or "unknown" for store in self.scan.state.stores} - {self.domain}
        return ", ".join(sorted(stores)) or None

    def close(self) -> None:
        """Release the VM; its merges stay. Idempotent."""
        self.let_thread_go()
        self.scan.stop_dirty_tracking()
        self._exits.close()

    def let_thread_go(self) -> None:
        """Return the borrowed thread, and remove its scratch memory.

        If that cannot be done now, the next session does it.
        """
        thread, self.thread = self.thread, None
        if thread is not None:
            with suppress(VmError):
                thread.close()

    @property
    def hindrance(self) -> str | None:
        """Why a VM that runs and may be merged cannot be merged now; `None` if nothing hinders."""
        return self.monitor.outage or self.storage.away

    @property
    def failure(self) -> str | None:
        """The error for which nothing is merged on a VM that should be; `None` if there is none."""
        if self.record.resting or self.refusal is not None:
            return None
        reason = self.hindrance or self.record.trouble
        if reason is None or (self.scan.state is not None and (self.scan.state.slot != OWN).any()):
            return None
        return reason

    @property
    def is_on_store(self) -> bool:
        """Whether any of its pages maps a store, as last read."""
        return self.scan.state is not None and bool((self.scan.state.slot >= FIRST_SLOT).any())

    @property
    def hint(self) -> str | None:
        """One line on how the VM could be merged better; `None` if nothing is known."""
        hints = zero_only(self.findings)
        if self._why_stopped is not None:
            hints.append(self._why_stopped)
        if self._settings.controls.huge_page_density and not self.pagemap.use_scan:
            hints.append(_HUGE_UNKNOWN)
        return "; ".join(hints) or None

    def note_live_hindrance(self, why: str | None, *, for_good: bool = False) -> None:
        """Merge this VM only while stopped, for this reason; `None`: live, if it may be."""
        if for_good:
            self._never_live = why
        self._why_stopped = self._never_live or self._stop_hint() or why
        self.live = self._why_stopped is None

    def disturbed(self, *, at_leisure: bool = False) -> bool:
        """Whether it must be examined again (`changed`) before it is merged: a cheap look.

        `at_leisure`: an even cheaper look, if it is not about to be merged. Raises VmError
        when the VM cannot be asked.
        """
        return self._is_otherwise or self.has_news(at_leisure=at_leisure)

    def has_news(self, *, at_leisure: bool = False) -> bool:
        """Whether anything may have changed since it was last examined; see `disturbed`."""
        if self.monitor.misses_events:
            since_s = time.monotonic() - self._examined_at
            if since_s > _LONGEST_UNEXAMINED_S:
                return self.changed() is not None
        return self._watch.has_news(at_leisure=at_leisure)

    def has_news_for_gates(self) -> bool:
        """As `has_news`, for pages that are about to be remapped.

        If events may have been missed, because the monitor was left since then, everything is
        examined: a device that was replaced by one of the same name and type looks the same.
        """
        if not self.monitor.misses_events:
            return self._watch.has_news()
        with self.monitor.turn():
            if self.monitor.connection == self._examined_over:
                found = self._watch.has_news()
                if self.monitor.connection == self._examined_over:
                    return found
        return self.changed() is not None

    def changed(self) -> str | None:
        """The changes since attaching that matter, in one line; `None` if there are none.

        Renews `findings`. Raises VmError when the VM cannot be asked.
        """
        halted = halted_by(self.process, self.process.status())
        if halted is not None:
            why = f"it does not run ({halted}); merging goes on when it does"
            raise RefusedError(self.name, why, pid=self.pid, key="halted")
        self._watch.settle()
        self._note_examined()
        self.storage.find_disks()
        found, _, findings = self._examined(list_memory(self.monitor))
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

    def _note_examined(self) -> None:
        connection = self.monitor.connection
        self._examined_over = None if connection < 0 else connection
        self._examined_at = time.monotonic()

    def _why_not_zero_only(self) -> list[str]:
        """Why the VM's domain is no longer that of zero pages alone; empty if it still is."""
        try:
            if self.domain_by(self._settings.domains) == ZERO_ONLY:
                return []
        except RefusedError as error:
            return [error.reason]
        return ["more than zero pages may be merged now"]

    def _examined(
        self, listing: MemoryListing
    ) -> tuple[list[Region], list[tuple[str, str]], list[Finding]]:
        """Its regions, the backends left alone, and the findings of the hazard table.

        SAFETY: the watch was settled before the listing was read, so a change from then on is
        news. Findings are in the words of the tool that set the VM up.
        """
        regions, left_alone = find_regions(
            self.monitor, self.process, self.by_hand, listing=listing
        )
        findings = [
            replace(found, reason=self.monitor.in_own_words(found.key, found.reason))
            for found in examine(
                self.monitor,
                self.process,
                regions,
                drain_trusted=self._settings.drain_trusted,
                listed=listing.objects,
            )
            if not (found.key == PREALLOCATED and found.backend in self.by_hand)
        ]
        return regions, left_alone, findings

    def ask_balloon(self) -> None:
        """Ask for the sizes of its balloon and of its virtio-mem devices again.

        Without an answer the known sizes stay.
        """
        with suppress(VmError):
            self.ask_taken()

    def ask_taken(self) -> None:
        """Ask as `ask_balloon`. Raises VmError without an answer."""
        self._watch.ask_balloon()

    @property
    def may_discard(self) -> bool:
        """Whether its guest can give memory back at any time, page by page or by blocks."""
        taken = self._watch.taken
        return taken.balloon is not None or bool(taken.unplugged_bytes)

    @property
    def has_given_back(self) -> bool:
        """Whether merged pages may be memory that its guest does not have any more."""
        taken = self._watch.taken
        has_taken = taken.balloon is not None and taken.balloon.pages > 0
        reports = any(each.key == REPORTS_FREE_PAGES for each in self.findings)
        return reports or has_taken or any(taken.unplugged_bytes.values())

    @property
    def has_unplugged(self) -> bool:
        """Whether a virtio-mem device of a merged backend had nothing plugged when last asked."""
        return any(map(self._is_unplugged, self.regions))

    def unplugged_mask(self) -> npt.NDArray[np.bool_]:
        """The pages of virtio-mem devices that had nothing plugged when last asked."""
        mask = np.zeros(self.space.pages, dtype=np.bool_)
        for index, region in enumerate(self.regions):
            mask[self.space.slice_of(index)] = self._is_unplugged(region)
        return mask

    def _is_unplugged(self, region: Region) -> bool:
        left_bytes = self._watch.taken.unplugged_bytes.get(region.backend, 0)
        return left_bytes >= region.size_bytes

    def ballooned_pages(self, state: MappingState) -> int:
        """Merged pages that are in its balloon, or that virtio-mem has unplugged, at least.

        Other pages of theirs are absent, or not in our regions.
        """
        absent = (state.slot == OWN) & (state.categories & HELD == 0)
        unplugged, plain_pages = 0, self.space.pages
        for index, region in enumerate(self.regions):
            unplugged_bytes = self._watch.taken.unplugged_bytes.get(region.backend)
            if unplugged_bytes is not None:
                plain_pages -= region.pages
                free = np.count_nonzero(absent[self.space.slice_of(index)])
                unplugged += max(0, unplugged_bytes // PAGE_BYTES - int(free))
        balloon = self._watch.taken.balloon
        if balloon is None:
            return unplugged
        # QEMU does not count virtio-mem's memory into the balloon's.
        others = max(0, balloon.ram_bytes // PAGE_BYTES - plain_pages)
        return unplugged + max(0, balloon.pages - others - int(np.count_nonzero(absent)))

    def perhaps_discarded_pages(self, state: MappingState) -> int:
        """Merged pages that its guest may have reported as free, at most.

        A discard takes the page out of the page tables and leaves its mapping. A page that was
        not touched since its merge looks the same.
        """
        if not any(each.key == REPORTS_FREE_PAGES for each in self.findings):
            return 0
        is_merged = state.merged | state.zero
        return int(np.count_nonzero(is_merged & (state.categories & PRESENT == 0)))

    def use(self, settings: Settings) -> None:
        """Take over changed settings; findings stay until the VM is examined again."""
        self._settings = settings

    def use_policy(self, policy: VmPolicy) -> None:
        """Take over the VM's own description as it is now; `domain` stays unchanged."""
        self.identity = replace(self.identity, policy=policy)
        self._attachment = replace(self._attachment, identity=self.identity)

    def give_up(self) -> Attachment:
        """Close everything except the attachment, and return that."""
        self.let_thread_go()
        self.scan.stop_dirty_tracking()
        self.pagemap.close()
        self._exits.pop_all()
        return self._attachment

    def use_seed(self, seed: int) -> None:
        """Take digests under this seed from now on; forget those of another seed."""
        if self.scan.seed not in (None, seed):
            self.start_over()
        self.scan.seed = seed

    def start_over(self) -> None:
        """Forget all looks, and that it was ever merged in a pass."""
        self.scan.start_over()
        self.record.passes = self.record.waiting_pages = 0

    def backend_listings(self) -> list[BackendListing]:
        """All memory backends, each that is not merged with the reason."""
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

    def registrable(self) -> list[registry.RegistrableBackend]:
        """The backends as the registry knows them."""
        reasons = dict(self.left_alone)
        return [
            registry.RegistrableBackend(
                each.id,
                each.size_bytes // PAGE_BYTES,
                each.merge or each.id in self.by_hand,
                reasons.get(each.id),
            )
            for each in self.backends
        ]

    @property
    def registration(self) -> registry.VmRegistration:
        """The memory registered for merging; after a change the next pass considers every page."""
        return self._registration

    @registration.setter
    def registration(self, registration: registry.VmRegistration) -> None:
        self._registration = registration
        self.registered = self._registered_mask()
        self.scan.consider_all()

    def _registered_mask(self) -> npt.NDArray[np.bool_]:
        """Whether each page of the page space is registered for merging."""
        mask = self._registration.mask([(region.backend, region.pages) for region in self.regions])
        # Nearly always all are registered: then one byte stands for all.
        return np.broadcast_to(np.True_, mask.shape) if mask.all() else mask

    def domain_by(self, rules: Sequence[DomainRule]) -> str:
        """Its trust domain by these rules and by its findings. Raises RefusedError."""
        domain = domain_of(self.identity, rules)
        return ZERO_ONLY if zero_only(self.findings) else domain

    def _refusal(self) -> str | None:
        """Why this VM must not be merged, `None` when it may be."""
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
        """Why this VM cannot be merged live, `None` when it can."""
        if not self._settings.has("userfaultfd-wp"):
            return "merged only while stopped: userfaultfd write protection is masked"
        if reasons := stop_only(self.findings):
            return "merged only while stopped: " + "; ".join(reasons)
        return None

    def _flags_of(self, region: Region) -> frozenset[str]:
        """VmFlags that QEMU had set on the region, read from a mapping that is still QEMU's own."""
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

    def vma_budget(self, max_map_count: int, state: MappingState) -> int:
        """VMAs that guest RAM may take, so that QEMU keeps its headroom.

        The plan counts the fewest VMAs possible. The kernel may have more (pieces that it
        did not join again), which are subtracted from the budget.
        """
        others = state.process_vmas - state.ram_vmas
        others += max(0, state.ram_vmas - self.scan.least_vmas)
        most = self._settings.controls.vma_budget or max_map_count - self._settings.vma_headroom
        return max(0, most - others)


def _place(region: Region) -> tuple[str, int, int]:
    return region.backend, region.start, region.size_bytes
