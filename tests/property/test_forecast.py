"""The need against what is there: the same as counting page by page."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.forecast import RATE_WINDOW_S, BreakRates, Forecast
from vmdedup.units import PAGE_BYTES

pages = st.integers(0, 10_000)
amounts = st.integers(0, 1 << 44)
rates = st.one_of(st.just(0.0), st.floats(1e-3, 1e9))


@given(pages, pages, pages, pages)
def test_the_need_counts_every_merged_page(
    merged: int, free: int, broken: int, further: int
) -> None:
    """Writing page by page: each takes one page, and none comes back."""
    broken = min(broken, merged)
    before = Forecast(merged * PAGE_BYTES, free * PAGE_BYTES)
    left = free - broken
    if left < 0:
        assert before.lacking_bytes > 0
        return
    after = Forecast((merged - broken) * PAGE_BYTES, left * PAGE_BYTES)
    assert after.lacking_bytes == before.lacking_bytes or not before.lacking_bytes
    store = further // 2
    grown = after.merged_further(further, store)
    assert grown.needed_bytes == (merged - broken + further) * PAGE_BYTES
    assert grown.there_bytes == (left + further - store) * PAGE_BYTES


@given(amounts, amounts, rates)
def test_it_lasts_as_long_as_pages_can_be_taken_one_by_one(
    needed: int, there: int, rate: float
) -> None:
    forecast = Forecast(needed, there)
    lasts_s = forecast.lasts_s(rate)
    assert (lasts_s is None) == (needed <= there or rate == 0)
    if lasts_s is not None:
        assert lasts_s * rate * PAGE_BYTES <= there * (1 + 1e-9)
        assert lasts_s * rate * PAGE_BYTES >= there * (1 - 1e-9)
    assert forecast.lasts_s(None) is None


@given(
    st.lists(
        st.tuples(st.floats(0.5, 20), st.dictionaries(st.integers(0, 3), st.integers(0, 5000))),
        max_size=20,
    )
)
def test_rates_are_those_of_the_window(steps: list[tuple[float, dict[int, int]]]) -> None:
    found, naive = BreakRates(), list[tuple[float, dict[int, int]]]()
    now_s, totals = 0.0, dict.fromkeys(range(4), 0)
    for pause_s, grown in steps:
        now_s += pause_s
        totals = {vm: count + grown.get(vm, 0) for vm, count in totals.items()}
        naive.append((now_s, totals))
        found.note(now_s, totals)
    old = [each for each in naive if each[0] <= now_s - RATE_WINDOW_S]
    window = old[-1:] + [each for each in naive if each[0] > now_s - RATE_WINDOW_S]
    if len(window) < 2:
        assert found.of(range(4)) is None or len(naive) > 1
        return
    (first_s, first), (last_s, last) = window[0], window[-1]
    expected = sum(last[vm] - first[vm] for vm in totals) / (last_s - first_s)
    rate = found.of(range(4))
    assert rate is not None
    assert abs(rate - expected) <= 1e-6 * max(1.0, expected)
    assert found.of([99]) is None


def test_a_vm_that_left_or_began_anew_has_no_rate() -> None:
    found = BreakRates()
    found.note(0.0, {1: 5, 2: 5})
    found.note(1.0, {1: 9})
    assert found.of([2]) is None
    found.note(2.0, {1: 3})
    assert found.of([1]) is None
    found.note(3.0, {1: 4})
    assert found.of([1]) == 1.0
