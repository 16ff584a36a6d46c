"""The connection to one libvirt: made, watched, and made again.

Owns libvirt's event loop: one thread for the whole process, as libvirt wants it. Owns
each `LibvirtLink`'s connection, its event callbacks and whether it is up. libvirt's
calls may block forever, so each runs on a thread of its own and is waited for with a
limit. Promises that no call outlasts its limit, whatever the daemon does, and that
calls on a lost connection end with it (keepalive). Makes no decision about domains.

No connection ever has two calls at once. libvirt's client otherwise sometimes ends the
process with a segmentation fault, if the call that reads the socket returns before the
other (seen with 9.0; the race of CVE-2024-4418). While a call is stuck, others take a
further connection.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vmdedup.attach.monitor import one_line
from vmdedup.closing import Closing
from vmdedup.errors import UsageError, VmdedupError

T = TypeVar("T")

POLICY_NAMESPACE = "urn:vmdedup:policy:1"
"""Namespace of our element in a domain's <metadata>."""

_KEEPALIVE_S, _KEEPALIVE_MISSES = 2, 2
"""Seconds between probes, and probes that may go unanswered before libvirt closes the
connection, which ends all calls on it."""
_PING_S = 1.0
_KEPT_EVENTS = 1024
_CLOSE_S = 2.0
_MOST_IDLE = 4
"""Connections kept for further calls; more are opened only while calls are stuck."""

_CLOSED = ("error", "end of file", "keepalive timeout", "closed by us")
"""virConnectCloseReason."""

_QMP_EVENTS = {
    "MIGRATION",
    "RESET",
    "DEVICE_DELETED",
    "MEMORY_DEVICE_SIZE_CHANGE",
    "ACPI_DEVICE_OST",
}
"""QMP events that are passed on; others (clock, network filters) are frequent and irrelevant."""


class LinkDownError(VmdedupError):
    """There is no connection to libvirt now."""


@dataclass(frozen=True)
class DomainEvent:
    """Something happened to a domain, or (`uuid` "") to the connection itself."""

    kind: str
    """A lifecycle event (`started`, `stopped`…), `reboot`, `metadata`, `device`, `qmp`;
    for the connection, `connected` or `lost`."""
    uuid: str = ""
    name: str = ""
    detail: str = ""


Listener = Callable[[DomainEvent], None]

_DETAILS = {
    "started": ("booted", "migrated", "restored", "from snapshot", "woken up"),
    "suspended": (
        "paused",
        "migrated",
        "by an I/O error",
        "by the watchdog",
        "restored",
        "from snapshot",
        "by an API error",
        "postcopy",
        "postcopy failed",
    ),
    "resumed": ("unpaused", "migrated", "from snapshot", "postcopy"),
    "stopped": (
        "shut down",
        "destroyed",
        "crashed",
        "migrated",
        "saved",
        "failed",
        "from snapshot",
    ),
}
"""virDomainEvent…DetailType, in their order."""

_LIFECYCLE = (
    "defined",
    "undefined",
    "started",
    "suspended",
    "resumed",
    "stopped",
    "shutdown",
    "pmsuspended",
    "crashed",
)
"""virDomainEventType, in its order."""


@functools.cache
def bindings() -> tuple[Any, Any]:
    """The modules libvirt and libvirt_qemu, with the event loop running.

    Raises UsageError if they are not installed.
    """
    try:
        libvirt, libvirt_qemu = import_module("libvirt"), import_module("libvirt_qemu")
    except ImportError as error:
        raise UsageError(
            "libvirt's Python binding is not installed: pip install 'vmdedup[libvirt]'"
            " (it needs libvirt-dev and pkg-config)"
        ) from error
    # libvirt otherwise prints every error on stderr; we raise them.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def dispatch() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=dispatch, name="vmdedup-libvirt-events", daemon=True).start()
    return libvirt, libvirt_qemu


