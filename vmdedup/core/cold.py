"""Cold pages: how long ago each page of one VM was written, and which pages are old enough.

Owns one byte a page, from the moment cold pages are wanted. A page's *age* is the number of
ticks since it was last found written; four ticks are the control `cold_after_s`. A page that
was paged out and came back soon gets a *level*: with each level its age advances four times as
slowly, so that it needs four times as long the next time. Refuses to know the time, or whether
a page may be paged out: both are arguments.

    bits 0-4   age, 31 at most          bits 5-6   level, 0 to 3
    bit 7      the page was paged out, and is not known to have come back

This is by writes alone: a page that the guest only reads looks cold. It comes back with the
next read, and then its level keeps it in memory for longer.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.zeroes import zeroes

TICKS: Final = 4
"""Age from which a page is cold, in ticks."""
_OLDEST: Final = 31
_LEVEL_SHIFT: Final = 5
_MOST_LEVEL: Final = 3
_LEVEL: Final = np.uint8(_MOST_LEVEL << _LEVEL_SHIFT)
_AGE: Final = np.uint8(_OLDEST)
_OUT: Final = np.uint8(1 << 7)
SOON_S: Final = 60.0
"""A page that is back within this time after it was paged out came back soon (Senpai's minute)."""


class ColdAges:
    """The ages of one VM's pages. Page indices are int64, and no page is twice among them."""

    __slots__ = ("_column", "_recent", "_ticks")

    def __init__(self, pages: int) -> None:
        self._column: NDArray[np.uint8] = zeroes(pages, np.uint8)
        self._recent: deque[tuple[float, NDArray[np.int64]]] = deque()
        self._ticks = 0

    @property
    def memory_bytes(self) -> int:
        """Memory that the column occupies."""
        return self._column.nbytes

    def tick(self) -> None:
        """A quarter of `cold_after_s` has passed: each page ages, as far as its level lets it."""
        self._ticks += 1
        least = next(level for level in range(_MOST_LEVEL, -1, -1) if self._ticks % 4**level == 0)
        ages = (self._column & _AGE) < _OLDEST
        ages &= (self._column & _LEVEL) <= least << _LEVEL_SHIFT
        self._column += ages

    def written(self, page: NDArray[np.int64]) -> None:
        """These pages, which are in memory, were written since they were last asked for."""
        self._column[page] &= _LEVEL

    def cold(self, among: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The cold pages of those in the mask that are in memory: oldest first, then ascending."""
        age = self._column & _AGE
        page = np.flatnonzero(among & (age >= TICKS) & (self._column & _OUT == 0))
        return page[np.argsort(_OLDEST - age[page], kind="stable")]

    def went_out(self, page: NDArray[np.int64], now_s: float) -> None:
        """These pages were paged out just now."""
        self._column[page] |= _OUT
        self._recent.append((now_s, page))

    def recent(self, now_s: float) -> NDArray[np.int64]:
        """Pages that went out within the last minute and are still out, ascending."""
        while self._recent and now_s - self._recent[0][0] > SOON_S:
            self._recent.popleft()
        parts = [np.empty(0, dtype=np.int64), *(page for _, page in self._recent)]
        page = np.unique(np.concatenate(parts))
        return np.asarray(page[self._column[page] & _OUT != 0])

    def came_back_soon(self, page: NDArray[np.int64]) -> None:
        """These pages are back within a minute: the next time they need four times as long."""
        level = np.minimum((self._column[page] & _LEVEL) + (1 << _LEVEL_SHIFT), _LEVEL)
        self._column[page] = level

    def settle(self, present: NDArray[np.bool_]) -> None:
        """Note which pages are in memory again, after more than a minute: a level is forgiven."""
        back = np.flatnonzero(present & (self._column & _OUT != 0))
        level = self._column[back] & _LEVEL
        self._column[back] = np.where(level, level - (1 << _LEVEL_SHIFT), level)

    def out(self) -> NDArray[np.bool_]:
        """Which pages are out, as far as is known."""
        return np.asarray(self._column & _OUT != 0)
