"""The agenda: considering what is open and written comes to what considering all does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.agenda import Agenda
from vmdedup.core.rmap import OWN, PageColumns
from vmdedup.core.scan import mark_written, observe
from vmdedup.core.smart_scan import ScanAges

from .strategies import int64s

pytestmark = pytest.mark.property

PAGES = 8
WINDOW = 4
"""Pages that are asked about together."""


class Vm:
    """Pages with a content each, and an agenda over them."""

    def __init__(self) -> None:
        self.columns = PageColumns(PAGES)
        self.ages = ScanAges(PAGES)
        self.agenda = Agenda(self.columns, self.ages)
        self.written: set[int] = set()
        """And not told of yet."""
        self.missed = np.zeros(PAGES, dtype=np.int64)

    def round(self, step: Step, content: np.ndarray, *, whole: bool) -> list[int]:
        """One look; what it read."""
        asked = step.asked[np.arange(PAGES) // WINDOW]
        self.written |= set(step.written)
        self.missed += 1
        written = int64s(sorted(page for page in self.written if asked[page]))
        self.written -= set(written.tolist())
        page = self.agenda.with_open(written, asked[self.agenda.open])
        if whole:
            page = np.flatnonzero(asked)
        due = self.agenda.due(
            page,
            readable=step.readable[page],
            own=self.columns.slot[page] == OWN,
            written=written,
            missed=self.missed[page] - 1,
            smart=step.smart,
        )
        self.missed[asked] = 0
        read, unread = due[: step.most_pages], due[step.most_pages :]
        before = self.columns.flags[read]
        observe(self.columns, read, content[read])
        self.agenda.observed(read, before)
        mark_written(self.columns, unread)
        self.ages.owe(unread)
        return [int(page) for page in read]


@dataclass(frozen=True)
class Step:
    """What happens between two looks; a page that comes and goes was written."""

    written: list[int]
    asked: np.ndarray
    readable: np.ndarray
    smart: bool
    most_pages: int


PAGE_SET = st.sets(st.integers(0, PAGES - 1))
ASKED = st.sampled_from([[True, True], [True, False], [False, True], [False, False]])
STEP = st.tuples(PAGE_SET, PAGE_SET, ASKED, st.booleans(), st.integers(0, 2 * PAGES))


@given(st.lists(STEP, max_size=15), st.data())
def test_it_comes_to_the_same_as_considering_every_page(
    steps: list[tuple[set[int], set[int], list[bool], bool, int]], data: st.DataObject
) -> None:
    vms = Vm(), Vm()
    content = np.zeros(PAGES, dtype=np.uint64)
    absent: set[int] = set()
    for number, (changed, toggled, asked, smart, most_pages) in enumerate(steps):
        absent ^= toggled
        content[int64s(sorted(changed))] = data.draw(st.integers(0, 1))
        readable = ~np.isin(np.arange(PAGES), list(absent))
        written = range(PAGES) if number == 0 else changed | toggled
        windows = np.array(asked) | (number == 0)
        step = Step(sorted(written), windows, readable, smart, most_pages)
        read = [
            vm.round(step, content, whole=whole or number == 0)
            for vm, whole in zip(vms, (True, False), strict=True)
        ]
        assert read[0] == read[1]
        assert vms[0].columns.flags.tolist() == vms[1].columns.flags.tolist()
        assert vms[0].columns.digest.tolist() == vms[1].columns.digest.tolist()
        assert vms[0].ages.owed().tolist() == vms[1].ages.owed().tolist()
        assert vms[0].ages.pages_skipped == vms[1].ages.pages_skipped
        if number % 3 == 2:
            settled = [vm.agenda.take_settled().tolist() for vm in vms]
            assert settled[0] == settled[1]


def test_a_quiet_vm_has_nothing_to_consider() -> None:
    vm = Vm()
    everywhere = np.ones(PAGES, dtype=np.bool_)
    both = np.ones(2, dtype=np.bool_)
    content = np.arange(PAGES, dtype=np.uint64)
    first = Step(list(range(PAGES)), both, everywhere, smart=True, most_pages=PAGES)
    vm.round(first, content, whole=True)
    assert vm.agenda.open.tolist() == list(range(PAGES))
    assert not len(vm.agenda.take_settled())
    vm.round(Step([], ~both, everywhere, smart=True, most_pages=PAGES), content, whole=False)
    assert vm.agenda.open.tolist() == list(range(PAGES))
    vm.round(Step([], both, everywhere, smart=True, most_pages=PAGES), content, whole=False)
    assert vm.agenda.take_settled().tolist() == list(range(PAGES))
    assert not len(vm.agenda.open)


def test_where_most_changes_any_page_is_considered() -> None:
    """What is listed is bounded, and what is not listed is not missed."""
    pages = 1 << 12
    columns = PageColumns(pages)
    agenda = Agenda(columns, ScanAges(pages))
    every_page = np.arange(pages)
    content = np.arange(pages, dtype=np.uint64)

    def look(written: np.ndarray) -> None:
        everywhere = np.ones(pages, dtype=np.bool_)
        due = agenda.due(
            every_page,
            readable=everywhere,
            own=everywhere,
            written=written,
            missed=np.zeros_like(every_page),
            smart=False,
        )
        before = columns.flags[due]
        observe(columns, due, content[due])
        agenda.observed(due, before)

    for _ in range(2):
        look(every_page)
        assert agenda.with_open(every_page[:1]).tolist() == every_page.tolist()
    columns.merge(every_page[5:6], 7)
    assert agenda.take_settled().tolist() == [page for page in range(pages) if page != 5]
    assert not len(agenda.take_settled())
    look(every_page[:0])
    assert not len(agenda.open)
