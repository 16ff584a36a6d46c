"""Periodic work that stays within its share of a processor.

Owns when such work is due again: after an interval, or later to stay within its share.
The share is one of one CPU, and of the time if the work waits for others. Refuses to run
anything: the caller asks, and has its work measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Periodic:
    """One kind of work: `is_due`, then the work in a `with measured()` block.

    `cpu_share` is a share of one CPU, `time_share` of the time that passes; by default
    neither is bounded. `first_in_s` is the time until the work is due at first.
    """

    def __init__(
        self,
        interval_s: float,
        *,
        cpu_share: float = math.inf,
        time_share: float = math.inf,
        first_in_s: float = 0.0,
    ) -> None:
        self.interval_s = interval_s
        """Least time from one run to the next, seconds; its user may change it."""
        self.cpu_share = cpu_share
        """Most of one CPU, as a share; its user may change it."""
        self._time_share = time_share
        self._due_at = time.monotonic() + first_in_s

    def is_due(self, *, grace_s: float = 0.0) -> bool:
        """Whether the work should be done now, if it may be `grace_s` late."""
        return time.monotonic() >= self._due_at + grace_s

    def put_off(self) -> None:
        """Have the work due after the interval, whatever becomes of it until then."""
        self._due_at = time.monotonic() + self.interval_s

    def hasten(self) -> None:
        """Have the work due at once."""
        self._due_at = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block, which is the work. Work that fails stays due."""
        began_s, cpu_began_s = time.monotonic(), time.process_time()
        yield
        now_s, cpu_s = time.monotonic(), time.process_time() - cpu_began_s
        self._due_at = now_s + max(
            self.interval_s, (now_s - began_s) / self._time_share, cpu_s / self.cpu_share
        )
