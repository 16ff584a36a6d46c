"""The loners: whoever has a partner meets it. Against a dict of contents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.loners import Loners
from vmdedup.core.rmap import PageColumns
from vmdedup.core.scan import mark_written, observe

from .strategies import DIGESTS, int64s

pytestmark = pytest.mark.property

VMS = 3
PAGES = 12
SITES = st.dictionaries(
    st.tuples(st.integers(0, VMS - 1), st.integers(0, PAGES - 1)), DIGESTS, max_size=10
)
GONE = st.sets(st.tuples(st.integers(0, VMS - 1), st.integers(0, PAGES - 1)), max_size=4)


def by_vm(sites: set[tuple[int, int]]) -> list[list[int]]:
    return [sorted(page for vm, page in sites if vm == number) for number in range(VMS)]


def test_loners_that_were_all_written_are_forgotten() -> None:
    columns = PageColumns(PAGES)
    loners = Loners([columns])
    for page in (int64s([1]), int64s([2])):
        for _ in range(2):
            observe(columns, page, np.array([7], dtype=np.uint64))
        mark_written(columns, page)
        loners.add([page])
    assert [pages.tolist() for pages in loners.find(np.array([7], dtype=np.uint64))] == [[]]


@given(st.lists(st.tuples(SITES, GONE), max_size=12))
def test_whoever_has_a_partner_meets_it(
    rounds: list[tuple[dict[tuple[int, int], int], set[tuple[int, int]]]],
) -> None:
    vms = [PageColumns(PAGES) for _ in range(VMS)]
    loners = Loners(vms)
    known: dict[tuple[int, int], int] = {}
    for new, gone in rounds:
        for (vm, page), digest in new.items():
            for _ in range(2):
                observe(vms[vm], int64s([page]), np.array([digest], dtype=np.uint64))
        met = loners.meet([int64s(pages) for pages in by_vm(set(new))])
        known |= new
        contents = set(new.values())
        alike = {
            site
            for site, digest in known.items()
            if digest in contents and list(known.values()).count(digest) > 1
        }
        assert [pages.tolist() for pages in met] == by_vm(alike)
        for vm, page in gone:
            mark_written(vms[vm], int64s([page]))
            known.pop((vm, page), None)
        wanted = np.array(sorted(contents), dtype=np.uint64)
        held = {site for site, digest in known.items() if digest in contents}
        assert [pages.tolist() for pages in loners.find(wanted)] == by_vm(held)
