"""The API server's view of the engine: its last snapshot, its events, its answers.

Owns the wait for the engine and every reason not to wait: it is gone, it is busy, too
many requests are under way. Promises that a refusal of the kind `busy` means that
nothing was begun. Each part of a snapshot is made into bytes at most once, however many
clients ask for it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from vmdedup.errors import VmdedupError
from vmdedup.ipc.channel import ServerChannel
from vmdedup.ipc.protocol import (
    MAX_EVENTS,
    MAX_REQUESTS,
    Command,
    Event,
    EventList,
    Health,
    Refusal,
    ReplyFrame,
    Snapshot,
    SnapshotFrame,
    frame_of,
)
from vmdedup.models import Model

TAKE_LIMIT_S = 15.0
"""Longest wait until the engine takes a request; it looks for some between two batches."""

_TAKE_GRACE_S = 1.0
"""Additional time for the engine's word that it took a request in time."""

_FIRST_SNAPSHOT_LIMIT_S = 3.0

_Result = TypeVar("_Result", bound=Model)
_Settled = TypeVar("_Settled")


class RefusedByEngineError(VmdedupError):
    """The engine did not carry out the request; `refusal` has its kind."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _busy(message: str) -> RefusedByEngineError:
    return RefusedByEngineError(Refusal(kind="busy", message=message))


@dataclass(frozen=True)
class _Pending:
    taken: asyncio.Future[None]
    reply: asyncio.Future[ReplyFrame]


class EngineLink:
    """The routes' view of the engine. Belongs to one asyncio loop."""

    def __init__(self, channel: ServerChannel, version: str) -> None:
        self.version = version
        self._channel = channel
        self._snapshot: Snapshot | None = None
        self._arrived_monotonic_s = 0.0
        self._bytes: dict[str, bytes] = {}
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._news = asyncio.Condition()
        self._pending: dict[int, _Pending] = {}
        self._ids = itertools.count(1)
        self._gone = False

    async def run(self) -> None:
        """Receive the engine's frames until it is gone; then wake all requests that wait.

        Raises ChannelError if it sends anything but frames.
        """
        try:
            async for frame in self._channel.frames():
                if isinstance(frame, SnapshotFrame):
                    await self._take_snapshot(frame.snapshot)
                elif pending := self._pending.get(frame.id):
                    if isinstance(frame, ReplyFrame):
                        _settle(pending.reply, frame)
                    else:
                        _settle(pending.taken, None)
        finally:
            self._gone = True
            self._channel.close()
            for pending in self._pending.values():
                for future in (pending.taken, pending.reply):
                    future.cancel()
            async with self._news:
                self._news.notify_all()

    async def snapshot(self) -> Snapshot:
        """The newest snapshot. Raises RefusedByEngineError while there is none."""
        if self._snapshot is None:
            await self._wait_for_news(lambda: self._snapshot is not None, _FIRST_SNAPSHOT_LIMIT_S)
        self._refuse_when_gone()
        if self._snapshot is None:
            raise _busy("the engine has just started and has no snapshot yet: try again")
        return self._snapshot

    async def part(self, name: str, make: Callable[[Snapshot], bytes]) -> bytes:
        """`make(snapshot)`, remembered under `name` for as long as the snapshot lasts."""
        snapshot = await self.snapshot()
        if name not in self._bytes:
            self._bytes[name] = make(snapshot)
        return self._bytes[name]

    async def health(self) -> Health:
        """The process that serves, and the age of its snapshot."""
        snapshot = await self.snapshot()
        return Health(
            version=self.version,
            server_pid=os.getpid(),
            snapshot_age_ms=round((time.monotonic() - self._arrived_monotonic_s) * 1000, 1),
            engine=snapshot.health,
        )

    async def events(self, since: int, limit: int, wait_s: float) -> EventList:
        """Events after `since`, the oldest first; waits up to `wait_s` for the first of them."""
        await self.snapshot()
        await self._wait_for_news(lambda: self._last_seq() > since, wait_s)
        self._refuse_when_gone()
        later = (event for event in self._events if event.seq > since)
        events = list(itertools.islice(later, limit))
        return EventList(events=events, next_since=events[-1].seq if events else since)

    async def ask(self, command: Command, result: type[_Result]) -> _Result:
        """Have the engine do `command`, and wait until it is done.

        Raises RefusedByEngineError: with the engine's refusal, `busy` if it did not
        begin within TAKE_LIMIT_S, `gone` if it has ended.
        """
        self._refuse_when_gone()
        if len(self._pending) >= MAX_REQUESTS:
            raise _busy(f"{MAX_REQUESTS} requests are under way: try again")
        request_id = next(self._ids)
        loop = asyncio.get_running_loop()
        pending = _Pending(loop.create_future(), loop.create_future())
        self._pending[request_id] = pending
        try:
            self._channel.send(frame_of(request_id, command, time.monotonic() + TAKE_LIMIT_S))
            async with asyncio.timeout(TAKE_LIMIT_S + _TAKE_GRACE_S):
                await pending.taken
            reply = await pending.reply
        except TimeoutError:
            raise _busy(
                f"the engine did not begin it within {TAKE_LIMIT_S:.0f} s; nothing was changed:"
                " try again"
            ) from None
        except asyncio.CancelledError:
            if pending.taken.done() and not pending.taken.cancelled():
                self._refuse_when_gone("; the request may be carried out in part")
            self._refuse_when_gone()
            raise
        finally:
            del self._pending[request_id]
        if reply.refusal is not None:
            raise RefusedByEngineError(reply.refusal)
        return result.model_validate(reply.result)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._arrived_monotonic_s = time.monotonic()
        self._bytes.clear()
        last_seq = self._last_seq()
        self._events.extend(event for event in snapshot.events if event.seq > last_seq)
        async with self._news:
            self._news.notify_all()

    async def _wait_for_news(self, wanted: Callable[[], bool], limit_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s), self._news:
                await self._news.wait_for(lambda: wanted() or self._gone)

    def _last_seq(self) -> int:
        return self._events[-1].seq if self._events else -1

    def _refuse_when_gone(self, consequence: str = "") -> None:
        if self._gone:
            message = f"the engine has ended{consequence}"
            raise RefusedByEngineError(Refusal(kind="gone", message=message))


def _settle(future: asyncio.Future[_Settled], value: _Settled) -> None:
    if not future.done():
        future.set_result(value)
