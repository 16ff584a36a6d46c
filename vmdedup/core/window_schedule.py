"""The schedule of windows: where dirty tracking asks for written pages, and how often.

Owns one age for each window, a stretch of a VM's pages that are asked for together.
Promises smart scan's schedule: young windows are asked for in each round, old ones in
every ninth. Writes do not make a window young, as they do not a page in KSM: only pages
never looked at do.

KSM's smart scan spares the checksums of old pages, but comes by each of them in every
pass. For us coming by is the dear part: it is a walk through the VM's mappings. All old
windows of a VM have their turn in the same round, so that most rounds have nothing to
do with it at all; another VM's turn is in another one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.smart_scan import ALWAYS_LOOKED_AT, skip_age

_OLD: Final = 9
"""Age from which on nothing changes any more."""

_PERIOD: Final = np.array(
    [1 if age < ALWAYS_LOOKED_AT else skip_age(age) + 1 for age in range(_OLD + 1)]
)
"""Every how many rounds a window of this age is asked for."""


class WindowSchedule:
    """When to ask for which of so many windows; `turn` says when the old ones have theirs.

    `rounds`: for each window how many rounds the last round speaks of, this one and those
    in which it was passed over; 0 where it was passed over itself. int64, shape (windows,).
    """

    __slots__ = ("_age", "_asked_in", "_round", "rounds")

    def __init__(self, windows: int, turn: int = 0) -> None:
        self._round = turn
        self._age = np.zeros(windows, dtype=np.uint8)
        self._asked_in = np.full(windows, turn, dtype=np.int64)
        self.rounds = np.zeros(windows, dtype=np.int64)

    def next_round(self, *, everywhere: bool) -> NDArray[np.int64]:
        """The windows to ask for in a further round, ascending; all if `everywhere`."""
        self._round += 1
        due = np.flatnonzero((self._round % _PERIOD == 0)[self._age] | everywhere)
        self.rounds[:] = 0
        self.rounds[due] = self._round - self._asked_in[due]
        self._asked_in[due] = self._round
        self._age[due] = np.minimum(self._age[due] + 1, _OLD)
        return due

    def renew(self, window: NDArray[np.int64]) -> None:
        """These are young again."""
        self._age[window] = 0
