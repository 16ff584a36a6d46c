"""Looking numbers up in sorted columns, dense ones and far-flung ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.sorting import among

from .strategies import int64s

pytestmark = pytest.mark.property

NUMBERS = st.sets(st.one_of(st.integers(0, 12), st.sampled_from([1 << 20, 1 << 40])))


@given(values=NUMBERS, some=st.lists(st.one_of(st.integers(0, 12), st.just(1 << 40))))
def test_among_is_what_a_set_says(values: set[int], some: list[int]) -> None:
    ascending = sorted(values)
    found = among(int64s(ascending), int64s(some))
    assert found.dtype == np.bool_
    assert found.tolist() == [value in some for value in ascending]
