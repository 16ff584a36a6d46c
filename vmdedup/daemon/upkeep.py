"""Upkeep: periodic work that follows changes of VMs and gives memory back.

Owns seven kinds of periodic work: a cheap look at every VM for news, a thorough one at one
VM at a time, unfinished unmerges, giving back unused memory, making huge pages again, and
paging out cold pages, at their pace or at once while memory is short.
Promises that each stays within its share of a CPU, and comes later while a client waits for
a merge. News of a VM becomes an event, and the VM is scanned at once.
"""

from __future__ import annotations

import time

from vmdedup.daemon.journal import Journal
from vmdedup.daemon.merge_jobs import MergeJobs
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.periodic import Periodic
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.engine.fleet import Fleet
from vmdedup.linux import malloc

_WATCH_S = 0.5
"""Least time between two cheap looks at all VMs, seconds."""
_REEXAMINE_S = 10.0
"""Time in which each VM's devices and memory are looked at once, seconds."""
_GRACE_S = 1.0
"""How late both looks may be while a merge is awaited and no VM has trouble, seconds."""
_LOOK_CPU_SHARE = 0.01
"""Most of one CPU spent on each kind of look; with many VMs they come less often."""
_LOOK_TIME_SHARE = 0.1
"""Most of the time spent on each kind of look, as monitors may answer slowly."""
_SETTLE_S = 0.5
"""Time until unfinished unmerges are considered again, seconds."""
_SWEEP_S = 5.0
"""Least time between two searches for store pages that nobody maps, seconds."""
_SWEEP_CPU_SHARE = 0.005
"""Most of one CPU spent on these searches; with many mappings they come less often."""

_COLLAPSE_S = 10.0
"""Least time between two searches for blocks that can be huge pages again, seconds."""
_COLLAPSE_CPU_SHARE = 0.01
"""Most of one CPU spent on that."""
_COLLAPSED_BLOCKS = 16
"""Most huge pages made at once; QEMU's mappings are locked for about 0.2 ms for each."""
_COLD_S = 1.0
"""Least time between two rounds that page out cold pages, seconds."""
_SHORT_S = 0.1
"""The same while memory is short, as long as there are cold pages, seconds."""


