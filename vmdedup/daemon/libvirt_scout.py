"""The scout for libvirt's domains: it receives their events, and attaches.

Owns the link to libvirt and connects to it ever less often while it is away. Owns the
list of running domains: reads it once after connecting, and from then on updates it by
events, without polling. Promises what `scout` promises. Events of domains and of libvirt
become notices, for the engine to act on. Touches no VM's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from vmdedup.attach.discover import Attachment, Unreachable
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.libvirt.discover import Domain, attach_domain, read_policy, running_domains
from vmdedup.attach.libvirt.link import DomainEvent, LibvirtLink, LinkDownError
from vmdedup.daemon.scout import Patience, Scout
from vmdedup.errors import UsageError, VmdedupError, VmError

_FIRST_RETRY_S = 0.5
_PARALLEL = 8
_NEVER_S = 3600.0

_STARTS = frozenset(("started", "resumed", "metadata", "device", "qmp", "suspended"))
"""Events after which a domain that could not be attached to is tried again at once."""
_ENDS = frozenset(("stopped", "crashed"))


@dataclass(frozen=True)
class Notice:
    """News for the engine: an event, and the policy if that changed."""

    event: DomainEvent
    policy: VmPolicy | None = None


class LibvirtScout(Scout):
    """Attaches to the running domains of the libvirt at `uri`. Raises UsageError for a bad URI."""

    def __init__(
        self,
        uri: str,
        *,
        results: SimpleQueue[Attachment | Unreachable],
        found: Callable[[], None],
        timeout_s: float,
        longest_retry_s: float,
    ) -> None:
        patience = Patience(_FIRST_RETRY_S, longest_retry_s, _PARALLEL)
        super().__init__("vmdedup-libvirt", patience, results=results, found=found)
        self.notices: SimpleQueue[Notice] = SimpleQueue()
        self._events: SimpleQueue[DomainEvent | None] = SimpleQueue()
        self.link = LibvirtLink(uri, self._events.put)
        self._timeout_s = timeout_s
        self._connect_at = 0.0
        self._connect_pause_s = _FIRST_RETRY_S
        self._running: dict[str, Domain] = {}
        self._pids: dict[str, int] = {}
        """Process of each domain that was attached to last, by UUID."""

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.link.close()

    # --- calls of the engine, on its thread -----------------------------------------------

    def attached(self, keys: Collection[Path | int]) -> None:
        """These processes are attached: leave them alone."""
        lost = self._known - frozenset(keys)
        super().attached(keys)
        for pid in lost:
            # Dropped for a reason that may last: do not try again at once.
            if isinstance(pid, int):
                self.refused(pid, None)

    def taken(self, pid: int) -> None:
        """Note that the engine has taken a result: no retry is planned before that."""
        super().taken(pid)
        self._wake()

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """Note that a VM that was found must not be merged now: look at it again later."""
        super().refused(pid, socket_path)
        if self._keys_of(pid, socket_path):
            self._wake()

    def reach(self, name: str) -> Attachment | None:
        """Attach now to the running domain of that name or UUID; `None` if there is none.

        For the engine's thread, on request. Raises VmError.
        """
        for domain in list(self._running.values()):
            if name in (domain.name, domain.uuid):
                attachment = attach_domain(self.link, domain, self._timeout_s)
                self._pids[domain.uuid] = attachment.identity.pid
                return attachment
        return None

    # --- the scout's thread -----------------------------------------------------------------

    def _keys_of(self, pid: int, socket_path: Path | None) -> list[str]:
        return [uuid for uuid, known in list(self._pids.items()) if known == pid]

    def _look(self) -> None:
        self._connect_if_due()
        self._try_due()

    def _sleep(self) -> None:
        self._hear(self._pause_s())

    def _wake(self) -> None:
        self._events.put(None)

    def _hear(self, pause_s: float) -> None:
        """Wait for an event, then take all that have come."""
        try:
            event = self._events.get(timeout=pause_s)
            while True:
                if event is not None:
                    self._on_event(event)
                event = self._events.get_nowait()
        except Empty:
            return

    def _pause_s(self) -> float:
        """Time until something is due without an event, seconds."""
        now = time.monotonic()
        if self.link.outage is not None:
            return max(0.0, self._connect_at - now)
        waiting = [
            self._failures[uuid].retry_at
            for uuid in self._running
            if uuid in self._failures and not self._is_left(uuid)
        ]
        return max(0.0, min([now + _NEVER_S, *waiting]) - now)

    def _connect_if_due(self) -> None:
        if self.link.outage is None or time.monotonic() < self._connect_at:
            return
        try:
            self.link.connect(self._timeout_s)
            found = running_domains(self.link, self._timeout_s)
        except (LinkDownError, UsageError) as error:
            self._connect_at = time.monotonic() + self._connect_pause_s
            self._connect_pause_s = min(self._patience.longest_retry_s, 2 * self._connect_pause_s)
            self._notice(DomainEvent("unavailable", detail=str(error)))
            return
        self._connect_pause_s = _FIRST_RETRY_S
        self._connect_at = 0.0
        now = {domain.uuid: domain for domain in found}
        for gone in self._running.keys() - now.keys():
            self._forget(gone)
        self._running = now
        self._failures.clear()
        for domain in found:
            # Metadata that was set while no connection reported it.
            self._notice_policy(DomainEvent("metadata", domain.uuid, domain.name))

    def _on_event(self, event: DomainEvent) -> None:
        if event.kind == "started":
            self._running[event.uuid] = Domain(event.uuid, event.name)
        if event.kind in _STARTS:
            self._failures.pop(event.uuid, None)
        if event.kind in _ENDS:
            self._forget(event.uuid)
        if event.kind == "lost":
            self._connect_at = time.monotonic() + self._connect_pause_s
        if event.kind == "metadata":
            self._notice_policy(event)
        else:
            self._notice(event)

    def _forget(self, uuid: str) -> None:
        self._running.pop(uuid, None)
        self._failures.pop(uuid, None)
        self._let_go.pop(self._pids.pop(uuid, 0), None)

    def _notice(self, event: DomainEvent, policy: VmPolicy | None = None) -> None:
        self.notices.put(Notice(event, policy))
        self._found()

    def _notice_policy(self, event: DomainEvent) -> None:
        try:
            policy = read_policy(self.link, Domain(event.uuid, event.name), self._timeout_s)
        except VmError:
            return  # it has ended, or is read again after the next connection
        self._notice(event, policy)

    def _try_due(self) -> None:
        if self.link.outage is not None:
            return
        due = [domain for domain in self._running.values() if self._wants(domain.uuid)]
        self._side_by_side(self._try, due)

    def _wants(self, uuid: str) -> bool:
        """Whether a running domain should be tried now."""
        return not self._is_left(uuid) and self._is_due({uuid})

    def _is_left(self, uuid: str) -> bool:
        """Whether a domain must not be tried: it is attached, will be, or was let go of."""
        pid = self._pids.get(uuid)
        return pid is not None and (self._is_taken({pid}) or self._is_let_go(pid))

    def _try(self, domain: Domain) -> None:
        try:
            attachment = attach_domain(self.link, domain, self._timeout_s)
        except VmdedupError as error:
            self._fail(domain.uuid)
            if self.link.outage is None:
                reason = error.reason if isinstance(error, VmError) else str(error)
                pid = error.pid if isinstance(error, VmError) else None
                self.results.put(Unreachable(domain.name, pid, reason, domain.uuid))
        else:
            self._pids[domain.uuid] = attachment.identity.pid
            self._hand_over(attachment, domain.uuid)
        self._found()
