"""The agenda: which pages the next look of the scan reads, and which have held still.

Owns the pages that are still *open*: due at the last look and not known to hold still
since. Promises that a round costs what changed: with change tracking only open and
written pages are considered, and the outcome is that of considering every page
(tests/property/test_agenda.py). Refuses to know why a page may be read, or who wrote it.

This has no counterpart in KSM, whose scan visits every rmap_item in each pass.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import KNOWN, STILL, PageColumns
from vmdedup.core.scan import forget, held_still, mark_written
from vmdedup.core.smart_scan import ScanAges


class Agenda:
    """The agenda of one VM; page indices are int64, ascending, and no page is twice there."""

    __slots__ = ("_ages", "_columns", "_open", "_settled")

    def __init__(self, columns: PageColumns, ages: ScanAges) -> None:
        self._columns = columns
        self._ages = ages
        self._open = np.empty(0, dtype=np.int64)
        self._settled: list[NDArray[np.int64]] = []

    def with_open(self, written: NDArray[np.int64]) -> NDArray[np.int64]:
        """All pages that a round has to consider when only `written` have changed."""
        return np.union1d(self._open, written)

    def due(
        self,
        page: NDArray[np.int64],
        *,
        readable: NDArray[np.bool_],
        own: NDArray[np.bool_],
        written: NDArray[np.int64] | None,
        smart: bool,
    ) -> NDArray[np.int64]:
        """Those of the considered pages that are to be read now.

        `readable`, `own`: for each page whether it may be read, and whether it is mapped
        to the VM's own memory. `written`: what change tracking told of, None without it.
        With it, what was not written since the last look has held still. `smart`: pages
        that stayed unique are passed over now and then (KSM's smart_scan).
        """
        columns, ages = self._columns, self._ages
        gone = page[~readable & own]
        forget(columns, gone)
        ages.restart(gone)
        page = page[readable]
        before = columns.flags[page] & STILL
        due = page
        if written is not None:
            changed = ages.owed()
            changed[written] = True
            news = changed[page] | (columns.flags[page] & KNOWN == 0)
            held_still(columns, page[~news])
            due = page[news]
        now = ages.visit(due, smart=smart)
        if written is not None:
            mark_written(columns, due[~now])
        self._note_settled(page, before)
        self._open = due
        return due[now]

    def _note_settled(self, page: NDArray[np.int64], before: NDArray[np.uint8]) -> None:
        self._settled.append(page[(self._columns.flags[page] & STILL) > before])

    def observed(self, page: NDArray[np.int64], before: NDArray[np.uint8]) -> None:
        """These pages were read; `before` are their flags as they were until then."""
        self._note_settled(page, before & STILL)

    def take_settled(self) -> NDArray[np.uint64]:
        """Digests of the candidates that came to hold still since the last call."""
        page = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self._settled]))
        self.forget_settled()
        page = page[self._columns.flags[page] & STILL != 0]
        digest: NDArray[np.uint64] = self._columns.digest[page[~self._columns.shared(page)]]
        return digest

    def forget_settled(self) -> None:
        """They have all been considered."""
        self._settled.clear()
