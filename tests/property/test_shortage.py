"""When memory is short, how soon the next look comes, and which VM is paused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.forecast import Forecast
from vmdedup.core.shortage import (
    FASTEST_BYTES_PER_S,
    HORIZON_S,
    LEAST_INTERVAL_S,
    STEPS,
    Level,
    reserve_bytes,
    to_pause,
    to_resume,
)

amounts = st.integers(0, 1 << 44)


@given(amounts, amounts, amounts, st.floats(-1e10, 1e10))
def test_memory_that_merged_pages_cannot_take_is_never_short(
    needed: int, there: int, reserve: int, fall: float
) -> None:
    level = Level(Forecast(needed, there), reserve, fall)
    if needed <= there - max(0.0, fall) * HORIZON_S:
        assert not level.is_short()
        assert not level.is_short(before=True)
        assert not any(level.asks_for(step) for step in STEPS)
    if level.is_short():
        assert level.is_short(before=True), "hysteresis only prolongs"
    depths = [level.asks_for(step) for step in sorted(STEPS, key=lambda each: each.below_percent)]
    assert depths == sorted(depths), "a step with more of the reserve comes first"


@given(amounts, amounts, amounts)
def test_no_look_comes_too_late(needed: int, there: int, reserve: int) -> None:
    """At the fastest fall half of the distance to the reserve is left at the next look."""
    level = Level(Forecast(needed, there), reserve)
    spare = there - level.wanted_bytes
    if level.interval_s > LEAST_INTERVAL_S:
        assert level.interval_s * FASTEST_BYTES_PER_S <= spare / 2 * (1 + 1e-9)


@given(amounts, amounts, st.integers(0, 90))
def test_the_larger_reserve_counts(size: int, least: int, percent: int) -> None:
    found = reserve_bytes(size, least, percent)
    assert found >= least
    assert found * 100 >= size * percent - 99
    assert found in (least, size * percent // 100)


vms = st.dictionaries(
    st.integers(0, 9), st.tuples(st.integers(-1000, 1000), st.integers(-3, 3)), max_size=8
)


@given(vms)
def test_the_lowest_priority_that_takes_memory_is_paused(
    known: dict[int, tuple[int, int]],
) -> None:
    growth = {vm: grown for vm, (grown, _) in known.items()}
    priority = {vm: rank for vm, (_, rank) in known.items()}
    chosen = to_pause(list(known), growth, priority)
    taken = sum(max(0, grown) for grown in growth.values())
    if chosen is None:
        assert taken == 0
        return
    assert growth[chosen] > 0
    for vm in known:
        if growth[vm] * 10 >= taken:
            assert (priority[chosen], -growth[chosen]) <= (priority[vm], -growth[vm])
    assert to_resume(list(known), priority) == max(
        reversed(list(known)), key=lambda vm: priority[vm]
    )


def test_nobody_is_resumed_if_nobody_is_paused() -> None:
    assert to_resume([], {}) is None
