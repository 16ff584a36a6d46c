"""Acting on libvirt's events: the engine's side of `libvirt_scout`.

Owns the effect of each event on attached VMs. After a device change or a migration, the VM
is examined at once; after changed metadata, its policy is taken over. When libvirt is back,
VMs that were left paused when it went are resumed. All of it is noted in the journal.
Runs on the engine's thread, between two slices of work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmdedup.daemon.journal import Journal
from vmdedup.engine.fleet import Fleet
from vmdedup.guardian.resume import resume_noted
from vmdedup.ipc.protocol import LibvirtHealth

if TYPE_CHECKING:
    from vmdedup.attach.identity import VmPolicy
    from vmdedup.attach.libvirt.link import DomainEvent
    from vmdedup.daemon.libvirt_scout import LibvirtScout, Notice
    from vmdedup.vm.attached_vm import AttachedVm

_EXAMINED = frozenset(("device", "qmp", "resumed", "suspended"))
_QUIET = frozenset(("defined", "undefined", "qmp"))
"""Events that are not worth a line of their own."""
_CONNECTION = frozenset(("connected", "lost", "unavailable"))


class DomainNews:
    """Takes the notices of `scout`, if there is one."""

    def __init__(self, fleet: Fleet, scout: LibvirtScout | None, journal: Journal) -> None:
        self._fleet = fleet
        self._scout = scout
        self._journal = journal
        self._warned: set[str] = set()
        self._policies: dict[str, VmPolicy] = {}
        """Policies that were read and are not in effect yet, by domain."""
        self._last_word = ""
        """The connection's last line in the journal."""

    def health(self) -> LibvirtHealth | None:
        """The state of the connection; `None` without libvirt."""
        if self._scout is None:
            return None
        link = self._scout.link
        return LibvirtHealth(
            uri=link.uri,
            connected=link.outage is None,
            since_unix_s=link.since_unix_s,
            reason=link.outage,
        )

    def warn(self) -> None:
        """Note if libvirt's domains share a trust domain that nobody has named."""
        crowded = self._fleet.crowded()
        for domain in crowded.keys() - self._warned:
            self._journal.add("warning", None, crowded[domain])
        self._warned = crowded.keys() | set()

    def take(self) -> bool:
        """Act on all notices that have come; whether there were any. Raises VmdedupError."""
        if self._scout is None:
            return False
        self._use_policies()
        if self._scout.notices.empty():
            return False
        while not self._scout.notices.empty():
            self._take(self._scout.notices.get())
        return True

    def _use_policies(self) -> None:
        """Take over policies; a policy waits while its domain is still being attached to."""
        for uuid in [uuid for uuid in self._policies if self._tenant(uuid) is not None]:
            for name in self._fleet.use_policy(uuid, self._policies.pop(uuid)):
                self._journal.add("changed", name, "its policy changed")

    def _take(self, notice: Notice) -> None:
        event = notice.event
        if event.kind in _CONNECTION:
            self._on_connection(event)
            return
        if notice.policy is not None:
            self._policies[event.uuid] = notice.policy
            self._use_policies()
            return
        if event.kind not in _QUIET:
            self._journal.add("domain", event.name, f"{event.kind} {event.detail}".strip())
        if event.kind == "stopped":
            self._policies.pop(event.uuid, None)
            self._fleet.roster.forget(event.name)
            self._fleet.drop_ended()
        vm = self._tenant(event.uuid)
        if vm is not None and event.kind in _EXAMINED:
            reason = self._fleet.reexamine(vm)
            if reason is not None:
                self._journal.add("changed", vm.name, reason)

    def _tenant(self, uuid: str) -> AttachedVm | None:
        vms = self._fleet.engine.vms
        return next((each for each in vms if each.identity.uuid == uuid), None)

    def _on_connection(self, event: DomainEvent) -> None:
        word = f"{event.kind}: {event.detail}"
        if word != self._last_word:
            self._journal.add("libvirt", None, word)
        self._last_word = word
        if event.kind == "connected":
            # SAFETY: no session is open between two slices: a VM that a note still names was
            # paused by us and could not be resumed while libvirt was away. Or it is paused
            # until there is memory, on a thread that resumes it then.
            runtime = self._fleet.host.runtime
            resume_noted(runtime.path, pauses=runtime.pauses)
