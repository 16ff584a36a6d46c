"""The cost of sessions to a guest: of one session, and in total.

Owns two records. Promises counts of all sessions, but only the latest times, so that the
record of months stays small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Timings:
    """The cost of one session to the guest; times in milliseconds."""

    gate_ms: list[float] = field(default_factory=list)
    drain_ms: list[float] = field(default_factory=list)
    stopped_ms: list[float] = field(default_factory=list)
    lifted_pages: int = 0


_KEPT_TIMINGS = 10_000
"""Latest timings from which percentiles are taken; bounded, as a daemon runs for months."""


@dataclass
class Totals:
    """Timings over all sessions of a VM: the latest times, milliseconds, and counts of all."""

    gate_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_TIMINGS))
    drain_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_TIMINGS))
    gates: int = 0
    drains: int = 0
    stops: int = 0
    stopped_ms: float = 0.0
    merged_pages: int = 0
    """Pages merged since the VM was attached; one that was merged twice counts twice."""
    huge_pages_split: int = 0
    """Huge pages of which only some pages were merged, since the VM was attached."""
    cow_breaks: int = 0
    """Writes to merged pages seen since the VM was attached; one that broke twice counts twice."""

    def add(self, timings: Timings) -> None:
        """Add the timings of one session."""
        self.gate_ms.extend(timings.gate_ms)
        self.drain_ms.extend(timings.drain_ms)
        self.gates += len(timings.gate_ms)
        self.drains += len(timings.drain_ms)
        self.stops += len(timings.stopped_ms)
        self.stopped_ms += sum(timings.stopped_ms)

    def merges_from_now(self) -> Callable[[], int]:
        """A count of the pages merged from now on, also of a merge under way. For any thread."""
        before_pages = self.merged_pages
        return lambda: self.merged_pages - before_pages
