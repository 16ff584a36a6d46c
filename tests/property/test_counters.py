"""Counters, fair shares, the matrix and the funnel against dicts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.counters import funnel, sharing_counts
from vmdedup.core.rmap import BROKEN, FIRST_SLOT, KNOWN, OWN, STILL, ZERO, PageColumns
from vmdedup.units import PAGE_BYTES

from .strategies import int64s

pytestmark = pytest.mark.property

SITES = st.lists(
    st.tuples(st.lists(st.integers(0, 12), max_size=25), st.integers(0, 50)), max_size=6
)


@given(SITES, st.lists(st.integers(0, 4), min_size=13, max_size=13))
def test_counts_are_the_naive_ones(vms: list[tuple[list[int], int]], contents: list[int]) -> None:
    sites = [np.array(slots, dtype=np.int32) for slots, _ in vms]
    zero = [zero for _, zero in vms]
    counts = sharing_counts(sites, zero, int64s(contents))

    users = Counter(slot for slots, _ in vms for slot in slots)
    assert counts.pages_shared == len(users)
    assert counts.pages_shared + counts.pages_sharing == users.total()
    assert counts.vm_merged_pages == tuple(len(slots) for slots, _ in vms)
    assert (counts.zero_pages, list(counts.vm_zero_pages)) == (sum(zero), zero)
    assert counts.saved_bytes == (counts.pages_sharing + sum(zero)) * PAGE_BYTES
    assert sum(counts.vm_saved_bytes) == counts.saved_bytes
    for (slots, zeros), saved in zip(vms, counts.vm_saved_bytes, strict=True):
        exact = zeros + sum((1 - Fraction(1, users[slot]) for slot in slots), Fraction(0))
        assert abs(saved - PAGE_BYTES * exact) <= 1

    for with_contents in (True, False):
        names = contents if with_contents else list(range(13))
        held = [{names[slot] for slot in slots} for slots, _ in vms]
        got = counts if with_contents else sharing_counts(sites, zero)
        assert got.matrix.tolist() == [[len(a & b) for b in held] for a in held]


PAGE_STATE = st.tuples(
    st.sampled_from([OWN, ZERO, FIRST_SLOT, 7]),
    st.sampled_from([0, int(KNOWN), int(KNOWN | STILL)]),
    st.booleans(),
    st.tuples(*[st.booleans()] * 6),
)


FUNNEL_PARTS = (
    "merged_pages",
    "zero_pages",
    "broken_pages",
    "absent_pages",
    "swapped_pages",
    "volatile_pages",
    "deferred_pages",
    "kept_in_huge_pages",
    "pending_pages",
    "other_domain_pages",
    "unique_pages",
)


@given(st.lists(PAGE_STATE, max_size=30))
def test_funnel_puts_every_page_in_its_first_field(
    pages: list[tuple[int, int, bool, tuple[bool, ...]]],
) -> None:
    columns = PageColumns(len(pages))
    naive = [0] * 11
    for page, (slot, flags, written, marks) in enumerate(pages):
        broken = written and slot != OWN
        columns.slot[page] = slot
        columns.flags[page] = flags | (int(BROKEN) if broken else 0)
        absent, swapped, deferred, kept, pending, other = marks
        true_of_it = [
            slot >= FIRST_SLOT and not broken,
            slot == ZERO and not broken,
            broken,
            absent,
            swapped,
            not flags & int(STILL),
            deferred,
            kept,
            pending,
            other,
            True,
        ]
        naive[true_of_it.index(True)] += 1
    marked = [int64s(p for p, row in enumerate(pages) if row[3][mark]) for mark in range(6)]
    result = funnel(
        "web",
        columns,
        absent=marked[0],
        swapped=marked[1],
        deferred=marked[2],
        kept_in_huge=marked[3],
        pending=marked[4],
        other_domain=marked[5],
    )
    assert [getattr(result, part) for part in FUNNEL_PARTS] == naive
    assert result.ram_pages == len(pages)
