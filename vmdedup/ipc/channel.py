"""The socket between engine and API server: JSON frames, each after its length.

Owns the framing and both ends. The engine's end never blocks and is safe for several
threads. It keeps what the server does not read: only the newest snapshot, and at most
one reply per request taken. The server's end is asyncio. Both refuse frames over their
bound; a peer that is gone, or that sends anything but frames, is a ChannelError, never
a hang.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import AsyncIterator

from vmdedup.closing import Closing
from vmdedup.errors import VmdedupError
from vmdedup.ipc.protocol import (
    ENGINE_FRAME,
    MAX_EVENTS,
    MAX_REQUESTS,
    EngineFrame,
    Refusal,
    ReplyFrame,
    Request,
    RequestFrame,
    Snapshot,
    SnapshotFrame,
    TakenFrame,
    command_of,
)
from vmdedup.models import Model

MAX_REQUEST_BYTES = 512 << 10
"""Most bytes of a frame to the engine: an API body and its escapes."""

MAX_ENGINE_BYTES = 64 << 20
"""Most bytes of a frame from the engine: the matrix of 2,000 VMs."""

_LENGTH = struct.Struct(">I")
_RECV_BYTES = 64 << 10
_RECVS_PER_POLL = 16


class ChannelError(VmdedupError):
    """The other end is gone or sent something else than a frame; the channel is unusable."""


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Connected sockets: the engine's end and the server's, both close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def _packed(frame: Model, limit_bytes: int) -> bytes:
    payload = frame.model_dump_json().encode()
    if len(payload) > limit_bytes:
        raise ChannelError(f"a frame of {len(payload)} bytes is over the limit of {limit_bytes}")
    return _LENGTH.pack(len(payload)) + payload


class EngineChannel(Closing):
    """The engine's end. Owns `sock`.

    Wait on `fileno()` for reading: it is readable when `poll` has work, be it
    a request that has come or unsent frames that can be sent. After a
    ChannelError only `close` is of use.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lock = threading.Lock()
        self._received = bytearray()
        self._sending: memoryview | None = None
        self._unsent: deque[bytes | Snapshot] = deque()
        self._taken: set[int] = set()
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)

    def fileno(self) -> int:
        """A descriptor to wait on for reading."""
        return self._epoll.fileno()

    def is_ready(self) -> bool:
        """Whether `poll` has work now."""
        return bool(self._epoll.poll(0))

    def close(self) -> None:
        """Close the socket: the server sees that the engine is gone. Idempotent."""
        with self._lock:
            self._epoll.close()
            self._sock.close()

    def poll(self) -> list[Request]:
        """The requests that have come; also sends frames that could not be sent before.

        Each must be answered once with `reply` or `refuse`. Omits requests whose client
        was already told that nothing was begun. Raises ChannelError.
        """
        with self._lock:
            self._send()
            requests: list[Request] = []
            for _ in range(_RECVS_PER_POLL):
                try:
                    received = self._sock.recv(_RECV_BYTES)
                except BlockingIOError:
                    break
                except OSError as error:
                    raise ChannelError(f"API server: {error.strerror}") from error
                if not received:
                    raise ChannelError("the API server has closed the channel")
                self._received += received
                self._take_frames(requests)
            self._send()
        return requests

    def reply(self, request_id: int, result: Model) -> None:
        """Answer a request; a snapshot pushed before lets the client's next read show the change.

        Raises ChannelError; KeyError if `request_id` waits for no answer.
        """
        self._answer(ReplyFrame(id=request_id, result=result.model_dump(mode="json")))

    def refuse(self, request_id: int, refusal: Refusal) -> None:
        """Answer that a request was not fulfilled. Raises as `reply` does."""
        self._answer(ReplyFrame(id=request_id, refusal=refusal))

    def push(self, snapshot: Snapshot) -> None:
        """Send the state, in place of an older one whose sending has not begun.

        Raises ChannelError.
        """
        with self._lock:
            for place, waiting in enumerate(self._unsent):
                if isinstance(waiting, Snapshot):
                    events = (waiting.events + snapshot.events)[-MAX_EVENTS:]
                    self._unsent[place] = snapshot.model_copy(update={"events": events})
                    break
            else:
                self._unsent.append(snapshot)
            self._send()

    def _answer(self, frame: ReplyFrame) -> None:
        with self._lock:
            self._taken.remove(frame.id)
            self._unsent.append(_packed(frame, MAX_ENGINE_BYTES))
            self._send()

    def _take_frames(self, requests: list[Request]) -> None:
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_REQUEST_BYTES:
                raise ChannelError(f"API server: a frame of {length} bytes is too big")
            end = _LENGTH.size + length
            if len(self._received) < end:
                return
            payload = bytes(self._received[_LENGTH.size : end])
            del self._received[:end]
            try:
                frame = RequestFrame.model_validate_json(payload)
                command = command_of(frame)
            except ValueError as error:
                raise ChannelError(f"API server: not a request: {error}") from error
            if frame.id in self._taken or len(self._taken) >= MAX_REQUESTS:
                raise ChannelError(f"API server: request {frame.id} is one too many")
            if time.monotonic() < frame.begin_before_monotonic_s:
                self._taken.add(frame.id)
                self._unsent.append(_packed(TakenFrame(id=frame.id), MAX_ENGINE_BYTES))
                requests.append(Request(frame.id, command))

    def _send(self) -> None:
        try:
            while self._sending or self._unsent:
                if not self._sending:
                    first = self._unsent.popleft()
                    if isinstance(first, Snapshot):
                        first = _packed(SnapshotFrame(snapshot=first), MAX_ENGINE_BYTES)
                    self._sending = memoryview(first)
                self._sending = self._sending[self._sock.send(self._sending) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelError(f"API server: {error.strerror}") from error
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._sending else 0)
        self._epoll.modify(self._sock, wanted)


class ServerChannel:
    """The API server's end, in an asyncio loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> ServerChannel:
        """Take over a connected socket."""
        return cls(*await asyncio.open_connection(sock=sock))

    def send(self, frame: RequestFrame) -> None:
        """Send a request. The caller keeps to MAX_REQUESTS, which bounds what waits."""
        self._writer.write(_packed(frame, MAX_REQUEST_BYTES))

    async def frames(self) -> AsyncIterator[EngineFrame]:
        """Frames from the engine, until it is gone. Raises ChannelError for anything else."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > MAX_ENGINE_BYTES:
                    raise ChannelError(f"engine: a frame of {length} bytes is too big")
                payload = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, OSError):
                return
            try:
                frame = ENGINE_FRAME.validate_json(payload)
            except ValueError as error:
                raise ChannelError(f"engine: not a frame: {error}") from error
            yield frame

    def close(self) -> None:
        """Close the socket."""
        self._writer.close()
