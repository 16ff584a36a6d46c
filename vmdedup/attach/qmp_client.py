"""The way to a connected QMP client: the socket, the greeting, the negotiation.

Owns the reasons why a socket gives no client, in one line each. Promises that no answer meant
for an earlier client is taken for ours, that events are kept within bounds, and that nothing
outlasts its timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import select
import socket
import stat
import struct
import time
from collections import deque
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient
from qemu.qmp.error import ProtocolError, QMPError
from qemu.qmp.message import Message
from qemu.qmp.models import Greeting
from qemu.qmp.qmp_client import NegotiationError

from vmdedup.attach import monitor_loop as event_loop
from vmdedup.attach.monitor import one_line
from vmdedup.errors import AttachError, VmdedupError

EVENT_QUEUE = 1024
"""Events kept until `events` is called; older ones are dropped first."""

_SUN_PATH_BYTES = 107
"""Longest path of a Unix socket address (sizeof sun_path less its terminating zero)."""
_QUEUE_FULL_S = 0.02
"""Pause between tries while the socket's queue is full of clients before us."""
_STALE_MESSAGES = 64
"""Most answers to earlier clients that are skipped while connecting."""

WIRE_ERRORS = (QMPError, OSError, EOFError, ValueError, TypeError, AssertionError, RuntimeError)
"""Exceptions of qemu.qmp if a peer misbehaves or hangs up, including its assertions."""

_quiet = logging.getLogger("vmdedup.attach.qmp_client.wire")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False

_BUSY = (
    "monitor busy: no greeting within {seconds:g} s (a QMP socket serves one client at a time; "
    "give vmdedup its own: -qmp unix:PATH,server=on,wait=off)"
)


class BusyError(AttachError):
    """QEMU serves another client on that socket."""


class QmpEvents(EventListener):
    """A bounded queue; the library's own keeps every event forever."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[dict[str, Any]] = deque(maxlen=EVENT_QUEUE)
        self.resumes = 0
        """RESUME events so far."""

    async def put(self, event: Message) -> None:
        self.resumes += event.get("event") == "RESUME"
        self.kept.append(dict(event))


class QmpClient(QMPClient):
    """QMPClient that skips answers meant for an earlier client while it connects."""

    def __init__(self, name: str, token: str, events: QmpEvents) -> None:
        super().__init__(name)
        self.logger = _quiet
        self._token = token
        # The library's default listener keeps every event forever.
        self.events: QmpEvents = events
        self._listeners = [self.events]

    def _cb_outbound(self, msg: Message) -> Message:
        return msg  # the library's own prints each message for a log that nobody reads

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _get_greeting(self) -> Greeting:
        for _ in range(_STALE_MESSAGES):
            message = await self._recv()
            if "QMP" in message or not message.keys() & {"return", "error", "event"}:
                return Greeting(message)
        raise ProtocolError("no greeting among the first messages")

    async def _negotiate(self) -> None:
        own = f"{self._token}0"
        await self._send(Message({"execute": "qmp_capabilities", "id": own}))
        for _ in range(_STALE_MESSAGES):
            message = await self._recv()
            if message.get("id") == own:
                if "return" in message:
                    return
                break
        raise NegotiationError("negotiation failed", ProtocolError("qmp_capabilities refused"))


def draw_token() -> str:
    """A word that begins the ids of one connection and of no other.

    Short: QEMU reads a monitor byte by byte, some microseconds each (monitor/monitor.c:
    monitor_can_read).
    """
    return secrets.token_urlsafe(6)


def converse(
    vm: str,
    path: Path,
    loop: asyncio.AbstractEventLoop,
    token: str,
    events: QmpEvents,
    timeout_s: float,
) -> tuple[QmpClient, tuple[int, int]]:
    """A connected client of the QMP socket at `path`, and its peer's (pid, uid).

    Raises AttachError, which says in one line why there is none.
    """
    deadline = time.monotonic() + timeout_s
    connection = _open_socket(vm, path, timeout_s)
    try:
        peer = peer_of(vm, connection)
        _await_greeting(vm, connection, peer[0], timeout_s)
        client = QmpClient(vm, token, events)
        connection.setblocking(False)
        remaining = max(0.1, deadline - time.monotonic())
        event_loop.call(loop, _connected(client, connection), remaining)
    except VmdedupError:
        connection.close()
        raise
    except TimeoutError as error:
        connection.close()
        reason = f"no complete QMP handshake within {timeout_s:g} s"
        raise AttachError(vm, reason, pid=peer[0]) from error
    except WIRE_ERRORS as error:
        connection.close()
        garbage = isinstance(getattr(error, "exc", None), ProtocolError | ValueError)
        what = "its greeting is not QMP" if garbage else "the peer closed it"
        raise AttachError(vm, f"not a QMP socket ({what})", pid=peer[0]) from error
    return client, peer


async def _connected(client: QMPClient, connection: socket.socket) -> None:
    try:
        await client.connect(connection)
    except AssertionError:  # it hung up at the very moment the session was established
        with contextlib.suppress(*WIRE_ERRORS):
            await client.disconnect()
        raise


def _open_socket(vm: str, path: Path, timeout_s: float) -> socket.socket:
    """A connected Unix socket, or the AttachError that says why there is none."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AttachError(vm, "no socket there") from error
    except PermissionError as error:
        raise AttachError(vm, "permission denied (run as root or as QEMU's user)") from error
    except (OSError, ValueError) as error:
        raise AttachError(vm, f"cannot be looked at: {one_line(str(error))}") from error
    if not stat.S_ISSOCK(mode):
        raise AttachError(vm, "not a socket")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        _connect(connection, path, timeout_s)
    except OSError as error:
        connection.close()
        kind = BusyError if error.errno == errno.EAGAIN else AttachError
        raise kind(vm, _connect_reason(error, timeout_s)) from error
    return connection


