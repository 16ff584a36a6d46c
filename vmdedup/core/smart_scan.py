"""Smart scan: pages that stay unique are looked at ever more rarely.

Owns one byte a page: the visits so far, and the visits still to be skipped.
Promises KSM's schedule exactly (`should_skip_rmap_item` and `skip_age`
in `mm/ksm.c`, since 6.7): a page is looked at on the first three visits, then

    visits so far      up to 3    up to 5    up to 8    more
    visits skipped           1          2          4       8

so that an old page costs a ninth. Refuses to decide for pages that are shared:
as in KSM they never age, and the caller leaves them out.

KSM keeps `age` and `remaining_skips`, one byte each. Beyond 8 an age changes
nothing, so both fit in seven bits (10 ages x 9 skips). A table of 128 entries
is the whole schedule. Bit 7 is ours. Dirty tracking reports a written page only
once; if that page is skipped, the bit OWED keeps the report until it is read.

A skipped page is not removed from the unstable tree, as KSM must do: if nothing
was written its digest still holds, so it stays a possible partner.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import ALL_PAGES
from vmdedup.core.zeroes import zeroes

BYTES_PER_PAGE: Final = 1

ALWAYS_LOOKED_AT: Final = 3
"""Visits before the first skip: a page needs two looks to enter the unstable tree."""

_OLD: Final = 9
"""Highest age; beyond it the schedule stays the same."""
_SKIP_STATES: Final = 9
"""Number of values of the remaining skips, 0 to 8."""
_OWED: Final = np.uint8(128)
_STATE: Final = np.uint8(127)


def skip_age(age: int) -> int:
    """Visits to skip after a look at a page of this age."""
    for oldest, skips in ((3, 1), (5, 2), (8, 4)):
        if age <= oldest:
            return skips
    return 8


def _schedule() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The state after a visit and whether it looks, by state (age * 9 + remaining skips)."""
    after = np.zeros(128, dtype=np.uint8)
    looks = np.ones(128, dtype=np.bool_)
    for state in range((_OLD + 1) * _SKIP_STATES):
        age, skips = divmod(state, _SKIP_STATES)
        if age >= ALWAYS_LOOKED_AT:
            looks[state] = skips == 0
            skips = skip_age(age) if skips == 0 else skips - 1
        after[state] = min(age + 1, _OLD) * _SKIP_STATES + skips
    return after, looks


_AFTER, _LOOKS = _schedule()


def _passed_over() -> NDArray[np.uint8]:
    """The state after visits that were not made, by their number (up to 8) and state before."""
    after = np.tile(np.arange(128, dtype=np.uint8), (_SKIP_STATES, 1))
    for missed in range(_SKIP_STATES):
        for state in range((_OLD + 1) * _SKIP_STATES):
            age, skips = divmod(state, _SKIP_STATES)
            skipped = min(missed, skips)
            after[missed, state] = min(age + skipped, _OLD) * _SKIP_STATES + skips - skipped
    return after


_PASSED_OVER = _passed_over()


class ScanAges:
    """The age of every page of one VM; row i is page i. `pages_skipped` only grows.

    In all methods `page_index` is int64 and holds no page twice.
    """

    __slots__ = ("_column", "pages_skipped")

    def __init__(self, pages: int) -> None:
        self._column: NDArray[np.uint8] = zeroes(pages, np.uint8)
        self.pages_skipped = 0

    def __len__(self) -> int:
        return len(self._column)

    @property
    def memory_bytes(self) -> int:
        """Memory that the column occupies."""
        return self._column.nbytes

    def visit(
        self,
        page_index: NDArray[np.int64],
        *,
        smart: bool = True,
        missed: NDArray[np.int64] | int = 0,
    ) -> NDArray[np.bool_]:
        """Visit these pages, which are not shared: True for each that must be looked at.

        Each visit ages a page; skipped pages are counted, and OWED from now on. `missed`:
        visits since the last one that were not made. Those that were to be skipped count
        as skipped; a look that was due is made up for now.
        With `smart` False (the control `smart_scan`) all are looked at and none ages.
        """
        if not smart:
            self._column[page_index] &= _STATE
            return np.ones(len(page_index), dtype=np.bool_)
        before = self._column[page_index] & _STATE
        state = _PASSED_OVER[np.minimum(missed, _SKIP_STATES - 1), before]
        self.pages_skipped += int(np.sum(before % _SKIP_STATES - state % _SKIP_STATES))
        look: NDArray[np.bool_] = _LOOKS[state]
        self._column[page_index] = np.where(look, _AFTER[state], _AFTER[state] | _OWED)
        self.pages_skipped += len(look) - int(np.count_nonzero(look))
        return look

    def owe(self, page_index: NDArray[np.int64]) -> None:
        """Note pages that were due, but could not be read (the pass was broken off)."""
        self._column[page_index] |= _OWED

    def owed(self, page_index: NDArray[np.int64] | slice = ALL_PAGES) -> NDArray[np.bool_]:
        """Whether each page was skipped at its last visit, or due then and not read.

        With dirty tracking such pages count as written until they are read: it has
        reported them already and will not report them again.
        """
        return np.asarray(self._column[page_index] >= _OWED)

    def restart(self, page_index: NDArray[np.int64]) -> None:
        """Treat these pages as new (absent meanwhile, or unregistered): age 0, nothing owed.

        KSM frees the rmap_item of a page that is absent; a new one begins at age 0.
        """
        self._column[page_index] = 0
