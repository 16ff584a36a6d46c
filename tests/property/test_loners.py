"""Rounds that skip the nomination miss nothing: against a set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.loners import Loners

from .strategies import DIGESTS

pytestmark = pytest.mark.property

COLUMNS = st.lists(DIGESTS, max_size=20)


@given(COLUMNS, st.lists(COLUMNS, max_size=6))
def test_whoever_has_a_partner_meets_it(first: list[int], rounds: list[list[int]]) -> None:
    loners = Loners(np.array(first, dtype=np.uint64))
    known = set(first)
    for digests in rounds:
        met = sum(digest in known for digest in set(digests)) + len(digests) - len(set(digests))
        assert loners.meet(np.array(digests, dtype=np.uint64)) == met
        known |= set(digests)