def _connect(connection: socket.socket, path: Path, timeout_s: float) -> None:
    name = os.fsencode(path)
    if len(name) <= _SUN_PATH_BYTES:
        _connect_in_turn(connection, name, timeout_s)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = os.fsencode(f"/proc/self/fd/{folder}/{path.name}")
        _connect_in_turn(connection, short, timeout_s)
    finally:
        os.close(folder)


def _connect_in_turn(connection: socket.socket, name: bytes, timeout_s: float) -> None:
    """Connect; while QEMU's short queue of clients is full, try again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.connect(name)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_QUEUE_FULL_S)


def _connect_reason(error: OSError, timeout_s: float) -> str:
    match error.errno:
        case errno.ECONNREFUSED:
            return "connection refused (a stale socket: nothing listens there any more)"
        case errno.EACCES | errno.EPERM:
            return "permission denied (run as root or as QEMU's user)"
        case errno.EAGAIN:
            return _BUSY.format(seconds=timeout_s)
        case errno.EPROTOTYPE:
            return "not a QMP socket (not a stream socket)"
        case _:
            return f"cannot connect: {one_line(os.strerror(error.errno or 0))}"


def peer_of(vm: str, connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that listens on the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    if pid <= 0:
        raise AttachError(vm, "its process cannot be seen from here (another pid namespace)")
    return pid, uid


def _await_greeting(vm: str, connection: socket.socket, pid: int, timeout_s: float) -> None:
    """Wait for the first bytes without taking them; AttachError unless they can be QMP."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        raise BusyError(vm, _BUSY.format(seconds=timeout_s), pid=pid)
    try:
        first = connection.recv(256, socket.MSG_PEEK)
    except OSError as error:
        raise AttachError(vm, "not a QMP socket (the peer closed it)") from error
    if not first:
        raise AttachError(vm, "not a QMP socket (the peer closed it)")
    if not first.lstrip().startswith(b"{"):
        human = b"QEMU" in first and b"monitor" in first
        kind = "a human monitor: use -qmp" if human else "it sends no JSON greeting"
        raise AttachError(vm, f"not a QMP socket ({kind})")
