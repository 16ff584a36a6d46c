"""The snapshots that the API server answers reads from.

Owns the content and the time of each push: at once after an event, about once a second if
there were only passes. Promises that a push costs little: VMs are counted again only if they
may have changed. Refuses to read VMs if the last pass's figures still hold.
"""

from __future__ import annotations

import os
import time
from collections import deque

from vmdedup.daemon.api_process import ApiServer
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.libvirt_events import DomainNews
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.periodic import Periodic
from vmdedup.daemon.shortage import ShortageWatch
from vmdedup.engine.fleet import Fleet
from vmdedup.ipc.channel import ChannelError
from vmdedup.ipc.protocol import EngineHealth, Histogram, Snapshot
from vmdedup.models import SharingReport, VmList

_PUSH_S = 1.0
"""Least time between two pushes that tell only of passes, seconds."""
_PUSH_CPU_SHARE = 0.005
"""Most of one CPU spent on pushes; with many mappings they come less often."""


class SnapshotFeed:
    """Pushes the daemon's state to the API server."""

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        server: ApiServer,
        pace: Pace,
        news: DomainNews,
        watch: ShortageWatch,
    ) -> None:
        self._fleet = fleet
        self._journal = journal
        self._server = server
        self._pace = pace
        self._news = news
        self._watch = watch
        self._changed = True
        """Whether something happened since the last push."""
        self._stale = False
        """Whether only passes have changed what was pushed."""
        self._pace_pushed = pace.changes
        self._pushing = Periodic(_PUSH_S, cpu_share=_PUSH_CPU_SHARE)
        self._shown: tuple[SharingReport, VmList] | None = None
        """The VMs as they were pushed last; `None` before the first push."""
        self._started_unix_s = time.time()
        self._last_pass_unix_s: float | None = None
        self._last_pass_ms: float | None = None
        self._durations = _Durations()

    def note_change(self) -> None:
        """Note a change, to be pushed at the end of this turn."""
        self._changed = True

    def note_counts(self) -> None:
        """Note that counts have changed: pushed within about a second."""
        self._stale = True

    def note_pass(self, duration_ms: float) -> None:
        """Note the end of a pass and its duration: pushed within about a second."""
        self._last_pass_ms = duration_ms
        self._last_pass_unix_s = time.time()
        self._stale = True

    def push_if_wanted(self, *, awaited: bool) -> None:
        """Push any news; news of passes alone waits while a merge is `awaited`."""
        aged = self._stale and not awaited and self._pushing.is_due()
        if self._changed or aged:
            self.push()
        elif self._pace.changes != self._pace_pushed:
            self.push_controls()

    def push(self) -> None:
        """Count the VMs and push them now. Raises VmdedupError."""
        with self._pushing.measured():
            self._changed = self._stale = False
            self._pace_pushed = self._pace.changes
            self._durations.book(self._fleet)
            self._fleet.paused = self._watch.paused
            self._shown = self._fleet.report(converged=None, refresh=False), self._fleet.listed()
            self._watch.follow(self._fleet.places, self._fleet.engine.vms)
            self._send()

    def push_controls(self) -> None:
        """Push changed controls now; VMs are counted again only if something happened."""
        if self._changed or self._shown is None:
            self.push()
        else:
            self._send()

    def _send(self) -> None:
        """Send a snapshot, with the VMs as they were counted last."""
        assert self._shown is not None
        self._pace_pushed = self._pace.changes
        report, vms = self._shown
        snapshot = Snapshot(
            unix_s=time.time(),
            report=report,
            vms=vms,
            controls=self._pace.values(),
            health=self._health(),
            events=tuple(self._journal.take()),
            gates=self._durations.gates,
            drains=self._durations.drains,
        )
        try:
            self._server.channel.push(snapshot)
        except ChannelError:
            self._changed = True

    def _health(self) -> EngineHealth:
        return EngineHealth(
            engine_pid=os.getpid(),
            guardian_pid=self._fleet.guardian_pid,
            started_unix_s=self._started_unix_s,
            cpu_s=time.process_time(),
            passes=self._fleet.engine.full_scans,
            last_pass_unix_s=self._last_pass_unix_s,
            last_pass_ms=self._last_pass_ms,
            libvirt=self._news.health(),
        )


class _Durations:
    """The histograms of all gates and drains of this engine."""

    def __init__(self) -> None:
        self.gates = Histogram()
        self.drains = Histogram()
        self._booked: dict[int, tuple[int, int]] = {}
        """Gates and drains of each VM that are in the histograms already, by pid."""

    def book(self, fleet: Fleet) -> None:
        """Add the gates and drains since the last time."""
        booked, self._booked = self._booked, {}
        for vm in fleet.engine.vms:
            totals = vm.totals
            gates, drains = booked.get(vm.pid, (0, 0))
            self.gates = self.gates.plus(_last(totals.gate_ms, totals.gates - gates))
            self.drains = self.drains.plus(_last(totals.drain_ms, totals.drains - drains))
            self._booked[vm.pid] = totals.gates, totals.drains


def _last(values: deque[float], count: int) -> list[float]:
    return list(values)[-count:] if count > 0 else []
