"""In which stretches a VM's runs are protected and merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.gate_size import BatchSize
from vmdedup.core.plan import Runs
from vmdedup.core.rmap import FIRST_SLOT, ZERO
from vmdedup.guest.page_space import PageSpace
from vmdedup.remap.batches import cut, split_stretches
from vmdedup.remap.live import over_narrow_gaps
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.property

_REGION_PAGES = 300


@dataclass(frozen=True)
class _Span:
    start: int
    size_bytes: int = _REGION_PAGES * PAGE_BYTES


SPACE = PageSpace([_Span(0x10_0000), _Span(0x9000_0000)])


@st.composite
def wanted_runs(draw: st.DrawFn) -> Runs:
    """Runs in address order, none over the end of a region, on slots in any order."""
    start, length = [], []
    page = 0
    for gap, pages in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=30)):
        page += gap
        if page < _REGION_PAGES < page + pages:
            page = _REGION_PAGES
        if page + pages > 2 * _REGION_PAGES:
            break
        start.append(page)
        length.append(pages)
        page += pages
    count = len(start)
    first = np.cumsum([0, *draw(st.permutations(length))])[:count] + FIRST_SLOT
    slot = np.array(draw(st.permutations(first.tolist())), dtype=np.int32)
    is_zero = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool)
    slot[is_zero] = ZERO
    return Runs(np.array(start, dtype=np.int64), np.array(length, dtype=np.int64), slot)


@given(wanted=wanted_runs(), pages=st.integers(8, 200), most_runs=st.integers(1, 12))
def test_they_are_all_the_pages_once_in_the_order_of_publishing(
    wanted: Runs, pages: int, most_runs: int
) -> None:
    wanted = cut(wanted, pages)
    found = list(split_stretches(wanted, SPACE, BatchSize(most_runs, pages)))
    for each in found:
        assert len(each) <= most_runs
        assert each.pages <= pages
        assert (np.diff(each.start_page) > 0).all()
        assert len(set(SPACE.region_of(each.start_page).tolist())) == 1
    assert set().union(*map(_sites, found)) == _sites(wanted)
    assert sum(each.pages for each in found) == wanted.pages


def _sites(some: Runs) -> set[tuple[int, int]]:
    page, slot = some.page_slots()
    return set(zip(page.tolist(), slot.tolist(), strict=True))


@given(wanted=wanted_runs())
def test_nothing_is_shown_before_what_lower_slots_hold(wanted: Runs) -> None:
    """So it is enough to publish little more than what the next stretch shows."""
    whole = PageSpace([_Span(0x10_0000, 2 * _REGION_PAGES * PAGE_BYTES)])
    highest = 0
    for each in split_stretches(wanted, whole, BatchSize(runs=4, pages=60)):
        stored = each.slot[each.slot != ZERO]
        assert (stored > highest).all()
        highest = int(stored.max(initial=highest))


@given(wanted=wanted_runs())
def test_what_is_protected_is_all_runs_and_narrow_gaps_between_them(wanted: Runs) -> None:
    start, length_bytes = over_narrow_gaps(
        SPACE.hva(wanted.start_page), wanted.length * PAGE_BYTES, SPACE.spans()[::-1]
    )
    end = start + length_bytes
    spans = SPACE.spans()
    inside = [
        begin <= low < high <= stop
        for low, high in zip(start.tolist(), end.tolist(), strict=True)
        for begin, stop in spans
    ]
    assert sum(inside) == len(start)
    gaps = (start[1:] - end[:-1])[(start[1:] < spans[1][0]) | (start[:-1] >= spans[1][0])]
    assert (gaps > 8 * PAGE_BYTES).all()
    covered = {
        address
        for low, high in zip(start.tolist(), end.tolist(), strict=True)
        for address in range(low, high, PAGE_BYTES)
    }
    asked = set(SPACE.hva(wanted.page()).tolist())
    assert asked <= covered
    for address in covered - asked:
        near = [address + step * PAGE_BYTES for step in range(-8, 9)]
        assert asked & set(near[:8])
        assert asked & set(near[9:])
