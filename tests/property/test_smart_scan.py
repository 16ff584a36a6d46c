"""Smart scan against KSM's rule, page by page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.rmap import BYTES_PER_PAGE as RMAP_BYTES_PER_PAGE
from vmdedup.core.smart_scan import BYTES_PER_PAGE, ScanAges

from .strategies import int64s

pytestmark = pytest.mark.property

PAGES = 5


@dataclass
class ModelPage:
    """An rmap_item as mm/ksm.c ages it, with a byte for each of both numbers."""

    age: int = 0
    remaining_skips: int = 0
    owed: bool = False
    skipped: int = 0

    def visit(self, smart: bool, missed: int = 0) -> bool:
        if smart:
            for _ in range(min(missed, self.remaining_skips)):
                self._looked()
        looked = self._looked() if smart else True
        self.owed = not looked
        return looked

    def _looked(self) -> bool:
        age = self.age
        self.age = min(age + 1, 255)
        if age < 3:
            return True
        if self.remaining_skips:
            self.remaining_skips -= 1
            self.skipped += 1
            return False
        self.remaining_skips = next((n for top, n in ((3, 1), (5, 2), (8, 4)) if age <= top), 8)
        return True


PAGE_SET = st.sets(st.integers(0, PAGES - 1)).map(sorted)
STEP = st.tuples(
    st.sampled_from(["visit", "visit", "visit", "visit", "restart", "owe", "visit all"]),
    PAGE_SET,
    st.integers(1, 30),
    st.integers(0, 12),
)


@given(st.lists(STEP, max_size=20))
def test_every_page_follows_ksms_schedule(steps: list[tuple[str, list[int], int, int]]) -> None:
    ages = ScanAges(PAGES)
    model = [ModelPage() for _ in range(PAGES)]
    for verb, pages, times, most_missed in steps:
        for time in range(times):
            if verb == "restart":
                ages.restart(int64s(pages))
                for page in pages:
                    model[page] = ModelPage(skipped=model[page].skipped)
            elif verb == "owe":
                ages.owe(int64s(pages))
                for page in pages:
                    model[page].owed = True
            else:
                smart = verb == "visit"
                missed = [(page + time) % (most_missed + 1) for page in pages]
                expected = [
                    model[page].visit(smart, count)
                    for page, count in zip(pages, missed, strict=True)
                ]
                looked = ages.visit(int64s(pages), smart=smart, missed=int64s(missed))
                assert looked.tolist() == expected
            assert ages.owed().tolist() == [page.owed for page in model]
    assert ages.pages_skipped == sum(page.skipped for page in model)


def test_a_unique_page_ends_up_at_a_ninth_of_the_looks() -> None:
    ages = ScanAges(1)
    looks = [bool(ages.visit(int64s([0]))[0]) for _ in range(13 + 9 * 100)]
    first = [visit for visit, looked in enumerate(looks[:23]) if looked]
    assert first == [0, 1, 2, 3, 5, 8, 13, 22]
    assert sum(looks[13:]) == 100
    assert ages.pages_skipped == looks.count(False)


def test_a_skipped_page_is_owed_until_it_is_looked_at() -> None:
    ages = ScanAges(2)
    for _ in range(5):
        ages.visit(int64s([0]))
    assert ages.owed().tolist() == [True, False]
    ages.visit(int64s([0]))
    assert ages.owed().tolist() == [False, False]


def test_switching_it_off_pays_what_is_owed_and_ages_nothing() -> None:
    ages = ScanAges(1)
    for _ in range(5):
        ages.visit(int64s([0]))
    for _ in range(50):
        assert ages.visit(int64s([0]), smart=False).all()
        assert not ages.owed().any()
    assert ages.pages_skipped == 1
    assert ages.visit(int64s([0])).tolist() == [True]
    assert ages.visit(int64s([0])).tolist() == [False]


def test_no_page_at_all() -> None:
    ages = ScanAges(0)
    assert ages.visit(int64s([])).tolist() == []
    assert ages.visit(int64s([]), smart=False).dtype == np.bool_
    assert ages.pages_skipped == 0


def test_it_fits_in_24_bytes_a_page_with_the_rmap() -> None:
    ages = ScanAges(1000)
    assert ages.memory_bytes == 1000 * BYTES_PER_PAGE
    assert RMAP_BYTES_PER_PAGE + BYTES_PER_PAGE <= 24
