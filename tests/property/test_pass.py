"""A whole pass over a small fleet: scan, trees, plan, counters, together.

The remap is simulated by writing the slot columns; digests are the contents'
own numbers, so that any page on the wrong store slot shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core import scan
from vmdedup.core.counters import sharing_counts
from vmdedup.core.plan import assign_slots, choose, runs, vma_count
from vmdedup.core.rmap import FIRST_SLOT, OWN, ZERO, PageColumns
from vmdedup.core.stable_tree import NOT_FOUND, StableTree
from vmdedup.core.unstable_tree import group

from .strategies import Fleet, fleets, int64s

pytestmark = pytest.mark.property

ZERO_DIGEST = 0


@dataclass
class Host:
    """Just enough of an engine: a store as a dict, remaps as column writes."""

    fleet: Fleet
    vma_budget: int
    tree: StableTree = field(default_factory=StableTree)
    store: dict[int, int] = field(default_factory=dict)
    vms: list[PageColumns] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vms = [PageColumns(len(pages)) for pages in self.fleet.contents]

    def look(self, contents: tuple[tuple[int, ...], ...]) -> None:
        for columns, pages in zip(self.vms, contents, strict=True):
            every = np.arange(len(pages), dtype=np.int64)
            scan.observe(columns, every, np.array(pages, dtype=np.uint64))

    def merge(self) -> int:
        """Returns the pages taken."""
        found = [scan.candidates(columns, ZERO_DIGEST) for columns in self.vms]
        wanted = [np.full(len(columns), OWN, dtype=np.int32) for columns in self.vms]
        unmatched: list[tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int64]]] = []
        for vm, (columns, these) in enumerate(zip(self.vms, found, strict=True)):
            digest = columns.digest[these.nonzero]
            slot = self.tree.search(digest)
            wanted[vm][these.zero] = ZERO
            wanted[vm][these.nonzero] = slot
            is_new = slot == NOT_FOUND
            page = these.nonzero[is_new]
            unmatched.append((digest[is_new], np.full(len(page), vm, dtype=np.int32), page))
        digest, vm_of, page_of = (np.concatenate(each) for each in zip(*unmatched, strict=True))
        groups = group(digest, vm_of, page_of)
        slots = assign_slots(groups, FIRST_SLOT + len(self.store))
        self.store.update(zip(slots.tolist(), groups.digest.tolist(), strict=True))
        self.tree.insert(groups.digest, slots)
        taken = 0
        for vm in range(len(self.vms)):
            mine = groups.of_vm(vm)
            wanted[vm][groups.page[mine]] = slots[groups.group[mine]]
            taken += self.remap(vm, wanted[vm])
        return taken

    def remap(self, vm: int, wanted: NDArray[np.int32]) -> int:
        columns, regions = self.vms[vm], int64s(self.fleet.region_starts[vm])
        page = np.flatnonzero(wanted != OWN)
        choice = choose(columns.slot, runs(page, wanted[page], regions), regions, self.vma_budget)
        columns.merge(*choice.taken.page_slots())
        return choice.taken.pages

    def check(self, contents: tuple[tuple[int, ...], ...]) -> None:
        for vm, (columns, pages) in enumerate(zip(self.vms, contents, strict=True)):
            for slot, content in zip(columns.slot.tolist(), pages, strict=True):
                if slot == ZERO:
                    assert content == 0
                elif slot != OWN:
                    assert self.store[slot] == content
            regions = int64s(self.fleet.region_starts[vm])
            assert vma_count(columns.slot, regions) <= max(self.vma_budget, len(regions))

    def saved_pages(self) -> int:
        sites = [columns.slot[columns.slot >= FIRST_SLOT] for columns in self.vms]
        zero = [int(np.count_nonzero(columns.slot == ZERO)) for columns in self.vms]
        counts = sharing_counts(sites, zero)
        return counts.pages_sharing + counts.zero_pages


@given(fleets(), st.integers(0, 12))
def test_no_page_stands_on_another_content_and_merging_again_changes_nothing(
    fleet: Fleet, budget: int
) -> None:
    host = Host(fleet, budget)
    host.look(fleet.contents)
    assert host.merge() == 0, "one look is not enough"
    host.look(fleet.contents)
    host.merge()
    host.check(fleet.contents)
    before = [columns.slot.copy() for columns in host.vms]
    store = dict(host.store)
    host.merge()
    assert host.store == store
    assert all(np.array_equal(a, c.slot) for a, c in zip(before, host.vms, strict=True))


@given(fleets())
def test_without_a_budget_everything_savable_is_saved(fleet: Fleet) -> None:
    host = Host(fleet, 1_000)
    host.look(fleet.contents)
    host.look(fleet.contents)
    host.merge()
    host.check(fleet.contents)
    nonzero = [content for pages in fleet.contents for content in pages if content]
    zero = sum(pages.count(0) for pages in fleet.contents)
    assert host.saved_pages() == len(nonzero) - len(set(nonzero)) + zero


@given(fleets(), st.data())
def test_a_page_that_changes_is_merged_only_after_it_held_still(
    fleet: Fleet, data: st.DataObject
) -> None:
    host = Host(fleet, 1_000)
    host.look(fleet.contents)
    vm = data.draw(st.integers(0, len(fleet.contents) - 1))
    page = data.draw(st.integers(0, len(fleet.contents[vm]) - 1))
    changed = [list(pages) for pages in fleet.contents]
    changed[vm][page] += 1
    contents = tuple(tuple(pages) for pages in changed)
    host.look(contents)
    host.merge()
    assert host.vms[vm].slot[page] == OWN
    host.check(contents)
    host.look(contents)
    host.merge()
    host.check(contents)
    copies = sum(pages.count(contents[vm][page]) for pages in contents)
    assert (host.vms[vm].slot[page] != OWN) == (copies > 1 or contents[vm][page] == 0)
