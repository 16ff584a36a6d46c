"""Copies of repeated contents: what they hold, what they cost, and what they are good for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core import plan
from vmdedup.core.nominate import VmView, nominate
from vmdedup.core.plan import assign_slots
from vmdedup.core.pool import split, with_copies
from vmdedup.core.rmap import OWN, PageColumns
from vmdedup.core.scan import observe
from vmdedup.core.stable_tree import StableTree
from vmdedup.core.unstable_tree import Groups, group

pytestmark = pytest.mark.property

MAPPINGS_PER_PAGE = 16
FIRST = np.zeros(1, dtype=np.int64)
Fleet = list[list[int]]

stretches = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 90)), min_size=1, max_size=6)
fleets = st.lists(stretches, min_size=1, max_size=3).map(
    lambda vms: [[digest for digest, pages in vm for _ in range(pages)] for vm in vms]
)
limits = st.one_of(st.none(), st.integers(2, 300))


def grouped(fleet: Fleet) -> Groups:
    return group(
        np.array([digest for vm in fleet for digest in vm], dtype=np.uint64),
        np.repeat(np.arange(len(fleet), dtype=np.int32), [len(vm) for vm in fleet]),
        np.concatenate([np.arange(len(vm), dtype=np.int64) for vm in fleet]),
    )


def mappings(groups: Groups, vms: int) -> int:
    """How many the kernel needs when every site stands on its group's slot."""
    slots = assign_slots(groups, 1)
    return sum(
        len(plan.runs(groups.page[mine], slots[groups.group[mine]], FIRST))
        for mine in map(groups.of_vm, range(vms))
    )


@given(fleets, limits)
def test_the_same_sites_on_copies_of_the_same_contents(fleet: Fleet, limit: int | None) -> None:
    before = grouped(fleet)
    after = with_copies(before, limit)
    assert after.vm.tolist() == before.vm.tolist()
    assert after.page.tolist() == before.page.tolist()
    assert after.digest[after.group].tolist() == before.digest[before.group].tolist()
    sites = after.sites.tolist()
    assert len(sites) == len(after.digest) == len(after.first)
    assert all(0 < count <= (limit or count) for count in sites)
    if limit is None:
        assert all(count >= 2 for count in sites)
    numbers = after.group.tolist()
    assert after.first.tolist() == [numbers.index(number) for number in range(len(sites))]


@given(fleets, limits)
def test_a_copy_costs_no_more_memory_than_the_mappings_it_saves(
    fleet: Fleet, limit: int | None
) -> None:
    before = grouped(fleet)
    if limit is not None:
        before = split(before, limit)
    after = with_copies(grouped(fleet), limit)
    vms = len(fleet)
    # What lies between two contents may fall apart where one of them moves to the pool, or
    # at what is left over by the limit.
    edges = sum(one != other for vm in fleet for one, other in pairwise(vm))
    left_over = sum(after.sites < 3) if limit is not None else 0
    cost = mappings(after, vms) + MAPPINGS_PER_PAGE * (len(after) - left_over)
    assert cost <= mappings(before, vms) + MAPPINGS_PER_PAGE * len(before) + 2 * edges


def view(digests: list[int]) -> VmView:
    columns = PageColumns(len(digests))
    for _ in range(2):
        observe(columns, np.arange(len(digests)), np.array(digests, dtype=np.uint64))
    return VmView(columns, FIRST, 10_000)


@pytest.mark.parametrize("limit", [None, 256])
@pytest.mark.parametrize("first_page", [0, 3])
def test_a_long_stretch_needs_few_mappings_and_pages(limit: int | None, first_page: int) -> None:
    fleet = [[*range(100, 100 + first_page), *[7] * 4096], [*range(100, 103), *[7] * 2048]]
    groups = with_copies(grouped(fleet), limit)
    pages = len(groups) - len({100, 101, 102} & set(groups.digest.tolist()))
    assert mappings(groups, 2) <= 6144 / 16 + 8
    fewest = 1 if limit is None else 24
    assert pages <= fewest + 32


@given(st.integers(2, 64), st.integers(0, 200), st.integers(1, 200), st.integers(0, 200))
def test_neighbours_that_come_later_join_what_is_there(
    copies: int, start: int, pages: int, more: int
) -> None:
    """A content that the store has: wherever its sites begin, and however they come."""
    tree = StableTree()
    tree.insert(np.full(copies, 7, dtype=np.uint64), np.arange(10, 10 + copies, dtype=np.int32))
    vm = view([*range(1000, 1000 + start), *[7] * pages, *range(2000, 2000 + more)])
    slots = np.full(len(vm.columns.slot), OWN, dtype=np.int32)
    for wanted in ([7] * pages, [7] * (pages + more)):
        digests = np.array(wanted, dtype=np.uint64)
        page = np.arange(start, start + len(wanted))
        for _ in range(2):
            observe(vm.columns, page, digests)
        nomination = nominate(
            [vm],
            tree,
            zero_digest=0,
            use_zero_pages=True,
            share=True,
            next_slot=10 + copies,
        )
        assert len(nomination.new) == 0
        taken, on = nomination.vms[0].taken.page_slots()
        slots[taken] = on
        vm.columns.merge(taken, on)
        stood = np.flatnonzero(slots != OWN)
        assert stood.tolist() == page.tolist()
        assert len(plan.runs(stood, slots[stood], FIRST)) <= len(wanted) // copies + 2
