"""VMs that come and go: taken in from the scouts, dropped, hindered, reported by libvirt.

Owns the journal's lines about it, each written once. Promises that a VM that fails or
ends never ends the daemon, and that the scouts know which VMs are attached.
"""

from __future__ import annotations

from vmdedup.attach.discover import Attachment
from vmdedup.daemon.journal import Journal
from vmdedup.daemon.libvirt_events import DomainNews
from vmdedup.daemon.pace import Pace
from vmdedup.daemon.scouts import Scouts
from vmdedup.daemon.snapshot import SnapshotFeed
from vmdedup.engine.fleet import Fleet
from vmdedup.errors import VmdedupError


class Membership:
    """Which VMs are attached."""

    def __init__(
        self,
        fleet: Fleet,
        scouts: Scouts,
        news: DomainNews,
        journal: Journal,
        pace: Pace,
        feed: SnapshotFeed,
    ) -> None:
        self._fleet = fleet
        self._scouts = scouts
        self._news = news
        self._journal = journal
        self._pace = pace
        self._feed = feed
        self._hindered: dict[str, str] = {}
        """Why VMs waited at the last turn, by name."""

    def take_in_found(self) -> None:
        """Take in, or list, the VMs that the scouts have found."""
        while not self._scouts.results.empty():
            found = self._scouts.results.get()
            if isinstance(found, Attachment):
                self._take_in(found)
            elif self._fleet.note_unreachable(found):
                self._journal.add("unreachable", found.name, found.reason)
                self._feed.note_change()
        self._scouts.attached(self._fleet.keys())

    def _take_in(self, found: Attachment) -> None:
        pid, path = found.identity.pid, found.identity.socket_path
        if pid in self._fleet.pids():
            found.close()
        elif not self._is_taken_in(found):
            self._scouts.refused(pid, path)
        self._scouts.taken(pid)

    def _is_taken_in(self, found: Attachment) -> bool:
        """Attach to a VM; False if it is refused, or could not be taken in now."""
        name, before = found.identity.name, self._fleet.roster.reason_of(found.identity.pid)
        try:
            row = self._fleet.take_in(found)
        except VmdedupError as error:
            # Not the VM's fault (its store cannot be opened): it is tried again later.
            self._journal.add("failed", name, str(error))
            found.close()
            return False
        if row.mergeable:
            self._journal.add("attached", row.name, row.reason or "")
            self._pace.hurry()
        elif row.reason != before:
            self._journal.add("refused", row.name, row.reason or "")
        self._feed.note_change()
        return row.mergeable

    def hear_of_domains(self) -> None:
        """Act on libvirt's events since the last call. Raises VmdedupError."""
        if self._news.take():
            self._feed.note_change()
            self._pace.hurry()
        self._news.warn()

    def note_dropped(self) -> bool:
        """Note the VMs that had to be dropped; whether any listed VM has ended."""
        for absent in self._fleet.dropped:
            self._journal.add("dropped", absent.name, absent.reason or "")
            self._feed.note_change()
        self._fleet.dropped.clear()
        has_ended = self._fleet.forget_ended()
        if has_ended:
            self._feed.note_change()
        self._scouts.attached(self._fleet.keys())
        return has_ended

    def note_hindrances(self) -> None:
        """Note VMs whose storage or monitor does not answer, and those that answer again."""
        hindered = self._fleet.hindrances()
        for name in self._hindered.keys() - hindered.keys():
            self._journal.add("goes-on", name, "its storage and its monitor answer again")
        for name in hindered.keys() - self._hindered.keys():
            self._journal.add("waits", name, hindered[name])
        if hindered.keys() != self._hindered.keys():
            self._feed.note_change()
        self._hindered = hindered
