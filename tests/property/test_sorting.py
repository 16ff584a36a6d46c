"""Looking numbers up in sorted columns, dense ones and far-flung ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.sorting import among, breaks, lengths

from .strategies import int64s

pytestmark = pytest.mark.property

NUMBERS = st.sets(st.one_of(st.integers(0, 12), st.sampled_from([1 << 20, 1 << 40])))


@given(values=NUMBERS, some=st.lists(st.one_of(st.integers(0, 12), st.just(1 << 40))))
def test_among_is_what_a_set_says(values: set[int], some: list[int]) -> None:
    ascending = sorted(values)
    found = among(int64s(ascending), int64s(some))
    assert found.dtype == np.bool_
    assert found.tolist() == [value in some for value in ascending]


@given(st.lists(st.integers(0, 50), max_size=40).map(sorted), st.integers(0, 3))
def test_runs_of_equal_steps(values: list[int], step: int) -> None:
    expected = [at == 0 or value - values[at - 1] != step for at, value in enumerate(values)]
    assert breaks(int64s(values), step).tolist() == expected


@given(st.sets(st.integers(0, 50)).map(sorted), st.integers(50, 60))
def test_lengths_are_the_differences_up_to_the_end(begin: list[int], end: int) -> None:
    assert lengths(int64s(begin), end).tolist() == np.diff([*begin, end]).tolist()
