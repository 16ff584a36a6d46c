"""Huge pages are split only where enough of their pages would be merged, as a naive model says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.huge_pages import Blocks, HugePages, most_to_give_back
from vmdedup.core.nominate import Nomination, VmView, nominate
from vmdedup.core.rmap import PageColumns
from vmdedup.core.scan import observe
from vmdedup.core.stable_tree import StableTree

from .strategies import int64s, region_starts

pytestmark = pytest.mark.property

BLOCK = 4
ZERO_DIGEST = 0
PUBLISHED = 1
"""A content that the stable tree knows."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmdedup.core.huge_pages.BLOCK_PAGES", BLOCK)


@dataclass(frozen=True)
class Guest:
    """Contents by page, the regions, and which blocks are huge pages, by number."""

    contents: list[int]
    starts: tuple[int, ...]
    leads: list[int]
    huge: list[bool]

    def blocks(self) -> Blocks:
        return Blocks(int64s(self.starts), int64s(self.leads), len(self.contents))

    def block_of(self) -> list[tuple[int, int]]:
        """The (region, block of it) of each page, counted one by one."""
        found = []
        for page in range(len(self.contents)):
            region = max(r for r, start in enumerate(self.starts) if start <= page)
            found.append((region, (page - self.starts[region] + self.leads[region]) // BLOCK))
        return found

    def huge_blocks(self) -> set[tuple[int, int]]:
        every = sorted(set(self.block_of()))
        return {block for block, huge in zip(every, self.huge, strict=False) if huge}

    def view(self, density: int, vma_budget: int) -> VmView:
        columns = PageColumns(len(self.contents))
        page = np.arange(len(self.contents), dtype=np.int64)
        for _ in range(2):
            observe(columns, page, np.array(self.contents, dtype=np.uint64))
        blocks = self.blocks()
        is_huge = np.array(self.huge[: len(blocks)], dtype=np.bool_)
        huge = HugePages(blocks, is_huge, density)
        return VmView(columns, int64s(self.starts), vma_budget, huge=huge)


@st.composite
def guests(draw: st.DrawFn) -> Guest:
    contents = draw(st.lists(st.integers(0, 9), min_size=1, max_size=24))
    starts = draw(region_starts(len(contents)))
    leads = draw(st.lists(st.integers(0, BLOCK - 1), min_size=len(starts), max_size=len(starts)))
    huge = draw(st.lists(st.booleans(), min_size=24, max_size=24))
    return Guest(contents, starts, leads, huge)


FLEETS = st.lists(guests(), min_size=1, max_size=3)
DENSITIES = st.integers(0, BLOCK)


def plan(fleet: list[Guest], density: int, vma_budget: int = 10_000) -> Nomination:
    tree = StableTree()
    tree.insert(np.array([PUBLISHED], dtype=np.uint64), np.array([7], dtype=np.int32))
    return nominate(
        [guest.view(density, vma_budget) for guest in fleet],
        tree,
        zero_digest=ZERO_DIGEST,
        use_zero_pages=True,
        share=True,
        next_slot=100,
    )


def savable(fleet: list[Guest], left: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The (VM, page) of those left whose content is zero, published, or left twice."""
    counts = Counter(fleet[vm].contents[page] for vm, page in left)
    content = {site: fleet[site[0]].contents[site[1]] for site in left}
    return {
        site
        for site in left
        if content[site] in (ZERO_DIGEST, PUBLISHED) or counts[content[site]] >= 2
    }


def naive(fleet: list[Guest], density: int) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The sites to be merged and those kept: huge pages with too few are given up one by one."""
    left = every = savable(
        fleet, {(vm, page) for vm, guest in enumerate(fleet) for page in range(len(guest.contents))}
    )
    while True:
        for vm, guest in enumerate(fleet):
            block_of = guest.block_of()
            for block in sorted(guest.huge_blocks()):
                inside = {(vm, page) for page, mine in enumerate(block_of) if mine == block}
                if 0 < len(inside & left) < min(density, len(inside)):
                    left = savable(fleet, left - inside)
                    break
            else:
                continue
            break
        else:
            return left, every - left


@given(FLEETS, DENSITIES)
def test_the_choice_is_that_of_the_naive_model(fleet: list[Guest], density: int) -> None:
    nomination = plan(fleet, density)
    merged, kept = naive(fleet, density)
    for vm, (guest, planned) in enumerate(zip(fleet, nomination.vms, strict=True)):
        assert planned.taken.page().tolist() == sorted(page for at, page in merged if at == vm)
        assert planned.kept.tolist() == sorted(page for at, page in kept if at == vm)
        huge, block_of = guest.huge_blocks(), guest.block_of()
        inside = [page for at, page in kept if at == vm and block_of[page] in huge]
        assert planned.kept_in_huge == len(inside)
        assert not len(planned.deferred)


@given(FLEETS, DENSITIES, st.integers(1, 12), st.sampled_from([1, 2, 16]))
def test_no_huge_page_is_split_for_fewer_pages_whatever_the_budget_admits(
    fleet: list[Guest], density: int, vma_budget: int, most_rounds: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmdedup.core.nominate._MOST_ROUNDS", most_rounds)
        nomination = plan(fleet, density, vma_budget)
    unlimited = plan(fleet, 0)
    for guest, planned, wanted in zip(fleet, nomination.vms, unlimited.vms, strict=True):
        block_of = guest.block_of()
        taken = Counter(block_of[page] for page in planned.taken.page().tolist())
        size = Counter(block_of)
        for block in guest.huge_blocks() & set(taken):
            assert taken[block] >= min(density, size[block])
        parts = [planned.taken.page(), planned.deferred, planned.kept]
        assert sorted(np.concatenate(parts).tolist()) == wanted.taken.page().tolist()
        assert planned.choice.vmas_after <= max(vma_budget, planned.choice.vmas_before)


@given(guests(), st.data())
def test_blocks_are_counted_by_address(guest: Guest, data: st.DataObject) -> None:
    blocks, block_of = guest.blocks(), guest.block_of()
    every = sorted(set(block_of))
    assert blocks.of(np.arange(len(block_of))).tolist() == [every.index(at) for at in block_of]
    assert blocks.pages_of.tolist() == [block_of.count(at) for at in every]
    is_such = data.draw(st.lists(st.booleans(), min_size=len(block_of), max_size=len(block_of)))
    full = {at for at in every if all(is_such[p] for p, b in enumerate(block_of) if b == at)}
    assert blocks.full(np.array(is_such)).tolist() == [at in full for at in every]


@given(guests(), st.sets(st.integers(0, 23)))
def test_pages_are_counted_by_block(guest: Guest, chosen: set[int]) -> None:
    blocks, block_of = guest.blocks(), guest.block_of()
    is_such = np.array([page in chosen for page in range(len(block_of))], dtype=np.bool_)
    naive_count = Counter(block_of[page] for page in np.flatnonzero(is_such).tolist())
    size = Counter(block_of)
    each = sorted(size)
    assert blocks.count(is_such).tolist() == [naive_count[block] for block in each]
    assert blocks.full(is_such).tolist() == [naive_count[block] == size[block] for block in each]


def test_few_savable_pages_are_far_below_the_density() -> None:
    """What is made a huge page again is not at once worth splitting again."""
    assert [most_to_give_back(density) for density in (0, 1, 3, 4, 192, 512)] == [
        0,
        0,
        0,
        1,
        48,
        128,
    ]
