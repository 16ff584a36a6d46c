"""Following libvirt's domains: a thread that hears of them and attaches.

Owns the link to libvirt, connecting to it ever less often while it is away, and
the list of running domains, which it reads once after connecting and from then on
keeps by events, without polling. Promises what `scout` promises; what happened to
domains and to libvirt comes as notices, for the engine to act on. Touches no VM's
memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from vmdedup.attach.discover import Attachment, Unreachable
from vmdedup.attach.identity import VmPolicy
from vmdedup.attach.libvirt.discover import Domain, attach_domain, read_policy, running_domains
from vmdedup.attach.libvirt.link import DomainEvent, LibvirtLink, LinkDownError
from vmdedup.errors import UsageError, VmdedupError, VmError

_FIRST_RETRY_S = 0.5
_PARALLEL = 8
_END_LIMIT_S = 0.5
_NEVER_S = 3600.0

_STARTS = frozenset(("started", "resumed", "metadata", "device", "qmp", "suspended"))
"""Events after which a domain that could not be attached to is tried again at once."""
_ENDS = frozenset(("stopped", "crashed"))


@dataclass(frozen=True)
class Notice:
    """What the engine should know: an event, and the policy where that changed."""

    event: DomainEvent
    policy: VmPolicy | None = None


@dataclass
class _Failure:
    retry_at: float
    pause_s: float


class LibvirtScout:
    """Attaches to the running domains of the libvirt at `uri`. A context manager.

    `results` receives attachments and the unreachable, as the scout's. `found` is
    called after each, from the scout's thread. Raises UsageError for a bad URI.
    """

    def __init__(
        self,
        uri: str,
        *,
        results: SimpleQueue[Attachment | Unreachable],
        found: Callable[[], None],
        timeout_s: float,
        longest_retry_s: float,
    ) -> None:
        self.results = results
        self.notices: SimpleQueue[Notice] = SimpleQueue()
        self._events: SimpleQueue[DomainEvent | None] = SimpleQueue()
        self.link = LibvirtLink(uri, self._events.put)
        self._found = found
        self._timeout_s = timeout_s
        self._longest_retry_s = longest_retry_s
        self._connect_at = 0.0
        self._connect_pause_s = _FIRST_RETRY_S
        self._lock = threading.Lock()
        self._running: dict[str, Domain] = {}
        self._pids: dict[str, int] = {}
        """By UUID: the process that was attached to last."""
        self._handed: set[int] = set()
        self._known: frozenset[Path | int] = frozenset()
        self._failures: dict[str, _Failure] = {}
        self._let_go: dict[int, int] = {}
        self._looks_begun = 0
        self._looks_done = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="vmdedup-libvirt", daemon=True)

    def __enter__(self) -> LibvirtScout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._events.put(None)
        self._thread.join(_END_LIMIT_S)
        self.link.close()

    # --- what the engine says, from its thread ------------------------------------------

    def attached(self, keys: Collection[Path | int]) -> None:
        """These processes are attached: leave them alone."""
        keys = frozenset(keys)
        lost = self._known - keys
        self._known = keys
        for pid in lost:
            # Dropped for a reason that may last: not at once again.
            if isinstance(pid, int):
                self.refused(pid, None)

    def welcome(self, pid: int, socket_path: Path | None) -> None:
        """A VM was attached to on request: `leave_alone` is over."""
        self._let_go.pop(pid, None)

    def reach(self, name: str) -> Attachment | None:
        """Attach now to the running domain of that name or UUID; None when there is none.

        For the engine's thread, on request. Raises VmError.
        """
        for domain in list(self._running.values()):
            if name in (domain.name, domain.uuid):
                attachment = attach_domain(self.link, domain, self._timeout_s)
                self._pids[domain.uuid] = attachment.identity.pid
                return attachment
        return None

    def leave_alone(self, pid: int, socket_path: Path | None) -> None:
        """A VM was let go of on request: do not take it again by ourselves."""
        self._let_go[pid] = pid

    def refused(self, pid: int, socket_path: Path | None) -> None:
        """A VM that was found must not be merged now: look at it again later."""
        for uuid, known in list(self._pids.items()):
            if known == pid:
                self._fail(uuid)
                self._events.put(None)

    def taken(self, pid: int) -> None:
        """The engine has taken a result, or closed it."""
        with self._lock:
            self._handed.discard(pid)

    def look_now(self) -> int:
        """Try what is left at once; the look to ask `has_looked` about."""
        look = self._looks_begun + 1
        self._events.put(None)
        return look

    def has_looked(self, look: int) -> bool:
        """Whether this look is over and all its results have been taken."""
        return self._looks_done >= look and self.results.empty()

    # --- the scout's thread -----------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            self._looks_begun += 1
            self._connect_if_due()
            self._try_due()
            self._looks_done = self._looks_begun
            self._found()
            self._hear(self._pause_s())

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
        """How long until something is due by itself."""
        now = time.monotonic()
        if self.link.outage is not None:
            return max(0.0, self._connect_at - now)
        waiting = [
            self._failures[uuid].retry_at for uuid in self._running if uuid in self._failures
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
            self._connect_pause_s = min(self._longest_retry_s, 2 * self._connect_pause_s)
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
            # What was set while nobody heard of it.
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
        due = [domain for domain in self._running.values() if self._is_due(domain.uuid)]
        if due:
            # Side by side: one whose monitor is busy keeps the others waiting no longer.
            with ThreadPoolExecutor(min(_PARALLEL, len(due))) as pool:
                list(pool.map(self._try, due))

    def _is_due(self, uuid: str) -> bool:
        pid = self._pids.get(uuid)
        with self._lock:
            if pid is not None and (pid in self._known or pid in self._handed):
                return False
        if pid is not None and pid in self._let_go and os.path.exists(f"/proc/{pid}"):
            return False
        failure = self._failures.get(uuid)
        return failure is None or failure.retry_at <= time.monotonic()

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
            pid = attachment.identity.pid
            self._pids[domain.uuid] = pid
            with self._lock:
                is_new = pid not in self._known and pid not in self._handed
                if is_new:
                    self._handed.add(pid)
            if is_new:
                self.results.put(attachment)
            else:
                attachment.close()
        self._found()

    def _fail(self, uuid: str) -> None:
        before = self._failures.get(uuid)
        pause_s = (
            _FIRST_RETRY_S if before is None else min(self._longest_retry_s, before.pause_s * 2)
        )
        self._failures[uuid] = _Failure(time.monotonic() + pause_s, pause_s)
