"""The size of a gate's batch, learnt from how long gates take.

Owns the size of the next batch. A gate costs some fixed time and some per run, which
depend on the host, its load and the VM. A guest thread that writes to a page of the batch
waits for all of it. So each full gate moves the size towards the one that takes the target
time: by half at most downwards, by a quarter at most upwards.
"""

from __future__ import annotations

from dataclasses import dataclass

_LEAST_RUNS = 16
"""Fewest runs in a batch: with fewer, a gate's fixed cost is nearly all of its time."""
_PAGES_PER_RUN = 8
"""About the average when real guests are merged; it bounds what a gate of long runs zaps."""
_MOST_SHRINKING, _MOST_GROWTH = 0.5, 1.25


@dataclass(frozen=True)
class BatchSize:
    """The most runs and pages of a batch."""

    runs: int
    pages: int

    @property
    def piece_pages(self) -> int:
        """The length at which longer runs are cut into pieces."""
        return self.pages

    def at_most(self, most: BatchSize) -> BatchSize:
        """This size, limited by `most`."""
        return BatchSize(min(self.runs, most.runs), min(self.pages, most.pages))


USUAL = BatchSize(runs=64, pages=512)
"""The size while nothing is known of a VM's gates; such a gate takes about a millisecond."""


class GateSize:
    """The size of the next batch: at most `most`, chosen so that a gate takes `target_ms`."""

    def __init__(self, most: BatchSize, target_ms: float) -> None:
        self._most = most
        self._target_ms = target_ms
        first = USUAL.at_most(most)
        self._runs = float(first.runs)
        self.piece_pages = first.pages
        """The length at which longer runs are cut; one piece always fits a batch."""

    @property
    def runs(self) -> int:
        """Most runs of the next batch."""
        return int(self._runs)

    @property
    def pages(self) -> int:
        """Most pages of the next batch."""
        return min(self._most.pages, self.runs * _PAGES_PER_RUN)

    def took(self, ms: float, runs: int, pages: int) -> None:
        """Learn from a gate of so many runs and pages that was closed for `ms`."""
        factor = max(_MOST_SHRINKING, min(self._target_ms / ms, _MOST_GROWTH))
        is_full = runs >= self.runs or 2 * pages >= self.pages
        if factor < 1 or is_full:
            least = min(_LEAST_RUNS, self._most.runs)
            self._runs = max(least, min(self._runs * factor, self._most.runs))
