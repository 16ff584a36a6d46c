"""Both ends of the channel over a real socket pair: bounds, order, broken peers."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.engine import CONTROLS, sharing, vm_report
from vmdedup.ipc.channel import (
    MAX_ENGINE_BYTES,
    MAX_REQUEST_BYTES,
    ChannelError,
    EngineChannel,
    ServerChannel,
    channel_pair,
)
from vmdedup.ipc.protocol import (
    ENGINE_FRAME,
    MAX_EVENTS,
    MAX_REQUESTS,
    ControlValues,
    Detach,
    Detached,
    EngineFrame,
    EngineHealth,
    Event,
    Refusal,
    ReplyFrame,
    Snapshot,
    SnapshotFrame,
    TakenFrame,
    frame_of,
)
from vmdedup.models import VmList

pytestmark = pytest.mark.process


def snapshot(passes: int = 0, vms: int = 1, *events: Event) -> Snapshot:
    return Snapshot(
        unix_s=time.time(),
        report=sharing([vm_report(f"vm{number}") for number in range(vms)]),
        vms=VmList(vms=[]),
        controls=ControlValues(values=CONTROLS),
        health=EngineHealth(engine_pid=1, started_unix_s=0, passes=passes),
        events=events,
    )


def event(seq: int) -> Event:
    return Event(seq=seq, unix_s=0, kind="attached", message="attached")


class RawPeer:
    """The server's end as a plain blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self.sock = sock

    def send(self, payload: bytes) -> None:
        self.sock.sendall(struct.pack(">I", len(payload)) + payload)

    def ask(self, number: int, within_s: float = 10.0) -> None:
        frame = frame_of(number, Detach(vm="web"), time.monotonic() + within_s)
        self.send(frame.model_dump_json().encode())

    def receive(self) -> EngineFrame:
        (length,) = struct.unpack(">I", self._exactly(4))
        return ENGINE_FRAME.validate_json(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self.sock.recv(length - len(received))
            assert part, "closed in the middle of a frame"
            received += part
        return received


@pytest.fixture
def ends() -> Iterator[tuple[EngineChannel, RawPeer]]:
    engine_end, server_end = channel_pair()
    with EngineChannel(engine_end) as channel, server_end:
        yield channel, RawPeer(server_end)


def readable(channel: EngineChannel) -> bool:
    return bool(select.select([channel], [], [], 0)[0])


def test_a_request_is_taken_and_answered(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    assert not readable(channel)
    peer.ask(7)
    assert readable(channel)
    (request,) = channel.poll()
    assert request.command == Detach(vm="web")
    channel.reply(request.id, Detached(vm="web", pid=1, merged_pages=2))
    assert peer.receive() == TakenFrame(id=7)
    answer = peer.receive()
    assert isinstance(answer, ReplyFrame)
    assert Detached.model_validate(answer.result).merged_pages == 2
    assert not readable(channel)


def test_each_request_is_answered_once(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    peer.ask(1)
    channel.poll()
    channel.refuse(1, Refusal(kind="busy", message="later"))
    with pytest.raises(KeyError):
        channel.refuse(1, Refusal(kind="busy", message="later"))


def test_a_request_that_is_too_late_is_not_begun(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    peer.ask(1, within_s=-1)
    peer.ask(2)
    assert [request.id for request in channel.poll()] == [2]
    assert peer.receive() == TakenFrame(id=2)


def test_requests_in_pieces_are_put_together(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    payload = frame_of(1, Detach(vm="web"), time.monotonic() + 10).model_dump_json().encode()
    stream = (struct.pack(">I", len(payload)) + payload) * 2
    got = 0
    for at in range(0, len(stream), 7):
        peer.sock.sendall(stream[at : at + 7])
        for request in channel.poll():
            channel.reply(request.id, Detached(vm="web", pid=1, merged_pages=0))
            got += 1
    assert got == 2


def test_a_server_that_reads_nothing_does_not_hold_the_engine(
    ends: tuple[EngineChannel, RawPeer],
) -> None:
    """Only the newest snapshot waits, every event and reply does, in the order promised."""
    channel, peer = ends
    peer.ask(1)
    channel.poll()
    pushes = 200
    for number in range(pushes):
        channel.push(snapshot(number, 100, event(number)))
        if number == pushes // 2:
            channel.reply(1, Detached(vm="web", pid=1, merged_pages=2))
    seen: list[int] = []
    events: list[int] = []
    passes_at_reply = None
    while passes_at_reply is None or seen[-1] < pushes - 1:
        frame = peer.receive()
        channel.poll()
        if isinstance(frame, SnapshotFrame):
            seen.append(frame.snapshot.health.passes)
            events += [each.seq for each in frame.snapshot.events]
        elif isinstance(frame, ReplyFrame):
            passes_at_reply = seen[-1]
    assert events == list(range(pushes))
    assert len(seen) < pushes, "the socket took all of it: nothing was superseded"
    assert passes_at_reply is not None
    assert passes_at_reply >= pushes // 2, "a reply came before the state it speaks of"
    assert not readable(channel)


def test_events_that_wait_are_bounded(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, _ = ends
    for number in range(3):
        batch = [event(number * MAX_EVENTS + each) for each in range(MAX_EVENTS)]
        channel.push(snapshot(number, 300, *batch))
    (waiting,) = channel._unsent
    assert isinstance(waiting, Snapshot)
    assert len(waiting.events) == MAX_EVENTS
    assert waiting.events[-1].seq == 3 * MAX_EVENTS - 1


def test_too_many_requests_are_an_error(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    for number in range(MAX_REQUESTS):
        peer.ask(number)
    assert len(channel.poll()) == MAX_REQUESTS
    peer.ask(MAX_REQUESTS)
    with pytest.raises(ChannelError, match="too many"):
        channel.poll()


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", MAX_REQUEST_BYTES + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 4) + b"null",
        struct.pack(">I", 3) + b"\xff\xfe{",
        struct.pack(">I", 0),
    ],
)
def test_what_is_no_request_is_an_error(ends: tuple[EngineChannel, RawPeer], sent: bytes) -> None:
    channel, peer = ends
    peer.sock.sendall(sent)
    with pytest.raises(ChannelError):
        channel.poll()


@pytest.mark.parametrize(
    ("operation", "body"), [("reboot", {}), ("detach", {}), ("detach", {"vm": "a", "more": 1})]
)
def test_a_request_of_the_wrong_shape_is_an_error(
    ends: tuple[EngineChannel, RawPeer], operation: str, body: object
) -> None:
    channel, peer = ends
    frame = {"id": 1, "operation": operation, "begin_before_monotonic_s": 1e18, "body": body}
    peer.send(json.dumps(frame).encode())
    with pytest.raises(ChannelError):
        channel.poll()


def test_a_server_that_is_gone_is_an_error(ends: tuple[EngineChannel, RawPeer]) -> None:
    channel, peer = ends
    peer.ask(1)
    channel.poll()
    peer.sock.close()
    assert readable(channel)
    with pytest.raises(ChannelError):
        channel.poll()
    with pytest.raises(ChannelError):
        channel.push(snapshot())
    with pytest.raises(ChannelError):
        channel.reply(1, Detached(vm="web", pid=1, merged_pages=2))


@pytest.mark.parametrize(
    "sent", [struct.pack(">I", MAX_ENGINE_BYTES + 1), struct.pack(">I", 4) + b"null"]
)
def test_the_server_refuses_what_is_no_frame(sent: bytes) -> None:
    async def follow() -> None:
        engine_end, server_end = channel_pair()
        with engine_end:
            channel = await ServerChannel.open(server_end)
            engine_end.sendall(sent)
            try:
                with pytest.raises(ChannelError):
                    await asyncio.wait_for(anext(channel.frames()), 10)
            finally:
                channel.close()

    asyncio.run(follow())


def test_the_server_sees_the_end_also_in_the_middle_of_a_frame(tmp_path: Path) -> None:
    async def follow() -> list[EngineFrame]:
        engine_end, server_end = channel_pair()
        channel = await ServerChannel.open(server_end)
        engine_end.sendall(struct.pack(">I", 100) + b"half")
        engine_end.close()
        try:
            async with asyncio.timeout(10):
                return [frame async for frame in channel.frames()]
        finally:
            channel.close()

    assert asyncio.run(follow()) == []
