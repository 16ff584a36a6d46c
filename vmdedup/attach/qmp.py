"""QMP sockets: commands, descriptors, events.

Owns `QmpMonitor`, the synchronous face of qemu.qmp's QMPClient. Promises that no call
outlasts its timeout and that a peer that misbehaves costs at most its own connection.
Each command carries an id that no earlier client of the socket can have used: QEMU
hands the answer to a dead client's command to the next client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError
from qemu.qmp import QMPClient

from vmdedup.attach import lent_fds, replies
from vmdedup.attach import monitor_loop as event_loop
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S, Monitor, answer_or_refusal, one_line
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.qmp_client import (
    EVENT_QUEUE,
    WIRE_ERRORS,
    QmpClient,
    QmpEvents,
    converse,
    draw_token,
    peer_of,
)
from vmdedup.attach.silence import Silence
from vmdedup.closing import Closing
from vmdedup.errors import AttachError, MonitorError, VmGoneError

CONNECT_TIMEOUT_S = 3.0
_DEATH_WAIT_MS = 1000
"""Wait for a process to end: it closes its files a moment before it counts as ended."""
_UNWIND_S = 1.0
"""Longer than an abandoned command needs to unwind."""

T = TypeVar("T")


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
        self._events = QmpEvents()
        self._pidfd = _pidfd(vm, self._pid)
        lent_fds.opened(token)
        try:
            if isinstance(client, QmpClient):
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
        token = draw_token()
        client, peer = converse(vm, path, loop.loop, token, QmpEvents(), timeout_s)
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
        peer = peer_of(vm, connection)
        name = connection.getpeername()
        path = Path(name) if isinstance(name, str) and name else None
        token = draw_token()
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

    @property
    def resumes(self) -> int | None:
        """How often the VM was resumed since connecting; `None` if events are missed."""
        return None if self.misses_events else self._events.resumes

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
        except WIRE_ERRORS as error:
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


def _pidfd(vm: str, pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise AttachError(vm, "the process behind the socket has ended", pid=pid) from error
