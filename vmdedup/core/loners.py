"""Contents that held still and had no partner: whom a new content could meet.

Owns one sorted column of digests a trust domain, as of its last nomination. With
change tracking a round brings a handful of pages that have come to hold still; only
one that meets a loner (or a published page, or another of them) can be merged. So
most rounds of a quiet host need no nomination, whose sorting would be all they cost.

Promises never to miss a meeting: a loner that was written since may only cause a
nomination in vain. Refuses nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Loners:
    """The digests of the pages that a nomination left alone: uint64, any order."""

    __slots__ = ("_later", "_sorted")

    def __init__(self, digest: NDArray[np.uint64]) -> None:
        self._sorted = np.sort(digest)
        self._later = np.empty(0, dtype=np.uint64)

    def meet(self, digest: NDArray[np.uint64]) -> int:
        """How many of these new pages have a content that is here already, or twice among them.

        The others are loners too from now on.
        """
        new, first = np.unique(digest, return_index=True)
        known = _held(self._sorted, new) | _held(self._later, new)
        self._later = np.sort(np.concatenate([self._later, new[~known]]))
        return len(digest) - len(first) + int(np.count_nonzero(known))


def _held(column: NDArray[np.uint64], needles: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of the needles a sorted column has."""
    if not len(column):
        return np.zeros(len(needles), dtype=np.bool_)
    at = np.searchsorted(column, needles)
    at[at == len(column)] = 0
    return np.asarray(column[at] == needles)
