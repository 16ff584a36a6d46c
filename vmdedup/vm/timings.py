"""What sessions cost a guest: of one session, and added up.

Owns two records. Promises counts of all sessions and the latest times, so that months of
them stay small.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Timings:
    """What a session cost the guest; times in milliseconds."""

    gate_ms: list[float] = field(default_factory=list)
    drain_ms: list[float] = field(default_factory=list)
    stopped_ms: list[float] = field(default_factory=list)
    lifted_pages: int = 0


_KEPT_TIMINGS = 10_000
"""Latest timings that percentiles are taken of; a daemon runs for months."""


@dataclass
class Totals:
    """Timings over all sessions of a VM, milliseconds: the last ones, and counts of all."""

    gate_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_TIMINGS))
    drain_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_TIMINGS))
    gates: int = 0
    drains: int = 0
    stops: int = 0
    stopped_ms: float = 0.0
    cow_breaks: int = 0
    """Writes to merged pages seen since the VM was attached; one that broke twice counts twice."""

    def add(self, timings: Timings) -> None:
        """Add one session's."""
        self.gate_ms.extend(timings.gate_ms)
        self.drain_ms.extend(timings.drain_ms)
        self.gates += len(timings.gate_ms)
        self.drains += len(timings.drain_ms)
        self.stops += len(timings.stopped_ms)
        self.stopped_ms += sum(timings.stopped_ms)
