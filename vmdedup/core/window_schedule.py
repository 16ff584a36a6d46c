"""The schedule of windows: where dirty tracking asks for written pages, and how often.

Owns one age for each window, a stretch of a VM's pages that are asked for together.
Promises smart scan's schedule: young windows are asked for in each pass, old ones in
every ninth, or every 27th if asking for them costs a read. Only pages never looked at make
a window young; writes do not, as they do not make a page young in KSM.

KSM's smart scan spares the checksums of old pages, but visits each of them in every
pass. For us the visit is the expensive part: it is a walk through the VM's mappings.
All old windows of a VM have their turn in the same pass, so that most passes need not
touch that VM at all; another VM's turn is in another pass.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.smart_scan import ALWAYS_LOOKED_AT, skip_age

_OLD: Final = 9
"""Age at which a window has the longest period; it does not grow further."""

_PERIOD: Final = np.array(
    [1 if age < ALWAYS_LOOKED_AT else skip_age(age) + 1 for age in range(_OLD + 1)]
)
"""Passes from one request for a window to the next, by the window's age."""


_SLOW_PERIOD: Final = 3 * (skip_age(_OLD) + 1)
"""The same for an old window that is slow."""


class WindowSchedule:
    """The passes in which to ask for each window; `turn` sets when old windows have theirs.

    `rounds`: for each window the passes that the last answer covers, that pass and those
    before in which it was passed over; `0` if it was passed over in the last pass. int64,
    shape (windows,).
    """

    __slots__ = ("_age", "_asked_in", "_round", "rounds")

    def __init__(self, windows: int, turn: int = 0) -> None:
        self._round = turn
        self._age = np.zeros(windows, dtype=np.uint8)
        self._asked_in = np.full(windows, turn, dtype=np.int64)
        self.rounds = np.zeros(windows, dtype=np.int64)

    def next_round(
        self, *, everywhere: bool, slow: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """The windows to ask for in the next pass, ascending; all if `everywhere`.

        `slow`: windows that have only every third turn once they are old, in spite of
        `everywhere`.
        """
        self._round += 1
        is_due = (self._round % _PERIOD == 0)[self._age]
        if slow is not None:
            since = self._round - self._asked_in
            is_due &= ~slow | (self._age < _OLD) | (since >= _SLOW_PERIOD)
            is_due |= ~slow & everywhere
        due = np.flatnonzero(is_due | (everywhere and slow is None))
        self.rounds[:] = 0
        self.rounds[due] = self._round - self._asked_in[due]
        self._asked_in[due] = self._round
        self._age[due] = np.minimum(self._age[due] + 1, _OLD)
        return due

    def renew(self, window: NDArray[np.int64]) -> None:
        """Make these windows young again."""
        self._age[window] = 0
