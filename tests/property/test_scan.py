"""The scan's rule against a page-by-page model of the last looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmdedup.core import scan
from vmdedup.core.rmap import OWN, PageColumns

from .strategies import int64s

pytestmark = pytest.mark.property

PAGES = 6
ZERO_DIGEST = 0


@dataclass
class ModelPage:
    """What one page's history says, in plain words."""

    last: int | None = None
    still: bool = False
    slot: int = OWN
    broken: bool = False

    @property
    def shared(self) -> bool:
        return self.slot != OWN and not self.broken


PAGE_SET = st.sets(st.integers(0, PAGES - 1), min_size=1).map(sorted)
STEP = st.one_of(
    st.tuples(
        st.sampled_from(["observe", "observe_before_comparing"]),
        PAGE_SET,
        st.lists(st.integers(0, 2), min_size=6, max_size=6),
    ),
    st.tuples(
        st.sampled_from(["held_still", "mark_written", "forget", "merge", "unmerge"]),
        PAGE_SET,
        st.just([0] * PAGES),
    ),
    st.tuples(
        st.just("mark_broken"), PAGE_SET, st.lists(st.integers(0, 1), min_size=6, max_size=6)
    ),
)


def step_model(pages: list[ModelPage], verb: str, which: list[int], values: list[int]) -> None:
    for at, value in zip(which, values, strict=False):
        page = pages[at]
        if verb == "observe":
            page.still = page.last == value
            page.last = value
        elif verb == "observe_before_comparing":
            page.still, page.last = True, value
        elif verb == "held_still":
            page.still = page.last is not None
        elif verb == "mark_written":
            page.still = False
        elif verb == "forget":
            page.last, page.still = None, False
        elif verb == "merge":
            page.slot, page.broken = 7, False
        elif verb == "unmerge":
            page.slot, page.broken = OWN, False
        else:
            broken = bool(value) and page.slot != OWN
            if broken and not page.broken:
                page.still = False
            page.broken = broken


def step_columns(columns: PageColumns, verb: str, which: list[int], values: list[int]) -> None:
    index = int64s(which)
    column = np.array(values[: len(which)])
    if verb == "observe":
        scan.observe(columns, index, column.astype(np.uint64))
    elif verb == "observe_before_comparing":
        scan.observe(columns, index, column.astype(np.uint64), compared_next=True)
    elif verb == "held_still":
        scan.held_still(columns, index)
    elif verb == "mark_written":
        scan.mark_written(columns, index)
    elif verb == "forget":
        scan.forget(columns, index)
    elif verb == "merge":
        columns.merge(index, 7)
    elif verb == "unmerge":
        columns.unmerge(index)
    else:
        scan.mark_broken(columns, index, column.astype(np.bool_))


ALL = list(range(PAGES))
BROKEN_AFTER_HOLDING_STILL = [
    ("observe", ALL, [1] * PAGES),
    ("observe", ALL, [1] * PAGES),
    ("merge", ALL, [0] * PAGES),
    ("mark_broken", ALL, [1, 0] * (PAGES // 2)),
    ("observe", ALL, [1, 1, 2, 2, 1, 1]),
    ("mark_broken", ALL, [1] * PAGES),
]


@given(st.lists(STEP, max_size=25))
@example(BROKEN_AFTER_HOLDING_STILL)
def test_candidates_follow_the_last_two_looks(
    steps: list[tuple[str, list[int], list[int]]],
) -> None:
    columns = PageColumns(PAGES)
    pages = [ModelPage() for _ in range(PAGES)]
    for verb, which, values in steps:
        step_model(pages, verb, which, values)
        step_columns(columns, verb, which, values)

        still = [at for at, page in enumerate(pages) if page.still and not page.shared]
        found = scan.candidates(columns, ZERO_DIGEST)
        assert found.nonzero.tolist() == [a for a in still if pages[a].last != ZERO_DIGEST]
        assert found.zero.tolist() == [a for a in still if pages[a].last == ZERO_DIGEST]
        counts = scan.count(columns)
        assert counts.still_pages == len(still)
        assert counts.volatile_pages == sum(
            page.last is not None and not page.still and not page.shared for page in pages
        )
        assert columns.shared().tolist() == [page.shared for page in pages]
        assert columns.slot.tolist() == [page.slot for page in pages]
