"""How much may go into one gate, learnt from how long gates take.

Owns the size of the next batch. A gate costs some fixed time and some per run, which
depend on the host, its load and the VM; and whoever writes to a page of the batch waits
for all of it. So each full gate moves the size towards the one that takes the target
time: by half at most downwards, by a quarter at most upwards.
"""

from __future__ import annotations

from dataclasses import dataclass

_LEAST_RUNS = 16
"""Below, nearly all of a gate's time is what it costs around its runs."""
_PAGES_PER_RUN = 8
"""About what merging real guests comes to; so no gate of long runs zaps without bound."""
_MOST_SHRINKING, _MOST_GROWTH = 0.5, 1.25


@dataclass(frozen=True)
class BatchSize:
    """At most so many runs and pages."""

    runs: int
    pages: int

    @property
    def piece_pages(self) -> int:
        """Longer runs are cut into pieces of this length."""
        return self.pages

    def at_most(self, most: BatchSize) -> BatchSize:
        """This size within that one."""
        return BatchSize(min(self.runs, most.runs), min(self.pages, most.pages))


USUAL = BatchSize(runs=64, pages=512)
"""Before anything is known of a VM's gates; these take about a millisecond."""


class GateSize:
    """The size of the next batch: at most `most`, and such that a gate takes `target_ms`."""

    def __init__(self, most: BatchSize, target_ms: float) -> None:
        self._most = most
        self._target_ms = target_ms
        first = USUAL.at_most(most)
        self._runs = float(first.runs)
        self.piece_pages = first.pages
        """Longer runs are cut into pieces of this length; one is always let in."""

    @property
    def runs(self) -> int:
        """Most runs of the next batch."""
        return int(self._runs)

    @property
    def pages(self) -> int:
        """Most pages of the next batch."""
        return min(self._most.pages, self.runs * _PAGES_PER_RUN)

    def took(self, ms: float, runs: int, pages: int) -> None:
        """A gate with so many runs and pages was closed for so long."""
        factor = max(_MOST_SHRINKING, min(self._target_ms / ms, _MOST_GROWTH))
        is_full = runs >= self.runs or 2 * pages >= self.pages
        if factor < 1 or is_full:
            least = min(_LEAST_RUNS, self._most.runs)
            self._runs = max(least, min(self._runs * factor, self._most.runs))
