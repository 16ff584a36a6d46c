"""The census against Counter."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.census import Census
from vmdedup.models import ContentAnalysis, VmContents

pytestmark = pytest.mark.property

# Contents as (high, low) halves from few values: contents that agree in one half
# only are common here, though no hash would ever show one.
CONTENT = st.tuples(st.integers(0, 3), st.integers(0, 3))
ZERO = (0, 0)


Halves = tuple[int, int]


def fingerprints(contents: list[Halves]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.array(contents, dtype=np.uint64).reshape(-1, 2)


@given(
    st.lists(
        st.tuples(st.lists(st.lists(CONTENT, max_size=8), max_size=3), st.integers(0, 5)),
        max_size=4,
    ),
    st.booleans(),
)
def test_census_is_the_naive_count(vms: list[tuple[list[list[Halves]], int]], peek: bool) -> None:
    census = Census(np.array(ZERO, dtype=np.uint64))
    held: list[Counter[Halves]] = []
    for number, (batches, holes) in enumerate(vms):
        census.add_vm(f"vm{number}")
        for batch in batches:
            census.feed(fingerprints(batch))
            if peek:
                census.result()
        census.feed_zero(holes)
        held.append(Counter([page for batch in batches for page in batch] + [ZERO] * holes))

    result = census.result()
    assert [vm.name for vm in result.vms] == [f"vm{number}" for number in range(len(vms))]
    counts: list[VmContents | ContentAnalysis] = [*result.vms, result]
    for counted, pages in zip(counts, (*held, sum(held, Counter())), strict=True):
        assert counted.total_pages == pages.total()
        assert counted.zero_pages == pages[ZERO]
        assert counted.nonzero_pages == pages.total() - pages[ZERO]
        assert counted.distinct_pages == len(pages.keys() - {ZERO})
        assert counted.duplicate_pages == counted.nonzero_pages - counted.distinct_pages
    for i, mine in enumerate(held):
        for j, other in enumerate(held):
            both = len((mine.keys() & other.keys()) - {ZERO})
            expected = result.vms[i].duplicate_pages if i == j else both
            assert result.matrix[i][j] == expected
