"""Candidates for merging: KSM's rule that a page must hold still first.

Owns the changes of the rmap's flags. Promises that a page becomes a candidate in three
ways only. Two looks in a row saw the same digest; or dirty tracking saw no write since the
last look; or it was looked at once, and a later look compares it with that digest before
it is merged. Refuses to trust that: a candidate is a nomination, the gate compares bytes.

In `mm/ksm.c` the same rule is `cmp_and_merge_page`: a page whose checksum
differs from `oldchecksum` only has the new one recorded, and is "volatile" until
a scan finds it unchanged. Putting changing pages into the unstable tree would
cost a copy and a gate each time, and a copy-on-write fault right after.

Everywhere below `page_index` is int64 and holds no page twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import ALL_PAGES, BROKEN, KNOWN, OWN, STILL, UNSHARED, PageColumns

_MOVED = ~(STILL | UNSHARED)
"""The flags that remain when a page was written."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pages that held still and are not shared, both ascending (int64)."""

    nonzero: NDArray[np.int64]
    zero: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScanCounts:
    """One VM's pages that are not shared and have been looked at.

    `still_pages` are the candidates; `unshared_pages` are those that found no partner
    in either tree when they were compared.
    """

    still_pages: int
    unshared_pages: int
    volatile_pages: int


def observe(
    columns: PageColumns,
    page_index: NDArray[np.int64],
    digest: NDArray[np.uint64],
    *,
    compared_next: bool = False,
) -> None:
    """Record one look: the pages were read and have these digests now.

    `compared_next`: pages to be merged are looked at again before that, the others in
    the next pass. So all become candidates at once.
    """
    flags = columns.flags[page_index]
    same = (flags & KNOWN != 0) & (columns.digest[page_index] == digest)
    same |= compared_next
    columns.flags[page_index] = np.where(same, flags | STILL, flags & _MOVED) | KNOWN
    columns.digest[page_index] = digest


def held_still(columns: PageColumns, page_index: NDArray[np.int64]) -> None:
    """Record that, by dirty tracking, these pages were not written since the last look.

    This counts as a look that saw the same digest. A page never looked at stays
    unknown: it has no digest yet.
    """
    flags = columns.flags[page_index]
    columns.flags[page_index] = np.where(flags & KNOWN, flags | STILL, flags)


def mark_written(columns: PageColumns, page_index: NDArray[np.int64]) -> None:
    """Record that, by dirty tracking, these pages were written since the last look.

    They are no candidates until a further look. The recorded digest stays, so a
    page rewritten with the same content is still again at that look.
    """
    columns.flags[page_index] &= _MOVED


def forget(columns: PageColumns, page_index: NDArray[np.int64]) -> None:
    """Record that these pages are absent or swapped out now; their digests mean nothing.

    The mapping (`slot`) stays: an absent page of a store mapping reads the store.
    """
    columns.flags[page_index] &= _MOVED & ~KNOWN


def mark_broken(
    columns: PageColumns, page_index: NDArray[np.int64], broken: NDArray[np.bool_]
) -> None:
    """Record which of these merged pages the guest has broken, by the page tables.

    A page newly broken was written, so it must hold still again. A page no longer
    broken (the guest discarded its copy) shares its slot again. OWN pages are
    left alone.
    """
    flags = columns.flags[page_index]
    broken = broken & (columns.slot[page_index] != OWN)
    newly = broken & (flags & BROKEN == 0)
    flags = np.where(newly, flags & _MOVED, flags)
    columns.flags[page_index] = np.where(broken, flags | BROKEN, flags & ~BROKEN)


def are_candidates(
    columns: PageColumns, page_index: NDArray[np.int64] | slice = ALL_PAGES
) -> NDArray[np.bool_]:
    """Whether each of these pages held still and is not shared."""
    mask: NDArray[np.bool_] = columns.flags[page_index] & STILL != 0
    mask &= ~columns.shared(page_index)
    return mask


def candidates(
    columns: PageColumns, zero_digest: int, among: NDArray[np.int64] | None = None
) -> Candidates:
    """The candidates, zero pages apart; `among`: only of these pages, ascending."""
    still = (
        np.flatnonzero(are_candidates(columns))
        if among is None
        else among[are_candidates(columns, among)]
    )
    is_zero = columns.digest[still] == np.uint64(zero_digest)
    return Candidates(nonzero=still[~is_zero], zero=still[is_zero])


def note_unshared(
    columns: PageColumns, compared: NDArray[np.int64] | slice, unshared: NDArray[np.int64]
) -> None:
    """Record which of the pages `compared` with all others are like none."""
    columns.flags[compared] &= ~UNSHARED
    columns.flags[unshared] |= UNSHARED


def count(columns: PageColumns) -> ScanCounts:
    """Count the known pages that are not shared: those that hold still and those that do not."""
    own = ~columns.shared()
    return ScanCounts(
        still_pages=int(np.count_nonzero(own & (columns.flags & STILL != 0))),
        unshared_pages=int(np.count_nonzero(own & (columns.flags & UNSHARED != 0))),
        volatile_pages=int(np.count_nonzero(own & (columns.flags & (KNOWN | STILL) == KNOWN))),
    )
