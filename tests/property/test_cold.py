"""Cold pages: their ages against a naive model, and the rule of the pace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core.cold import SOON_S, TICKS, ColdAges
from vmdedup.policy.cold_pace import (
    FIRST_PACE,
    LEAST_PER_S,
    MOST_PER_S,
    MOST_PRESSURE_PERCENT,
    ColdPace,
    next_pace,
)

from .strategies import int64s

pytestmark = pytest.mark.property

PAGES = 12
EVERYWHERE = np.ones(PAGES, dtype=np.bool_)
SOME = st.sets(st.integers(0, PAGES - 1)).map(sorted)
STEP = st.tuples(st.sampled_from(["tick", "written", "out", "settle"]), SOME, st.floats(0, 40))


class Model:
    """The same for one page after the other."""

    def __init__(self) -> None:
        self.age = [0] * PAGES
        self.level = [0] * PAGES
        self.out_at: list[float | None] = [None] * PAGES
        self.ticks = 0

    def tick(self) -> None:
        self.ticks += 1
        for page in range(PAGES):
            if self.ticks % 4 ** self.level[page] == 0:
                self.age[page] = min(31, self.age[page] + 1)

    def back(self, page: int, now_s: float) -> None:
        """A page that is out is in memory again."""
        went_out = self.out_at[page]
        assert went_out is not None
        is_soon = now_s - went_out <= SOON_S
        self.level[page] = min(3, self.level[page] + 1) if is_soon else max(0, self.level[page] - 1)
        self.age[page], self.out_at[page] = 0, None

    def cold(self) -> list[int]:
        found = [p for p in range(PAGES) if self.age[p] >= TICKS and self.out_at[p] is None]
        return sorted(found, key=lambda page: (-self.age[page], page))


@given(st.lists(STEP, max_size=120))
def test_ages_are_those_of_the_model(steps: list[tuple[str, list[int], float]]) -> None:
    ages, model, now_s = ColdAges(PAGES), Model(), 0.0
    for what, pages, passed_s in steps:
        now_s += passed_s
        if what == "tick":
            ages.tick()
            model.tick()
        elif what == "written":  # of what is in memory
            here = [page for page in pages if model.out_at[page] is None]
            ages.written(int64s(here))
            for page in here:
                model.age[page] = 0
        elif what == "out":
            chosen = [page for page in model.cold() if page in pages]
            ages.went_out(int64s(sorted(chosen)), now_s)
            for page in chosen:
                model.out_at[page] = now_s
        else:  # these have come back, soon or late
            back = [page for page in pages if model.out_at[page] is not None]
            recent = ages.recent(now_s).tolist()
            ages.came_back_soon(int64s([page for page in back if page in recent]))
            present = np.zeros(PAGES, dtype=np.bool_)
            present[back] = True
            ages.settle(present)
            for page in back:
                model.back(page, now_s)
        assert ages.cold(EVERYWHERE).tolist() == model.cold()
        out = [page for page in range(PAGES) if model.out_at[page] is not None]
        assert np.flatnonzero(ages.out()).tolist() == out
        assert set(ages.recent(now_s).tolist()) <= set(out)


@given(SOME)
def test_only_what_is_asked_for_is_chosen(pages: list[int]) -> None:
    ages = ColdAges(PAGES)
    for _ in range(TICKS - 1):
        ages.tick()
    assert not len(ages.cold(EVERYWHERE))
    ages.tick()
    among: NDArray[np.bool_] = np.zeros(PAGES, dtype=np.bool_)
    among[pages] = True
    assert ages.cold(among).tolist() == pages


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_page_that_comes_back_soon_needs_four_times_as_long(times: int) -> None:
    ages, page = ColdAges(1), int64s([0])

    def ticks_until_cold() -> int:
        for number in range(1, 1 << 12):
            ages.tick()
            if len(ages.cold(np.ones(1, dtype=np.bool_))):
                return number
        raise AssertionError("it never gets cold")

    assert ticks_until_cold() == TICKS
    for _ in range(times):
        ages.went_out(page, 0.0)
        ages.came_back_soon(page)
        needed = ticks_until_cold()
    # Its age advances at whole multiples, so the first step may come early.
    assert (TICKS - 1) * 4**times < needed <= TICKS * 4**times


MEASURED = st.tuples(
    st.floats(0, 1e6),
    st.integers(0, 10**9),
    st.one_of(st.none(), st.floats(0, 100)),
)
PACES = st.builds(
    ColdPace,
    pages_per_s=st.floats(LEAST_PER_S, MOST_PER_S),
    refaults_per_s=st.floats(0, 1e6),
    since_halved_s=st.one_of(st.just(math.inf), st.floats(0, 1e6)),
)


@given(PACES, MEASURED, st.integers(1, 10**6))
def test_the_pace_is_bounded_and_never_rises_above_the_limit(
    pace: ColdPace, measured: tuple[float, int, float | None], most: int
) -> None:
    elapsed_s, refaults, pressure = measured
    new = next_pace(
        pace,
        elapsed_s=elapsed_s,
        refaults=refaults,
        most_refaults_per_s=most,
        pressure_percent=pressure,
    )
    assert LEAST_PER_S <= new.pages_per_s <= MOST_PER_S
    assert new.refaults_per_s >= 0
    assert new.pages_per_s >= pace.pages_per_s / 2
    strained = pressure is not None and pressure > MOST_PRESSURE_PERCENT
    if new.refaults_per_s > most or strained:
        assert new.pages_per_s <= pace.pages_per_s
    else:
        assert new.pages_per_s >= pace.pages_per_s


def after(pace: ColdPace, seconds: int, refaults: int, pressure: float | None = None) -> ColdPace:
    for _ in range(seconds):
        pace = next_pace(
            pace,
            elapsed_s=1,
            refaults=refaults,
            most_refaults_per_s=50,
            pressure_percent=pressure,
        )
    return pace


def test_refaults_halve_the_pace_again_and_again_until_they_end() -> None:
    halved = after(FIRST_PACE, 12, refaults=1000)
    assert halved.pages_per_s == pytest.approx(FIRST_PACE.pages_per_s / 4)
    assert after(halved, 300, refaults=1000).pages_per_s == LEAST_PER_S
    calm = after(halved, 60, refaults=0)
    assert calm.refaults_per_s < 50
    assert halved.pages_per_s < calm.pages_per_s < FIRST_PACE.pages_per_s
    assert after(halved, 600, refaults=10).pages_per_s == MOST_PER_S


def test_pressure_on_memory_halves_the_pace_too() -> None:
    strained = after(FIRST_PACE, 3, refaults=0, pressure=50.0)
    assert strained.pages_per_s == FIRST_PACE.pages_per_s / 2
