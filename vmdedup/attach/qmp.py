"""QMP sockets: connecting, commands, descriptors, events.

Owns `QmpMonitor`, the synchronous face of qemu.qmp's QMPClient. Promises that no call
outlasts its timeout and that a peer that misbehaves costs at most its own connection.
Each command carries an id that no earlier client of the socket can have used: QEMU
hands the answer to a dead client's command to the next client. Refuses sockets that do
not speak QMP, with one line that says what they are.
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
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError
from qemu.qmp import EventListener, QMPClient
from qemu.qmp.error import ProtocolError, QMPError
from qemu.qmp.message import Message
from qemu.qmp.models import Greeting
from qemu.qmp.qmp_client import NegotiationError

from vmdedup.attach import lent_fds, replies
from vmdedup.attach import monitor_loop as event_loop
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S, Monitor, answer_or_refusal, one_line
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.silence import Silence
from vmdedup.closing import Closing
from vmdedup.errors import AttachError, MonitorError, VmdedupError, VmGoneError

CONNECT_TIMEOUT_S = 3.0
EVENT_QUEUE = 1024
"""Events kept until `events` is called; older ones are dropped first."""

_SUN_PATH_BYTES = 107
"""Longest path of a Unix socket address (sizeof sun_path less its terminating zero)."""
_DEATH_WAIT_MS = 1000
"""Wait for a process to end: it closes its files a moment before it counts as ended."""
_UNWIND_S = 1.0
"""Longer than an abandoned command needs to unwind."""
_QUEUE_FULL_S = 0.02
"""Pause between tries while the socket's queue is full of clients before us."""
_STALE_MESSAGES = 64
"""Most answers to earlier clients that are skipped while connecting."""

T = TypeVar("T")

_WIRE_ERRORS = (QMPError, OSError, EOFError, ValueError, TypeError, AssertionError, RuntimeError)
"""Exceptions of qemu.qmp if a peer misbehaves or hangs up, including its assertions."""

_quiet = logging.getLogger("vmdedup.attach.qmp.wire")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False

_BUSY = (
    "monitor busy: no greeting within {seconds:g} s (a QMP socket serves one client at a time; "
    "give vmdedup its own: -qmp unix:PATH,server=on,wait=off)"
)


class BusyError(AttachError):
    """QEMU serves another client on that socket."""


