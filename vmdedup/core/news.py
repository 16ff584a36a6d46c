"""News: the pages that a trust domain's next nomination has to consider.

Owns the loners and the waiting pages. A page waits if it is a new candidate with a
partner, or such a partner. A page also waits if it was nominated and not merged, found
its store page full (max_page_sharing), or is kept for a huge page. Promises that a
nomination among the waiting pages gives the same as one of all candidates
(tests/property/test_news.py), at a cost in proportion to what changed.

That holds because every candidate either waits or is a loner, and loners have no
partner: each page that gets one was reported here. Other reasons to find more (other
VMs, raised limits, pages that wait for VMAs) are not reported here: then the next
nomination must consider all candidates, and begins a new `News`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.loners import Loners
from vmdedup.core.nominate import Nomination
from vmdedup.core.rmap import ALL_PAGES, PageColumns
from vmdedup.core.scan import are_candidates, note_unshared
from vmdedup.core.sorting import among, united
from vmdedup.core.stable_tree import NOT_FOUND, StableTree


class News:
    """The news of the VMs whose rmaps these are; row v of all arguments is VM v.

    All pages are page indices (int64), ascending.
    """

    __slots__ = ("_considered", "_loners", "_vms", "_waiting", "pages")

    def __init__(self, vms: Sequence[PageColumns]) -> None:
        self._vms = vms
        self._loners = Loners(vms)
        self._waiting: list[list[NDArray[np.int64]]] = [[] for _ in vms]
        self._considered: list[NDArray[np.int64]] | None = None
        self.pages = 0
        """Pages that have become mergeable since the last nomination."""

    @property
    def waits(self) -> bool:
        """Whether there is anything to consider."""
        return any(self._waiting)

    def settle(
        self,
        settled: Sequence[NDArray[np.int64]],
        tree: StableTree,
        *,
        zero_digest: int,
        use_zero_pages: bool,
        share: bool,
    ) -> None:
        """Take in new candidates (`Agenda.take_settled`); the rest as for `nominate`."""
        nonzero = []
        for waiting, columns, page in zip(self._waiting, self._vms, settled, strict=True):
            is_zero = columns.digest[page] == np.uint64(zero_digest)
            if use_zero_pages:
                _append(waiting, page[is_zero])
                self.pages += int(np.count_nonzero(is_zero))
            nonzero.append(page[~is_zero] if share else page[:0])
        met = self._loners.meet(nonzero)
        for waiting, columns, page, partners in zip(
            self._waiting, self._vms, nonzero, met, strict=True
        ):
            has_partner = among(page, partners)
            has_partner |= tree.search(columns.digest[page]) != NOT_FOUND
            _append(waiting, partners)
            _append(waiting, page[has_partner])
            self.pages += int(np.count_nonzero(has_partner))
            note_unshared(columns, partners, page[~has_partner])

    def published(self, digest: NDArray[np.uint64]) -> None:
        """Note digests that entered the stable tree without a nomination."""
        for waiting, page in zip(self._waiting, self._loners.find(digest), strict=True):
            _append(waiting, page)

    def take(self) -> list[NDArray[np.int64]]:
        """The pages to consider, per VM; `nominated` and `merged` must follow."""
        self._considered = [
            united([np.empty(0, dtype=np.int64), *waiting]) for waiting in self._waiting
        ]
        for waiting in self._waiting:
            waiting.clear()
        self.pages = 0
        return self._considered

    def nominated(self, nomination: Nomination) -> None:
        """Note the nomination of the pages taken, or of all candidates if none were taken."""
        for vm, (columns, planned) in enumerate(zip(self._vms, nomination.vms, strict=True)):
            considered = ALL_PAGES if self._considered is None else self._considered[vm]
            note_unshared(columns, considered, planned.unshared)
            _append(self._waiting[vm], planned.crowded)
            _append(self._waiting[vm], planned.kept)
        if self._considered is None:
            alone = [np.concatenate([each.unshared, each.kept]) for each in nomination.vms]
            self._loners.add(alone)

    def merged(self, nomination: Nomination) -> None:
        """Note that this nomination was carried out, as far as possible or worthwhile."""
        left = []
        for waiting, columns, planned in zip(self._waiting, self._vms, nomination.vms, strict=True):
            page = planned.taken.page()
            left.append(page[are_candidates(columns, page)])
            _append(waiting, left[-1])
        self._loners.add(left)


def _append(waiting: list[NDArray[np.int64]], page: NDArray[np.int64]) -> None:
    if len(page):
        waiting.append(page)
