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

    def meet(self, digest: NDArray[np.uint64]) -> bool:
        """Whether one of these new contents is here already, or twice among them.

        If not, they are loners too from now on.
        """
        new = np.unique(digest)
        if len(new) < len(digest) or _holds(self._sorted, new) or _holds(self._later, new):
            return True
        self._later = np.sort(np.concatenate([self._later, new]))
        return False


def _holds(column: NDArray[np.uint64], needles: NDArray[np.uint64]) -> bool:
    """Whether a sorted column has one of the needles."""
    if not len(column):
        return False
    at = np.searchsorted(column, needles)
    at[at == len(column)] = 0
    return bool((column[at] == needles).any())