class _Call:
    """A blocking call on a thread of its own, which the caller may stop waiting for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="vmdedup-libvirt-call", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def is_done_within(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)

    def is_over(self) -> bool:
        """Whether the call has ended, successfully or not."""
        return self._done.is_set()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class UnansweredError(TimeoutError):
    """libvirt has not answered in time; `is_over` tells whether it has by now."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over


class _Channel:
    """A connection for one call at a time, and the domains looked up on it."""

    def __init__(self, connection: Any, generation: int) -> None:
        self.connection = connection
        self.generation = generation
        self._domains: dict[str, Any] = {}

    def domain(self, uuid: str) -> Any:
        if uuid not in self._domains:
            self._domains[uuid] = self.connection.lookupByUUIDString(uuid)
        return self._domains[uuid]

    def keep(self, uuids: Collection[str]) -> None:
        """Forget the other domains."""
        self._domains = {uuid: each for uuid, each in self._domains.items() if uuid in uuids}


@dataclass(frozen=True)
class _Ear:
    """Events heard of a domain, kept for one monitor."""

    uuid: str
    owner: object
    kept: deque[DomainEvent] = field(default_factory=lambda: deque(maxlen=_KEPT_EVENTS))


class LibvirtLink(Closing):
    """A connection to the libvirt at `uri`, which must be on this host. A context manager.

    `listener` receives events on one of libvirt's threads, and must not block.
    Raises UsageError for a URI of another host or another hypervisor.
    """

    def __init__(self, uri: str, listener: Listener = lambda _: None) -> None:
        address = urlsplit(uri)
        if not address.scheme.startswith("qemu") or address.hostname:
            raise UsageError(
                f"libvirt URI {uri}: name a libvirt of this host that runs QEMU (qemu:///system)"
            )
        self.uri = uri
        self.outage: str | None = "not connected yet"
        """Why there is no connection; `None` while there is one that answers."""
        self.since_unix_s = time.time()
        """When `outage` last changed, seconds since the epoch."""
        self.generation = 0
        """How many connections there have been so far."""
        self._listener = listener
        self._lock = threading.Lock()
        self._connection: Any = None
        self._idle: list[_Channel] = []
        self._attempt: _Call | None = None
        self._heard: list[_Ear] = []
        self._expected: Counter[tuple[str, str]] = Counter()
        self._closed = False

    def close(self) -> None:
        """Close the connection; domains are not touched. Idempotent."""
        with self._lock:
            self._closed = True
            self._connection = None
            idle, self._idle = self._idle, []
            self._say("closed")
        _close_all(idle).is_done_within(_CLOSE_S)  # the others close when their calls end

    def connect(self, timeout_s: float) -> None:
        """Connect unless connected; LinkDownError says in one line why that was not possible.

        An attempt that hangs continues on its own thread; the next call waits for it.
        """
        if self._connection is not None:
            return
        attempt = self._attempt or _Call(self._open)
        self._attempt = attempt
        if not attempt.is_done_within(timeout_s):
            self._say("its daemon does not answer")
            raise LinkDownError(f"libvirt {self.uri}: its daemon does not answer")
        self._attempt = None
        try:
            connection = attempt.result()
        except UsageError:
            raise
        except Exception as error:
            self._say(one_line(str(error)))
            raise LinkDownError(f"libvirt {self.uri}: {one_line(str(error))}") from error
        with self._lock:
            if self._closed:
                _Call(lambda: _close(connection))
                raise LinkDownError(f"libvirt {self.uri}: closed")
            self._connection = connection
            self._expected.clear()
            self.generation += 1
            self._idle = [_Channel(connection, self.generation)]
            self._say(None)
        self.tell(DomainEvent("connected", detail=self.uri))

    def _open(self) -> Any:
        """Open the connection that receives events."""
        libvirt, libvirt_qemu = bindings()
        connection = _open(self.uri)
        try:
            connection.registerCloseCallback(self._on_close, None)
            for event, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._teller("reboot")),
                (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._on_metadata),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, self._teller("device", "plugged")),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._teller("device", "unplugged")),
            ):
                connection.domainEventRegisterAny(None, event, callback, None)
            libvirt_qemu.qemuMonitorEventRegister(connection, None, None, self._on_qmp, None, 0)
        except BaseException:
            connection.close()
            raise
        return connection

    # --- calls ----------------------------------------------------------------------

    def call(self, work: Callable[[Any], T], timeout_s: float) -> T:
        """`work(connection)`, waited for at most `timeout_s`.

        Raises what `work` raises, TimeoutError, LinkDownError.
        """
        return self._call(lambda channel: work(channel.connection), timeout_s)

    def call_domain(self, uuid: str, work: Callable[[Any], T], timeout_s: float) -> T:
        """`work(domain)`, like `call`."""
        return self._call(lambda channel: work(channel.domain(uuid)), timeout_s)

    def _call(self, work: Callable[[_Channel], T], timeout_s: float) -> T:
        with self._lock:
            generation, outage = self.generation, self.outage
            if self._connection is None or outage is not None:
                raise LinkDownError(f"libvirt: {outage or 'not connected'}")
            idle = self._idle.pop() if self._idle else None
        call = _Call(lambda: self._work(work, generation, idle))
        if not call.is_done_within(timeout_s):
            self._ping(generation)
            raise UnansweredError(call.is_over)
        try:
            result: T = call.result()
        except Exception as error:
            if self._is_lost(error):
                self._lost(generation, one_line(str(error)))
                raise LinkDownError(f"libvirt: {self.outage}") from error
            raise
        return result

    def _work(self, work: Callable[[_Channel], T], generation: int, idle: _Channel | None) -> T:
        """`work` on a channel that no other call uses meanwhile."""
        channel = idle or _Channel(_open(self.uri), generation)
        try:
            return work(channel)
        finally:
            self._give_back(channel)

    def _give_back(self, channel: _Channel) -> None:
        with self._lock:
            is_current = channel.generation == self.generation and self._connection is not None
            hears = channel.connection is self._connection
            if is_current and (hears or len(self._idle) < _MOST_IDLE):
                channel.keep({ear.uuid for ear in self._heard})
                # The one that receives events goes last: it is taken first.
                self._idle.insert(len(self._idle) if hears else 0, channel)
                return
        _close(channel.connection)

    # --- events of domains ----------------------------------------------------------------

    def listen(self, uuid: str, owner: object) -> None:
        """Keep the events of a domain for its monitor, until `forget`."""
        with self._lock:
            self._heard.append(_Ear(uuid, owner))

    def heard(self, owner: object) -> list[DomainEvent]:
        """Events kept for a monitor since the last call."""
        kept = next((ear.kept for ear in self._heard if ear.owner is owner), deque())
        return [kept.popleft() for _ in range(len(kept))]

    def forget(self, owner: object) -> None:
        """Stop keeping events for a monitor that was closed."""
        with self._lock:
            self._heard = [ear for ear in self._heard if ear.owner is not owner]

    def expect(self, uuid: str, kind: str, times: int = 1) -> None:
        """Suppress the next `times` events of this kind: we cause them ourselves."""
        with self._lock:
            self._expected[uuid, kind] = max(0, self._expected[uuid, kind] + times)

    def tell(self, event: DomainEvent) -> None:
        """Pass an event on, unless it was expected."""
        with self._lock:
            if self._expected[event.uuid, event.kind]:
                self._expected[event.uuid, event.kind] -= 1
                return
            ears = [ear for ear in self._heard if ear.uuid == event.uuid]
        for ear in ears:
            ear.kept.append(event)
        self._listener(event)

    def _is_lost(self, error: Exception) -> bool:
        libvirt, _ = bindings()
        return isinstance(error, libvirt.libvirtError) and (
            error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)
            or error.get_error_code() == libvirt.VIR_ERR_INVALID_CONN
        )

    def _ping(self, generation: int) -> None:
        """After a call that took too long: find out whether the domain or the daemon is busy."""

        def ping() -> None:
            self._work(lambda channel: channel.connection.getLibVersion(), generation, None)
            with self._lock:
                back = self.outage is not None and self.generation == generation
                back = back and self._connection is not None
                if back:
                    self._say(None)
            if back:
                self.tell(DomainEvent("connected", detail="its daemon answers again"))

        if not _Call(ping).is_done_within(_PING_S):
            # If it answers yet, `ping` says so; if not, keepalive closes the connection.
            self._note_outage("its daemon does not answer")

    # --- the state of the connection ------------------------------------------------------

    def _say(self, outage: str | None) -> None:
        if self.outage != outage:
            self.outage = outage
            self.since_unix_s = time.time()

    def _note_outage(self, reason: str) -> None:
        with self._lock:
            news = self.outage != reason and not self._closed
            self._say(reason)
        if news:
            self.tell(DomainEvent("lost", detail=reason))

    def _lost(self, generation: int, reason: str) -> None:
        with self._lock:
            if self.generation != generation or self._connection is None:
                return
            self._connection = None
            idle, self._idle = self._idle, []
        _close_all(idle)
        self._note_outage(reason)

    # --- callbacks, on libvirt's thread ----------------------------------------------------

    def _on_close(self, connection: Any, reason: int, _opaque: object) -> None:
        word = _CLOSED[reason] if 0 <= reason < len(_CLOSED) else "closed"
        with self._lock:
            is_current = self._connection is connection
            generation = self.generation
        if is_current:
            self._lost(generation, f"the connection was lost ({word})")

    def _tell(self, kind: str, domain: Any, detail: str = "") -> None:
        name = one_line(domain.name(), 120)
        self.tell(DomainEvent(kind, domain.UUIDString(), name, one_line(detail, 120)))

    def _teller(self, kind: str, word: str = "") -> Callable[..., None]:
        def tell(_connection: Any, domain: Any, *rest: Any) -> None:
            self._tell(kind, domain, " ".join([word, *map(str, rest[:-1])]).strip())

        return tell

    def _on_lifecycle(
        self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object
    ) -> None:
        if 0 <= event < len(_LIFECYCLE):
            words = _DETAILS.get(_LIFECYCLE[event], ())
            self._tell(_LIFECYCLE[event], domain, "".join(words[detail : detail + 1]))

    def _on_metadata(
        self, _connection: Any, domain: Any, _kind: int, namespace: str | None, _opaque: object
    ) -> None:
        if namespace == POLICY_NAMESPACE:
            self._tell("metadata", domain)

    def _on_qmp(
        self,
        _connection: Any,
        domain: Any,
        event: str,
        _seconds: int,
        _micros: int,
        details: str | None,
        _opaque: object,
    ) -> None:
        if event in _QMP_EVENTS:
            self._tell("qmp", domain, f"{event} {_status(details)}".strip())


def _status(details: str | None) -> str:
    """The `status` member of an event's data (MIGRATION has one)."""
    try:
        data = json.loads(details or "{}")
    except ValueError:
        return ""
    return str(data.get("status", "")) if isinstance(data, dict) else ""


def _open(uri: str) -> Any:
    """A connection that ends if its daemon is silent for too long."""
    libvirt, _ = bindings()
    connection = libvirt.open(uri)
    connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_MISSES)
    return connection


def _close_all(channels: Sequence[_Channel]) -> _Call:
    def close() -> None:
        for channel in channels:
            _close(channel.connection)

    return _Call(close)


def _close(connection: Any) -> None:
    libvirt, _ = bindings()
    for end in (connection.unregisterCloseCallback, connection.close):
        with suppress(libvirt.libvirtError):  # it has none, or is lost already
            end()
