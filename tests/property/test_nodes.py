"""merge_across_nodes=0: one tree, and yet no sharing across nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.digest import apart_by_node, zero_digest

pytestmark = pytest.mark.property

SEED = 5
ZERO = zero_digest(SEED)


@given(st.lists(st.tuples(st.sampled_from([ZERO, 1, 2, 2**64 - 1]), st.integers(-1, 1023))))
def test_digests_are_the_same_only_within_a_node_or_for_zero(pages: list[tuple[int, int]]) -> None:
    digest = np.array([content for content, _ in pages], dtype=np.uint64)
    node = np.array([node for _, node in pages], dtype=np.int32)
    apart = apart_by_node(digest, node, SEED).tolist()
    for (content, where), one in zip(pages, apart, strict=True):
        for (other_content, elsewhere), other in zip(pages, apart, strict=True):
            same = content == other_content and (where == elsewhere or content == ZERO)
            assert (one == other) == same
