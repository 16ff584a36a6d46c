"""The agenda: the pages to read at the next look, and the pages that have held still.

Owns the pages that are still *open*: due at the last look and not known to hold still
since. Promises that a pass costs what changed: with dirty tracking only open and
written pages are considered, and the outcome is that of considering every page
(tests/property/test_agenda.py). An open page that dirty tracking was not asked about in
a pass waits unchanged for a pass that asks. If most of a VM changes, the agenda lists
nothing and says that any page may be open: so it takes at most some 2 bytes a page.
Refuses to know why a page may be read, or who wrote it.

This has no counterpart in KSM, whose scan visits every rmap_item in each pass.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import KNOWN, STILL, PageColumns
from vmdedup.core.scan import are_candidates, forget, held_still, mark_written
from vmdedup.core.smart_scan import ScanAges
from vmdedup.core.sorting import among, united

_FEW_PAGES = 1 << 10
"""Pages that are listed even in the smallest VM."""
_LISTED_SHARE = 8
"""In a large VM up to an eighth of its pages is listed."""


class Agenda:
    """The agenda of one VM; page indices are int64, ascending, and no page is twice there."""

    __slots__ = ("_ages", "_columns", "_open", "_settled", "_settled_pages", "_waiting")

    def __init__(self, columns: PageColumns, ages: ScanAges) -> None:
        self._columns = columns
        self._ages = ages
        self._open: NDArray[np.int64] | None = np.empty(0, dtype=np.int64)
        self._waiting = self._open
        self._settled: list[NDArray[np.int64]] = []
        self._settled_pages = 0

    @property
    def open(self) -> NDArray[np.int64]:
        """The open pages; all pages if they are not listed."""
        return np.arange(len(self._columns)) if self._open is None else self._open

    def with_open(
        self, written: NDArray[np.int64], asked: NDArray[np.bool_] | bool = True
    ) -> NDArray[np.int64]:
        """All pages that a pass has to consider when only `written` have changed.

        `asked`: for each page in `open` whether dirty tracking was asked about it.
        """
        now = self.open
        asked = np.broadcast_to(asked, now.shape)
        self._waiting = now[~asked]
        if self._open is not None:
            return united([now[asked], written])
        wanted = asked.copy()
        wanted[written] = True
        return np.flatnonzero(wanted)

    def due(
        self,
        page: NDArray[np.int64],
        *,
        readable: NDArray[np.bool_],
        own: NDArray[np.bool_],
        written: NDArray[np.int64] | None,
        missed: NDArray[np.int64],
        smart: bool,
    ) -> NDArray[np.int64]:
        """The considered pages that are to be read now.

        `readable`, `own`: for each page whether it may be read, and whether it is mapped
        to the VM's own memory. `written`: the pages dirty tracking reported, `None` without
        it. With it, a page not written since the last look has held still. `missed`: for
        each page the passes since it was last asked about, without this one. `smart`: pages
        that stayed unique are passed over now and then (KSM's smart_scan).
        """
        columns, ages = self._columns, self._ages
        gone = page[~readable & own]
        forget(columns, gone)
        ages.restart(gone)
        page, missed = page[readable], missed[readable]
        before = columns.flags[page] & STILL
        due = page
        if written is not None:
            news = ages.owed(page) | among(page, written) | (columns.flags[page] & KNOWN == 0)
            held_still(columns, page[~news])
            due, missed = page[news], missed[news]
        now = ages.visit(due, smart=smart, missed=missed)
        if written is not None:
            mark_written(columns, due[~now])
        self._note_settled(page, before)
        open_ = due
        if len(self._waiting):
            open_ = np.sort(np.concatenate((self._waiting, due)))
        self._open = open_ if self._is_few(len(open_)) else None
        self._waiting = self._waiting[:0]
        return due[now]

    def _note_settled(self, page: NDArray[np.int64], before: NDArray[np.uint8]) -> None:
        self.settle(page[(self._columns.flags[page] & STILL) > before])

    def settle(self, page: NDArray[np.int64]) -> None:
        """Note pages that are, or may be, candidates no nomination has considered."""
        if len(page) and self._is_few(self._settled_pages):
            self._settled.append(page)
            self._settled_pages += len(page)
            if not self._is_few(self._settled_pages):
                self._settled.clear()

    def _is_few(self, pages: int) -> bool:
        return pages <= _FEW_PAGES + len(self._columns) // _LISTED_SHARE

    def observed(self, page: NDArray[np.int64], before: NDArray[np.uint8]) -> None:
        """Note pages that were read; `before` are their flags before that look."""
        self._note_settled(page, before & STILL)

    @property
    def many_settled(self) -> bool:
        """Whether too many pages have become candidates to be listed."""
        return not self._is_few(self._settled_pages)

    def take_settled(self) -> NDArray[np.int64]:
        """The pages that became candidates since the last call; all candidates if many did."""
        if not self.many_settled:
            page = united([np.empty(0, dtype=np.int64), *self._settled])
            page = page[are_candidates(self._columns, page)]
        else:
            page = np.flatnonzero(are_candidates(self._columns))
        self.forget_settled()
        return page

    def forget_settled(self) -> None:
        """Forget the listed candidates: a nomination has considered them all."""
        self._settled.clear()
        self._settled_pages = 0
