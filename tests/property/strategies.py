"""Shared Hypothesis strategies: small fleets, slot columns, regions, digests.

Everything is small on purpose and drawn from few values, so that repeats,
touching runs, gaps and collisions of interest are common instead of rare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core.rmap import FIRST_SLOT, OWN, ZERO

U64 = st.integers(0, 2**64 - 1)

# Digests that share their high bits force the sort's repair path; the others are
# spread over the whole range.
DIGESTS = st.one_of(
    st.integers(0, 5),
    st.sampled_from([2**63, 2**63 + 1, 2**64 - 1]),
    U64,
)


@dataclass(frozen=True)
class Fleet:
    """Contents by VM and page; content 0 is the zero page."""

    contents: tuple[tuple[int, ...], ...]
    region_starts: tuple[tuple[int, ...], ...]


@st.composite
def region_starts(draw: st.DrawFn, pages: int) -> tuple[int, ...]:
    inner = draw(st.sets(st.integers(1, max(1, pages - 1)), max_size=3))
    return (0, *sorted(at for at in inner if at < pages))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """1 to 4 VMs, each stitched from stretches that recur across the fleet."""
    stretch = st.one_of(
        st.tuples(st.integers(1, 30), st.integers(1, 6)).map(
            lambda at: tuple(range(at[0], at[0] + at[1]))
        ),
        st.lists(st.integers(0, 8), min_size=1, max_size=4).map(tuple),
        st.integers(1, 4).map(lambda n: (0,) * n),
    )
    vm = st.lists(stretch, min_size=1, max_size=8).map(lambda parts: sum(parts, ()))
    contents = tuple(draw(st.lists(vm, min_size=1, max_size=4)))
    return Fleet(contents, tuple(draw(region_starts(len(pages))) for pages in contents))


@st.composite
def mappings(draw: st.DrawFn) -> tuple[NDArray[np.int32], tuple[int, ...]]:
    """A slot column as merging leaves it, and its region starts."""
    piece = st.one_of(
        st.tuples(st.just(OWN), st.integers(1, 6)),
        st.tuples(st.just(ZERO), st.integers(1, 4)),
        st.tuples(st.integers(FIRST_SLOT, 12), st.integers(1, 4)),
    )
    pieces = draw(st.lists(piece, min_size=1, max_size=10))
    column = [_nth(slot, i) for slot, length in pieces for i in range(length)]
    return np.array(column, dtype=np.int32), draw(region_starts(len(column)))


def _nth(slot: int, page: int) -> int:
    """Where the n-th page of a run stands."""
    return slot if slot < FIRST_SLOT else slot + page


@st.composite
def remaps(draw: st.DrawFn) -> tuple[NDArray[np.int32], tuple[int, ...], dict[int, int]]:
    """A mapping, its regions, and page -> slot for pages that want to be remapped.

    Wanted pages are drawn as stretches whose slots are often those that would
    close a gap between neighbours; some are merged already (broken pages).
    """
    column, starts = draw(mappings())
    wanted: dict[int, int] = {}
    for _ in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, len(column) - 1))
        length = draw(st.integers(1, 5))
        closing = int(column[begin - 1]) + 1 if begin and column[begin - 1] >= FIRST_SLOT else 20
        slot = draw(st.sampled_from([ZERO, closing, FIRST_SLOT, 5, 20]))
        for i in range(min(length, len(column) - begin)):
            wanted[begin + i] = _nth(slot, i)
    return column, starts, dict(sorted(wanted.items()))


def int64s(values: Iterable[int]) -> NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)
