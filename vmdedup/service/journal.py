"""What happened, as numbered events for `vmdedup events` and the API.

Owns the numbering. Promises that numbers grow, also over restarts: they begin at
the wall clock's microseconds. Keeps an event until it is taken for a snapshot.
"""

from __future__ import annotations

import time

from vmdedup.service.protocol import Event

_LONGEST_MESSAGE = 500


class Journal:
    """Events since the last `take`."""

    def __init__(self) -> None:
        self._next_seq = time.time_ns() // 1000
        self._events: list[Event] = []

    def add(self, kind: str, vm: str | None, message: str) -> None:
        """Note that something happened to a VM, or to none in particular."""
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

    def take(self) -> list[Event]:
        """The events noted since, in order."""
        taken, self._events = self._events, []
        return taken