class Events(EventListener):
    """A bounded queue; the library's own keeps every event forever."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[dict[str, Any]] = deque(maxlen=EVENT_QUEUE)

    async def put(self, event: Message) -> None:
        self.kept.append(dict(event))


class _Client(QMPClient):
    """QMPClient that skips answers meant for an earlier client while it connects."""

    def __init__(self, name: str, token: str, events: Events) -> None:
        super().__init__(name)
        self.logger = _quiet
        self._token = token
        # The library's default listener keeps every event forever.
        self.events: Events = events
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


class QmpMonitor(Monitor, Closing):
    """One VM's QMP monitor; see `monitor.Monitor` for what each call promises.

    Made by `connect` or `adopt`. A context manager.
    """

    def __init__(
        self,
        vm: str,
        client: QMPClient,
        loop: asyncio.AbstractEventLoop,
        *,
        peer: tuple[int, int],
        owned: bool,
        token: str,
        socket_path: Path | None,
    ) -> None:
        self.vm = vm
        self.silence = Silence()
        self.socket_path = socket_path
        self._client = client
        self._loop = loop
        self._pid, self.peer_uid = peer
        self._owned = owned
        self._token = token
        self._sent = 0
        self._lock = threading.Lock()
        self._fd_lock = threading.Lock()
        self._closed = False
        self._events = Events()
        self._pidfd = _pidfd(vm, self._pid)
        lent_fds.opened(token)
        try:
            if isinstance(client, _Client):
                self._events = client.events
            else:
                client.register_listener(self._events)
            self._version = self._read_version()
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls, path: str | Path, loop: MonitorLoop, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Self:
        """Connect to the QMP socket at `path`; AttachError says in one line why not."""
        path = Path(path)
        vm = str(path)
        token = _draw_token()
        client, peer = converse(vm, path, loop.loop, token, Events(), timeout_s)
        return cls(vm, client, loop.loop, peer=peer, owned=True, token=token, socket_path=path)

    @classmethod
    def adopt(
        cls, client: QMPClient, loop: asyncio.AbstractEventLoop, *, vm: str = "adopted monitor"
    ) -> QmpMonitor:
        """Use a client that the caller connected and whose `loop` runs in another thread.

        It stays the caller's: `close` does not disconnect it.
        """
        writer = client._writer  # the library has no accessor for its socket
        connection = None if writer is None else writer.get_extra_info("socket")
        if connection is None:
            raise AttachError(vm, "the given QMPClient is not connected")
        if connection.family != socket.AF_UNIX:
            raise AttachError(vm, "the given QMPClient is not on a unix socket")
        peer = _peer(vm, connection)
        name = connection.getpeername()
        path = Path(name) if isinstance(name, str) and name else None
        token = _draw_token()
        return cls(
            str(path or vm), client, loop, peer=peer, owned=False, token=token, socket_path=path
        )

    @property
    def peer_pid(self) -> int:
        """Process id of the peer when the socket was connected (SO_PEERCRED)."""
        return self._pid

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, from the greeting."""
        return self._version

    def _read_version(self) -> tuple[int, int, int]:
        greeting = self._client.greeting
        try:
            if greeting is not None:
                raw = greeting._asdict()
                return replies.GreetingReply.validate_python(raw).body.version.qemu.as_tuple()
        except ValidationError as error:
            raise AttachError(
                self.vm, "not a QEMU (it speaks QMP but names no QEMU version)", pid=self._pid
            ) from error
        return self.query("query-version", replies.VersionReply).qemu.as_tuple()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> object:
        """Run a QMP command; see `Monitor.execute`."""
        return self._execute(command, arguments, None, timeout_s)

    def execute_all(
        self,
        commands: Sequence[tuple[str, Mapping[str, object] | None]],
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> list[object]:
        """Send all commands at once; see `Monitor.execute_all`."""
        if not commands:
            return []
        names = [command for command, _ in commands]
        messages = [self._message(*each) for each in commands]
        answers = self._call(", ".join(names), partial(self._send_all, messages), timeout_s)
        return [
            answer_or_refusal(partial(self._result, *each))
            for each in zip(names, answers, strict=True)
        ]

    def add_fd(self, fd: int, opaque: str, fdset_id: int | None = None) -> tuple[int, int]:
        """Pass a copy of `fd` by SCM_RIGHTS; (fd set id, number inside QEMU)."""
        # QEMU pairs the last descriptor it received with the next add-fd.
        with self._fd_lock:
            wanted = lent_fds.fresh_fdset() if fdset_id is None else fdset_id
            arguments = {"fdset-id": wanted, "opaque": lent_fds.label_of(opaque, self._token)}
            answer = self._execute("add-fd", arguments, fd, COMMAND_TIMEOUT_S)
        try:
            added = replies.AddedFdReply.validate_python(answer)
        except ValidationError as error:
            raise MonitorError(self.vm, "add-fd", "unexpected reply", pid=self._pid) from error
        return added.fdset_id, added.fd

    def events(self) -> list[dict[str, Any]]:
        """Events since the last call."""
        kept = self._events.kept
        taken: list[dict[str, Any]] = []
        with contextlib.suppress(IndexError):
            while len(taken) < EVENT_QUEUE:
                taken.append(kept.popleft())
        return taken

    def close(self) -> None:
        """Disconnect (an adopted client stays connected). Idempotent."""
        if self._closed:
            return
        self._closed = True
        lent_fds.closed(self._token)
        with contextlib.suppress(Exception):  # a broken connection reports itself here again
            if self._owned:
                event_loop.call(self._loop, self._client.disconnect(), CONNECT_TIMEOUT_S)
            else:
                event_loop.call(self._loop, self._forget_listener(), CONNECT_TIMEOUT_S)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def _forget_listener(self) -> None:
        self._client.remove_listener(self._events)

    def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        fd: int | None,
        timeout_s: float,
    ) -> object:
        message = self._message(command, arguments)
        answer = self._call(command, partial(self._send, message, fd), timeout_s)
        return self._result(command, answer)

    def _message(self, command: str, arguments: Mapping[str, object] | None) -> dict[str, object]:
        if self._closed:
            raise MonitorError(self.vm, command, "the monitor was closed", pid=self._pid)
        self.require_answering(command)
        with self._lock:
            self._sent += 1
            message: dict[str, object] = {"execute": command, "id": f"{self._token}{self._sent}"}
        if arguments is not None:
            message["arguments"] = dict(arguments)
        return message

    def _call(
        self, command: str, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float
    ) -> T:
        try:
            in_time = self._within(command, work, timeout_s)
            return event_loop.call(self._loop, in_time, timeout_s + _UNWIND_S)
        except TimeoutError as error:
            self._raise_if_gone(wait_ms=0)
            reason = f"no answer within {timeout_s:g} s"
            raise MonitorError(self.vm, command, reason, pid=self._pid, unanswered=True) from error
        except _WIRE_ERRORS as error:
            self._raise_if_gone(wait_ms=_DEATH_WAIT_MS)
            reason = "the monitor connection was lost"
            raise MonitorError(self.vm, command, reason, pid=self._pid) from error

    async def _within(
        self, command: str, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float
    ) -> T:
        """The result of `work`; TimeoutError if it takes longer, while it continues."""
        task = asyncio.ensure_future(work())
        try:
            return await asyncio.wait_for(asyncio.shield(task), timeout_s)
        except TimeoutError:
            task.add_done_callback(_forget)
            self._note_unanswered(command, timeout_s, task.done)
            raise

    def _note_unanswered(self, command: str, waited_s: float, is_over: Callable[[], bool]) -> None:
        self.silence.note(command, waited_s, is_over)

    async def _send_all(self, messages: Sequence[dict[str, object]]) -> list[Mapping[str, object]]:
        return await asyncio.gather(*(self._send(message, None) for message in messages))

    async def _send(self, message: dict[str, object], fd: int | None) -> Mapping[str, object]:
        if fd is not None:
            self._client.send_fd_scm(fd)
        # `_raw` and not `execute`: only it lets the caller choose the id.
        return await self._client._raw(message, assign_id=False)

    def _result(self, command: str, reply: Mapping[str, object]) -> object:
        if "error" in reply:
            try:
                error = replies.ErrorReply.validate_python(reply["error"])
            except ValidationError as problem:
                raise MonitorError(self.vm, command, "unexpected reply", pid=self._pid) from problem
            raise MonitorError(
                self.vm,
                command,
                one_line(error.description) or "failed",
                pid=self._pid,
                error_class=one_line(error.error_class, 64) or "GenericError",
            )
        if "return" not in reply:
            raise MonitorError(self.vm, command, "unexpected reply", pid=self._pid)
        return reply["return"]

    def _raise_if_gone(self, wait_ms: int) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(wait_ms):
            raise VmGoneError(self.vm, "the VM's process ended", pid=self._pid)


