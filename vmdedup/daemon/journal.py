"""Numbered events for `vmdedup events` and the API.

Owns the numbering. Promises that numbers grow, also over restarts: they begin at
the wall clock's microseconds. Keeps the newest for an API server that restarts;
each is also a log line, a warning if it is about a failure or a refusal.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from vmdedup.errors import VmdedupError
from vmdedup.ipc.protocol import MAX_EVENTS, Event

_LONGEST_MESSAGE = 500
_WARNINGS = frozenset(
    {
        "failed",
        "refused",
        "unreachable",
        "dropped",
        "reload-refused",
        "warning",
        "memory-short",
        "paused",
    }
)

_log = logging.getLogger(__name__)


class Journal:
    """Numbered events, in order."""

    def __init__(self) -> None:
        self._next_seq = time.time_ns() // 1000
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._taken_seq = 0

    def add(self, kind: str, vm: str | None, message: str) -> None:
        """Note an event of a VM, or of none in particular."""
        self._events.append(
            Event(
                seq=self._next_seq,
                unix_s=time.time(),
                kind=kind,
                vm=vm,
                message=message[:_LONGEST_MESSAGE],
            )
        )
        self._next_seq += 1
        level = logging.WARNING if kind in _WARNINGS else logging.INFO
        _log.log(level, "%s", " ".join(word for word in (kind, vm, message) if word))

    def take(self) -> list[Event]:
        """The events noted since the last `take` or `rewind`, in order."""
        taken = [event for event in self._events if event.seq > self._taken_seq]
        if taken:
            self._taken_seq = taken[-1].seq
        return taken

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Turn a failure in the block into an event; the work is tried again at its next turn."""
        try:
            yield
        except VmdedupError as error:
            self.add("failed", None, str(error))

    def rewind(self) -> None:
        """Have the next `take` return all kept events again: their receiver is gone."""
        self._taken_seq = 0
