"""Runs of pages, split into batches that fit into one gate. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vmdedup.core.gate_size import BatchSize, GateSize
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import ZERO
from vmdedup.core.sorting import ranges
from vmdedup.guest.page_space import PageSpace

Int64s = npt.NDArray[np.int64]


def split_stretches(wanted: Runs, space: PageSpace, size: BatchSize) -> Iterator[Runs]:
    """Runs in address order as stretches of bounded size, each within one region.

    Stretches follow the order in which their contents are published. So only the contents
    that are merged next get published, and merging them frees memory for those that follow.
    """
    stored = wanted.slot != ZERO
    shown = np.where(stored, wanted.slot, 0)
    last = np.maximum.accumulate(np.where(stored, np.arange(len(wanted)), 0))
    order = np.argsort(shown[last], kind="stable")
    wanted = wanted.take(order)
    for rows in batches(wanted.length, size):
        some = wanted.take(rows)
        yield from split_batches(some.take(np.argsort(some.start_page)), space, size)


def split_batches(wanted: Runs, space: PageSpace, size: BatchSize) -> Iterator[Runs]:
    """Runs in address order as batches of bounded size, each within one region.

    A run longer than a batch is cut; the kernel joins the mappings of its pieces again,
    since they are neighbours in the guest and in the store.
    """
    wanted = cut(wanted, size.piece_pages)
    edges = np.flatnonzero(np.diff(space.region_of(wanted.start_page))) + 1
    for first, last in pairwise([0, *edges.tolist(), len(wanted)]):
        region = wanted.take(slice(first, last))
        for part in batches(region.length, size):
            yield region.take(part)


def batches(length: Int64s, size: BatchSize | GateSize) -> Iterator[slice]:
    """Rows of runs, by their lengths in pages, for one gate after another.

    `size` is read again for each gate; a run that is longer makes a batch by itself.
    """
    pages_until = np.cumsum(length)
    first = before = 0
    while first < len(length):
        last = int(np.searchsorted(pages_until, before + size.pages, side="right"))
        last = max(first + 1, min(last, first + size.runs))
        yield slice(first, last)
        first, before = last, int(pages_until[last - 1])


def cut(wanted: Runs, most_pages: int) -> Runs:
    """The same pages in runs of at most `most_pages`."""
    if (wanted.length <= most_pages).all():
        return wanted
    pieces = -(-wanted.length // most_pages)
    index = np.repeat(np.arange(len(wanted)), pieces)
    offset = ranges(np.zeros_like(pieces), pieces) * most_pages
    slot = wanted.slot[index]
    return Runs(
        wanted.start_page[index] + offset,
        np.minimum(wanted.length[index] - offset, most_pages),
        np.where(slot == ZERO, slot, slot + offset).astype(np.int32),
    )
