"""Nominating among the news comes to what nominating among all candidates comes to.

Whatever happens to the pages, and whatever comes of the nominations: each one is made
both ways from the same state, and must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core import scan
from vmdedup.core.agenda import Agenda
from vmdedup.core.huge_pages import Blocks, HugePages
from vmdedup.core.news import News
from vmdedup.core.nominate import Nomination, VmView, nominate
from vmdedup.core.plan import Runs, vma_count
from vmdedup.core.rmap import FIRST_SLOT, OWN, UNSHARED, PageColumns
from vmdedup.core.sharers import Sharers
from vmdedup.core.smart_scan import ScanAges
from vmdedup.core.stable_tree import StableTree

from .strategies import int64s

pytestmark = pytest.mark.property

VMS = 3
PAGES = 7
BLOCK = 2
ZERO_DIGEST = 0
REGION_STARTS = int64s([0, 4])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmdedup.core.huge_pages.BLOCK_PAGES", BLOCK)


@dataclass(frozen=True)
class Look:
    """How a look is done."""

    tracked: bool = True
    smart: bool = False
    most_pages: int = PAGES


class Vm:
    """Pages with a content each (the digest's number), some of them absent."""

    def __init__(self) -> None:
        self.columns = PageColumns(PAGES)
        self.ages = ScanAges(PAGES)
        self.agenda = Agenda(self.columns, self.ages)
        self.content = np.ones(PAGES, dtype=np.uint64)
        self.written = set(range(PAGES))
        self.absent: set[int] = set()
        self.broken: set[int] = set()
        """Merged and written since."""
        self.vmas = len(REGION_STARTS)

    def write(self, page: int, content: int) -> None:
        self.content[page] = content
        self.written.add(page)
        self.absent.discard(page)
        if self.columns.slot[page] != OWN:
            self.broken.add(page)

    def give_up(self, page: int) -> None:
        """The guest discards a page; one that was merged shows the store again."""
        self.broken.discard(page)
        if self.columns.slot[page] == OWN:
            self.absent.add(page)
        self.written.add(page)

    def come_loose(self, page: int) -> None:
        """A mapping of ours went; what `AttachedVm.refresh` does then."""
        if self.columns.slot[page] != OWN:
            self.columns.unmerge(int64s([page]))
            self.broken.discard(page)
            self.agenda.settle(int64s([page]))
            self.vmas = vma_count(self.columns.slot, REGION_STARTS)

    def look(self, how: Look) -> None:
        written = int64s(sorted(self.written))
        self.written.clear()
        scan.mark_broken(self.columns, written, np.isin(written, list(self.broken)))
        page = self.agenda.with_open(written) if how.tracked else np.arange(PAGES)
        own = self.columns.slot[page] == OWN
        readable = ~self.columns.shared(page) & ~np.isin(page, list(self.absent))
        due = self.agenda.due(
            page,
            readable=readable,
            own=own,
            written=written if how.tracked else None,
            missed=np.zeros_like(page),
            smart=how.smart,
        )
        read, unread = due[: how.most_pages], due[how.most_pages :]
        before = self.columns.flags[read]
        scan.observe(self.columns, read, self.content[read])
        self.agenda.observed(read, before)
        scan.mark_written(self.columns, unread)
        self.ages.owe(unread)


@dataclass
class Host:
    """Just enough of an engine: merges are column writes."""

    most_sharing: int | None
    vma_budget: int
    density: int = 0
    vms: list[Vm] = field(default_factory=lambda: [Vm() for _ in range(VMS)])
    tree: StableTree = field(default_factory=StableTree)
    next_slot: int = FIRST_SLOT
    deferred: bool = False

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.columns = [vm.columns for vm in self.vms]
        self.news = News(self.columns)
        self.sharers = Sharers(self.columns)
        self.has_begun = False

    def look(self, how: Look) -> None:
        for vm in self.vms:
            vm.look(how)
        self.settle()

    def settle(self) -> None:
        if self.has_begun:
            settled = [vm.agenda.take_settled() for vm in self.vms]
            self.news.settle(
                settled, self.tree, zero_digest=ZERO_DIGEST, use_zero_pages=True, share=True
            )

    def huge_pages(self, vm: Vm) -> HugePages:
        """Every second block is a huge page until something of it is merged."""
        blocks = Blocks(REGION_STARTS, np.zeros_like(REGION_STARTS), PAGES)
        is_huge = blocks.full(vm.columns.slot == OWN) & (np.arange(len(blocks)) % 2 == 0)
        return HugePages(blocks, is_huge, self.density)

    def nominate(self, sharers: Sharers, among: list[NDArray[np.int64]] | None) -> Nomination:
        views = [
            VmView(
                vm.columns,
                REGION_STARTS,
                self.vma_budget,
                None if among is None else vm.vmas,
                None if among is None else among[number],
                self.huge_pages(vm),
            )
            for number, vm in enumerate(self.vms)
        ]
        return nominate(
            views,
            self.tree,
            zero_digest=ZERO_DIGEST,
            use_zero_pages=True,
            share=True,
            next_slot=self.next_slot,
            most_sharing=self.most_sharing,
            sharers=sharers,
        )

    def merge(self, fate: Fate) -> None:
        self.settle()
        if self.deferred:
            self.begin()
        whole = self.nominate(Sharers(self.columns), None)
        if self.has_begun:
            nomination = self.nominate(self.sharers, self.news.take())
            assert plan(nomination) == plan(whole)
        else:
            nomination = whole
            for vm in self.vms:
                vm.agenda.forget_settled()
        self.news.nominated(nomination)
        self.has_begun = True
        self.deferred = any(len(planned.deferred) for planned in nomination.vms)
        for vm, planned in zip(self.vms, whole.vms, strict=True):
            noted = scan.are_candidates(vm.columns) & (vm.columns.flags & UNSHARED != 0)
            assert np.flatnonzero(noted).tolist() == planned.unshared.tolist()
            assert scan.count(vm.columns).unshared_pages == len(planned.unshared)
        if not fate.postponed:
            self.carry_out(nomination, fate)
        self.news.merged(nomination)

    def carry_out(self, nomination: Nomination, fate: Fate) -> None:
        new = nomination.new
        digest = np.where(
            np.isin(new.digest, list(fate.torn)), np.uint64(fate.torn_into), new.digest
        )
        self.tree.insert(digest, self.next_slot + np.arange(len(new), dtype=np.int32))
        self.news.published(digest[digest != new.digest])
        self.next_slot += len(new)
        is_torn = np.isin(new.digest, list(fate.torn))
        for vm, planned in zip(self.vms, nomination.vms, strict=True):
            page, slot = planned.taken.page_slots()
            self.sharers.add(slot)
            at = slot - new.first_slot
            missed = np.isin(page, list(fate.missed))
            missed[at >= 0] |= is_torn[at[at >= 0]]
            rejected = np.isin(page, list(fate.rejected)) & ~missed
            merged = ~missed & ~rejected
            vm.columns.merge(page[merged], slot[merged])
            vm.broken.difference_update(page[merged].tolist())
            scan.forget(vm.columns, page[rejected])
            vm.vmas = vma_count(vm.columns.slot, REGION_STARTS)

    def sweep(self) -> None:
        """Give back the store pages that nobody stands on."""
        used = np.concatenate([columns.slot for columns in self.columns])
        self.tree.remove(np.setdiff1d(np.arange(FIRST_SLOT, self.next_slot, dtype=np.int32), used))


@dataclass(frozen=True)
class Fate:
    """What comes of a nomination: pages missed or rejected in each VM, contents that tore."""

    postponed: bool
    missed: set[int]
    rejected: set[int]
    torn: set[int]
    torn_into: int


MERGED = Fate(postponed=False, missed=set(), rejected=set(), torn=set(), torn_into=0)
POSTPONED = replace(MERGED, postponed=True)


def plan(nomination: Nomination) -> list[object]:
    """All of it but who was left alone, as lists."""
    new = nomination.new
    return [
        *(column.tolist() for column in (new.vm, new.page, new.digest)),
        *((shape(planned.taken), planned.deferred.tolist()) for planned in nomination.vms),
        *((each.choice.vmas_before, each.choice.vmas_after) for each in nomination.vms),
    ]


def shape(some: Runs) -> list[list[int]]:
    return [some.start_page.tolist(), some.length.tolist(), some.slot.tolist()]


VM = st.integers(0, VMS - 1)
PAGE = st.integers(0, PAGES - 1)
CONTENT = st.integers(0, 4)
MOSTLY_NONE = st.one_of(st.just(set[int]()), st.sets(PAGE, max_size=3))
FATE = st.builds(
    Fate,
    postponed=st.sampled_from([False, False, False, True]),
    missed=MOSTLY_NONE,
    rejected=MOSTLY_NONE,
    torn=st.one_of(st.just(set[int]()), st.sets(CONTENT, max_size=1)),
    torn_into=CONTENT,
)
LOOK = st.builds(
    Look,
    tracked=st.sampled_from([True, True, False]),
    smart=st.booleans(),
    most_pages=st.sampled_from([PAGES, PAGES, 2]),
)
STEP = st.one_of(
    st.tuples(st.just("write"), VM, PAGE, CONTENT),
    st.tuples(st.just("write"), VM, PAGE, CONTENT),
    st.tuples(st.just("give_up"), VM, PAGE),
    st.tuples(st.just("come_loose"), VM, PAGE),
    st.tuples(st.just("look"), LOOK),
    st.tuples(st.just("look"), LOOK),
    st.tuples(st.just("merge"), FATE),
    st.tuples(st.just("sweep")),
)


@given(
    st.lists(STEP, min_size=10, max_size=60),
    st.sampled_from([None, None, 2, 3]),
    st.sampled_from([1000, 1000, 4]),
    st.integers(0, BLOCK),
)
def test_it_comes_to_the_same_as_nominating_among_all(
    steps: list[tuple[object, ...]], most_sharing: int | None, vma_budget: int, density: int
) -> None:
    host = Host(most_sharing, vma_budget, density)
    for verb, *arguments in steps:
        match verb, arguments:
            case "look", [Look() as how]:
                host.look(how)
            case "merge", [Fate() as fate]:
                host.merge(fate)
            case "sweep", []:
                host.sweep()
            case str(), [int(number), *rest]:
                getattr(host.vms[number], str(verb))(*rest)


def test_a_quiet_domain_has_nothing_to_consider() -> None:
    host = Host(None, 1000)
    host.vms[0].write(3, 2)
    host.look(Look())
    host.look(Look())
    host.merge(MERGED)
    assert host.vms[0].columns.shared().tolist() == [True, True, True, False, True, True, True]
    host.look(Look())
    assert not host.news.waits
    host.vms[1].write(5, 2)
    host.look(Look())
    host.look(Look())
    assert host.news.pages == 1
    assert [pages.tolist() for pages in host.news.take()] == [[3], [5], []]


def distinct_host(most_sharing: int | None = None) -> Host:
    """Every page holds a content of its own, has held still and was compared."""
    host = Host(most_sharing, 1000)
    for number, vm in enumerate(host.vms):
        vm.content[:] = 100 * (number + 1) + np.arange(PAGES, dtype=np.uint64)
    host.look(Look())
    host.look(Look())
    host.merge(MERGED)
    return host


def write(host: Host, content: int, *vms: int) -> None:
    """The first page of these VMs gets this content and holds still."""
    for vm in vms:
        host.vms[vm].write(0, content)
    host.look(Look())
    host.look(Look())


def shares(host: Host) -> list[bool]:
    """Whether the first page of each VM is merged."""
    return [bool(vm.columns.shared()[0]) for vm in host.vms]


def test_a_page_whose_store_page_was_full_gets_in_when_there_is_room() -> None:
    host = distinct_host(most_sharing=2)
    write(host, 50, 0, 1)
    host.merge(MERGED)
    write(host, 50, 2)
    host.merge(MERGED)
    assert shares(host) == [True, True, False]
    write(host, 60, 0)
    host.merge(MERGED)
    assert shares(host) == [False, True, True]


def test_a_page_whose_partner_went_while_it_waited_is_found_by_another() -> None:
    host = Host(None, 1000)
    for number, vm in enumerate(host.vms):
        vm.content[:] = 100 * (number + 1) + np.arange(PAGES, dtype=np.uint64)
    write(host, 50, 0, 1)
    host.merge(POSTPONED)
    write(host, 60, 1)
    host.merge(MERGED)
    write(host, 50, 2)
    host.merge(MERGED)
    assert shares(host) == [True, False, True]


def test_a_page_that_is_published_by_accident_is_found() -> None:
    host = distinct_host()
    write(host, 50, 0, 1)
    host.merge(replace(MERGED, torn={50}, torn_into=300))
    assert shares(host) == [False, False, False]
    host.merge(MERGED)
    assert shares(host) == [True, True, True]