class Upkeep:
    """Each method does its work if it is due; if it raises VmdedupError, the work stays due."""

    def __init__(
        self, fleet: Fleet, journal: Journal, pace: Pace, jobs: MergeJobs, feed: SnapshotFeed
    ) -> None:
        self._fleet = fleet
        self._journal = journal
        self._pace = pace
        self._jobs = jobs
        self._feed = feed
        shares = {"cpu_share": _LOOK_CPU_SHARE, "time_share": _LOOK_TIME_SHARE}
        self._watching = Periodic(_WATCH_S, **shares)
        self._reexamining = Periodic(_REEXAMINE_S, first_in_s=_REEXAMINE_S, **shares)
        self._settling = Periodic(_SETTLE_S)
        self._collapsing = Periodic(
            _COLLAPSE_S, cpu_share=_COLLAPSE_CPU_SHARE, first_in_s=_COLLAPSE_S
        )
        self._sweeping = Periodic(_SWEEP_S, cpu_share=_SWEEP_CPU_SHARE)
        self._paging_out = Periodic(_COLD_S)
        self._paging_out_at_once = Periodic(_SHORT_S)
        self._said_of_short: str | None = None
        """The last event about paging out for short memory; `None` while memory suffices."""
        self._out_while_short = 0
        """Pages that went out since memory became short."""
        self._cold_hindrance: str | None = None
        """Why cold pages cannot be paged out, as it was last told."""
        self._examined_at: dict[int, float] = {}
        """Time of the last thorough look at each VM (time.monotonic), by pid."""

    def look_at_vms(self) -> None:
        """Examine the VMs that a cheap look has news of, and one VM in its turn."""
        if self._may_look(self._watching):
            self._watch()
        if self._may_look(self._reexamining):
            self._reexamine()

    def _may_look(self, work: Periodic) -> bool:
        """Whether it is due, and cannot wait.

        A merge that is awaited looks at each VM by itself, right before it merges there.
        """
        if not work.is_due():
            return False
        can_wait = self._jobs.waiting and not work.is_due(grace_s=_GRACE_S)
        return not can_wait or any(vm.record.trouble for vm in self._fleet.engine.vms)

    def _watch(self) -> None:
        with self._watching.measured():
            for name, reason in self._fleet.follow_changes(at_leisure=True):
                self._note_news(name, reason)

    def _reexamine(self) -> None:
        """Look again at the devices and memory of the VM whose last look is the oldest."""
        vms = self._fleet.reachable()
        if not vms:
            return
        with self._reexamining.measured():
            vm = min(vms, key=lambda each: self._examined_at.get(each.pid, 0.0))
            reason = self._fleet.reexamine(vm)
            if reason is not None:
                self._note_news(vm.name, reason)
            pids = self._fleet.pids()
            self._examined_at[vm.pid] = time.monotonic()
            self._examined_at = {pid: at for pid, at in self._examined_at.items() if pid in pids}
            self._reexamining.interval_s = _REEXAMINE_S / max(1, len(pids))

    def _note_news(self, name: str, reason: str) -> None:
        self._journal.add("changed", name, reason)
        self._feed.note_change()
        self._pace.hurry()

    def settle(self) -> None:
        """Try again to unmerge pages that an earlier unmerge left; each time after a pause."""
        if not self._settling.is_due():
            return
        self._settling.put_off()
        for tried in self._fleet.settle():
            if tried.restored_pages or not tried.remaining_pages:
                said = f"{tried.restored_pages} pages"
                self._journal.add("unmerged", tried.name, tried.reason or said)
            self._feed.note_change()

    def sweep(self) -> None:
        """Give back unused store pages, and our own memory, unless a client waits."""
        if self._jobs.waiting or not self._sweeping.is_due():
            return
        with self._sweeping.measured():
            self._fleet.engine.trim_mappings()
            self._fleet.engine.sweep()
            malloc.give_back()

    def collapse(self) -> None:
        """Make huge pages again, a few at a time, unless a client waits."""
        if self._jobs.waiting or not self._collapsing.is_due():
            return
        with self._collapsing.measured():
            self._fleet.engine.collapse(_COLLAPSED_BLOCKS)

    def sweep_soon(self) -> None:
        """After a VM has ended: pages that only it mapped can be given back."""
        self._sweeping.hasten()

    def page_out_cold(self) -> None:
        """Page some cold pages out, unless a client waits or nothing is scanned."""
        controls = self._pace.controls
        if not controls.cold_after_s or controls.run != 1:
            self._cold_hindrance = None
            return
        if self._jobs.waiting or not self._paging_out.is_due():
            return
        self._paging_out.cpu_share = controls.cold_max_cpu / 100
        with self._paging_out.measured():
            found = self._fleet.engine.cold.page_out()
        if found.pages:
            self._feed.note_counts()
        if found.hindrance != self._cold_hindrance:
            self._cold_hindrance = found.hindrance
            said = found.hindrance or "they can be paged out again"
            self._journal.add("cold-pages", None, said)
            self._feed.note_change()

    def page_out_at_once(self, *, is_wanted: bool) -> None:
        """Page out cold pages while memory is short, also if a client waits.

        It stays within advisor_max_cpu. Events tell of its beginning, or why nothing goes out,
        and of its end.
        """
        if not is_wanted:
            if self._said_of_short is not None:
                self._journal_short(f"{self._out_while_short:,} pages, while memory was short")
                self._said_of_short, self._out_while_short = None, 0
            return
        work, controls = self._paging_out_at_once, self._pace.controls
        if controls.run != 1 or not work.is_due():
            return
        work.cpu_share = controls.advisor_max_cpu / 100
        with work.measured():
            found = self._fleet.engine.cold.page_out(at_once=True)
            work.interval_s = _SHORT_S if found.pages else _COLD_S
        self._out_while_short += found.pages
        said = found.hindrance or "memory is short: cold pages go out at once"
        if said != self._said_of_short:
            self._said_of_short = said
            self._journal_short(said)
        if found.pages:
            self._feed.note_counts()

    def _journal_short(self, message: str) -> None:
        self._journal.add("paged-out", None, message)
        self._feed.note_change()
