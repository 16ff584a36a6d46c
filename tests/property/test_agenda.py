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


class Vm:
    """Pages with a content each, and an agenda over them."""

    def __init__(self) -> None:
        self.columns = PageColumns(PAGES)
        self.ages = ScanAges(PAGES)
        self.agenda = Agenda(self.columns, self.ages)

    def round(self, step: Step, content: np.ndarray, *, whole: bool) -> list[int]:
        """One look; what it read."""
        written = int64s(step.written)
        page = np.arange(PAGES) if whole else self.agenda.with_open(written)
        due = self.agenda.due(
            page,
            readable=step.readable[page],
            own=self.columns.slot[page] == OWN,
            written=written,
            smart=step.smart,
        )
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
    readable: np.ndarray
    smart: bool
    most_pages: int


PAGE_SET = st.sets(st.integers(0, PAGES - 1))
STEP = st.tuples(PAGE_SET, PAGE_SET, st.booleans(), st.integers(0, 2 * PAGES))


@given(st.lists(STEP, max_size=15), st.data())
def test_it_comes_to_the_same_as_considering_every_page(
    steps: list[tuple[set[int], set[int], bool, int]], data: st.DataObject
) -> None:
    vms = Vm(), Vm()
    content = np.zeros(PAGES, dtype=np.uint64)
    absent: set[int] = set()
    for number, (changed, toggled, smart, most_pages) in enumerate(steps):
        absent ^= toggled
        content[int64s(sorted(changed))] = data.draw(st.integers(0, 1))
        readable = ~np.isin(np.arange(PAGES), list(absent))
        written = range(PAGES) if number == 0 else changed | toggled
        step = Step(sorted(written), readable, smart, most_pages)
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
    nothing = np.empty(0, dtype=np.int64)
    everywhere = np.ones(PAGES, dtype=np.bool_)
    content = np.arange(PAGES, dtype=np.uint64)
    first = Step(list(range(PAGES)), everywhere, smart=True, most_pages=PAGES)
    vm.round(first, content, whole=True)
    assert vm.agenda.with_open(nothing).tolist() == list(range(PAGES))
    assert not len(vm.agenda.take_settled())
    vm.round(Step([], everywhere, smart=True, most_pages=PAGES), content, whole=False)
    assert vm.agenda.take_settled().tolist() == list(range(PAGES))
    assert not len(vm.agenda.with_open(nothing))


def test_where_most_changes_any_page_is_considered() -> None:
    """What is listed is bounded, and what is not listed is not missed."""
    pages = 1 << 12
    columns = PageColumns(pages)
    agenda = Agenda(columns, ScanAges(pages))
    every_page = np.arange(pages)
    content = np.arange(pages, dtype=np.uint64)
    everywhere = np.ones(pages, dtype=np.bool_)
    for _ in range(2):
        due = agenda.due(
            every_page, readable=everywhere, own=everywhere, written=every_page, smart=False
        )
        before = columns.flags[due]
        observe(columns, due, content[due])
        agenda.observed(due, before)
        assert agenda.with_open(every_page[:1]).tolist() == every_page.tolist()
    columns.merge(every_page[5:6], 7)
    assert agenda.take_settled().tolist() == [page for page in range(pages) if page != 5]
    assert not len(agenda.take_settled())
    nothing = every_page[:0]
    agenda.due(every_page, readable=everywhere, own=everywhere, written=nothing, smart=False)
    assert not len(agenda.with_open(nothing))
