"""The memory-pressure policy: its two edges, and that it does not flap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmdedup.errors import UsageError
from vmdedup.policy.pressure import decide

pytestmark = pytest.mark.unit

TOTAL = 1000


@pytest.mark.parametrize(
    ("available", "idle", "active"),
    [
        (0, True, True),
        (199, True, True),
        (200, False, True),
        (250, False, True),
        (251, False, False),
        (1000, False, False),
    ],
)
def test_begins_below_the_threshold_and_ends_above_the_hysteresis(
    available: int, idle: bool, active: bool
) -> None:
    assert decide(False, available, TOTAL, 20, 5) is idle
    assert decide(True, available, TOTAL, 20, 5) is active


def test_without_hysteresis_merging_ends_above_the_threshold() -> None:
    assert decide(True, 200, TOTAL, 20, 0)
    assert not decide(True, 201, TOTAL, 20, 0)
    assert not decide(False, 200, TOTAL, 20, 0)


@given(st.booleans(), st.integers(0, TOTAL), st.integers(0, 50))
@settings(deadline=None)
def test_threshold_0_always_merges(active: bool, available: int, hysteresis: int) -> None:
    assert decide(active, available, TOTAL, 0, hysteresis)


@given(
    st.integers(1, 60),
    st.integers(1, 39),
    st.lists(st.integers(0, 2**50), min_size=1, max_size=40),
    st.integers(1, 2**50),
)
@settings(deadline=None)
def test_it_changes_only_after_crossing_the_whole_band(
    threshold: int, hysteresis: int, history: list[int], total: int
) -> None:
    active = False
    for available in history:
        before, active = active, decide(active, available, total, threshold, hysteresis)
        share = 100 * available
        if active and not before:
            assert share < threshold * total
        if before and not active:
            assert share > (threshold + hysteresis) * total


@pytest.mark.parametrize(("available", "total"), [(0, 0), (1, -1), (-1, 5)])
def test_a_host_that_can_not_be_is_refused(available: int, total: int) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        decide(False, available, total, 20, 5)