def _forget(task: asyncio.Task[Any]) -> None:
    """Discard the outcome of a command that is no longer waited for."""
    if not task.cancelled():
        task.exception()


def _draw_token() -> str:
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
    events: Events,
    timeout_s: float,
) -> tuple[_Client, tuple[int, int]]:
    """A connected client of the QMP socket at `path`, and its peer's (pid, uid).

    Raises AttachError, which says in one line why there is none.
    """
    deadline = time.monotonic() + timeout_s
    connection = _open_socket(vm, path, timeout_s)
    try:
        peer = _peer(vm, connection)
        _await_greeting(vm, connection, peer[0], timeout_s)
        client = _Client(vm, token, events)
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
    except _WIRE_ERRORS as error:
        connection.close()
        garbage = isinstance(getattr(error, "exc", None), ProtocolError | ValueError)
        what = "its greeting is not QMP" if garbage else "the peer closed it"
        raise AttachError(vm, f"not a QMP socket ({what})", pid=peer[0]) from error
    return client, peer


async def _connected(client: QMPClient, connection: socket.socket) -> None:
    try:
        await client.connect(connection)
    except AssertionError:  # it hung up at the very moment the session was established
        with contextlib.suppress(*_WIRE_ERRORS):
            await client.disconnect()
        raise


def _pidfd(vm: str, pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise AttachError(vm, "the process behind the socket has ended", pid=pid) from error


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


def _peer(vm: str, connection: socket.socket) -> tuple[int, int]:
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
