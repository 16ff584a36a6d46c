"""Nomination keeps its limits, whatever the pages are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdedup.core.nominate import Nomination, VmView, nominate
from vmdedup.core.plan import vma_count
from vmdedup.core.rmap import OWN, ZERO, PageColumns
from vmdedup.core.scan import observe
from vmdedup.core.sharers import Sharers
from vmdedup.core.stable_tree import StableTree

pytestmark = pytest.mark.property

ZERO_DIGEST = 0
NEXT_SLOT = 100

fleets = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=40), min_size=1, max_size=4)


def view(digests: list[int], vma_budget: int = 10_000) -> VmView:
    """A VM whose pages hold these contents, all of them still."""
    columns = PageColumns(len(digests))
    page = np.arange(len(digests), dtype=np.int64)
    for _ in range(2):
        observe(columns, page, np.array(digests, dtype=np.uint64))
    return VmView(columns, np.zeros(1, dtype=np.int64), vma_budget)


def plan(
    fleet: list[list[int]],
    tree: StableTree,
    *,
    most_new_pages: int | None = None,
    most_sharing: int | None = None,
    sites_of_slot: dict[int, int] | None = None,
    vma_budgets: Sequence[int] = (),
) -> Nomination:
    budgets = [*vma_budgets, *[10_000] * len(fleet)]
    views = [view(digests, budget) for digests, budget in zip(fleet, budgets, strict=False)]
    merged = [slot for slot, count in (sites_of_slot or {}).items() for _ in range(count)]
    others = PageColumns(len(merged))
    others.merge(np.arange(len(merged)), np.array(merged, dtype=np.int32))
    return nominate(
        views,
        tree,
        zero_digest=ZERO_DIGEST,
        use_zero_pages=True,
        share=True,
        next_slot=NEXT_SLOT,
        most_new_pages=most_new_pages,
        most_sharing=most_sharing,
        sharers=Sharers([others, *(each.columns for each in views)]),
    )


def sites_by_slot(nomination: Nomination, fleet: list[list[int]]) -> dict[int, list[int]]:
    """Contents of the sites that each slot is to be shared by."""
    found: dict[int, list[int]] = {}
    for planned, digests in zip(nomination.vms, fleet, strict=True):
        pages, slots = planned.taken.page_slots()
        for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
            found.setdefault(slot, []).append(digests[page])
    return found


@given(fleets, st.integers(2, 5), st.integers(0, 5))
def test_no_slot_gets_more_sites_than_allowed(
    fleet: list[list[int]], most_sharing: int, taken: int
) -> None:
    tree = StableTree()
    tree.insert(np.array([1], dtype=np.uint64), np.array([7], dtype=np.int32))
    nomination = plan(fleet, tree, most_sharing=most_sharing, sites_of_slot={7: taken})
    for slot, contents in sites_by_slot(nomination, fleet).items():
        if slot == ZERO:
            continue
        assert len(contents) + (taken if slot == 7 else 0) <= max(most_sharing, taken)
        assert len(set(contents)) == 1
        assert len(contents) >= 2 or slot == 7


@given(fleets, st.integers(0, 4))
def test_no_more_new_pages_than_allowed_and_the_most_shared_first(
    fleet: list[list[int]], most_new_pages: int
) -> None:
    nomination = plan(fleet, StableTree(), most_new_pages=most_new_pages)
    assert len(nomination.new) <= most_new_pages
    counts = Counter(digest for digests in fleet for digest in digests if digest != ZERO_DIGEST)
    repeated = sorted((n for n in counts.values() if n >= 2), reverse=True)
    sharing = sites_by_slot(nomination, fleet)
    saved = sum(len(contents) for slot, contents in sharing.items() if slot != ZERO)
    assert saved == sum(repeated[:most_new_pages])


@given(fleets, st.lists(st.integers(1, 30), min_size=4, max_size=4), st.sampled_from([1, 2, 16]))
def test_budgets_are_kept_and_spent_on_what_is_shared(
    fleet: list[list[int]], budgets: list[int], most_rounds: int
) -> None:
    """Also what one VM alone has VMAs for: it is given up, and not cut out of its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmdedup.core.nominate._MOST_ROUNDS", most_rounds)
        nomination = plan(fleet, StableTree(), vma_budgets=budgets)
    unlimited = plan(fleet, StableTree())
    assert all(
        len(sites) >= 2 for slot, sites in sites_by_slot(nomination, fleet).items() if slot != ZERO
    )
    for planned, wanted, digests, budget in zip(
        nomination.vms, unlimited.vms, fleet, budgets, strict=False
    ):
        column = np.full(len(digests), OWN, dtype=np.int32)
        pages, slots = planned.taken.page_slots()
        column[pages] = slots
        vmas = vma_count(column, np.zeros(1, dtype=np.int64))
        assert vmas == planned.choice.vmas_after <= budget
        assert planned.choice.vmas_if_all == wanted.choice.vmas_after
        assert planned.choice.vma_budget_for_all == wanted.choice.vma_budget_for_all
        both = sorted([*pages.tolist(), *planned.deferred.tolist()])
        assert both == wanted.taken.page().tolist()


@given(fleets)
def test_new_slots_are_consecutive_and_hold_their_content(fleet: list[list[int]]) -> None:
    nomination = plan(fleet, StableTree(), most_sharing=3)
    sharing = sites_by_slot(nomination, fleet)
    new = sorted(slot for slot in sharing if slot >= NEXT_SLOT)
    assert new == list(range(NEXT_SLOT, NEXT_SLOT + len(nomination.new)))
    for index, digest in enumerate(nomination.new.digest.tolist()):
        assert set(sharing[NEXT_SLOT + index]) == {digest}
        source = fleet[int(nomination.new.vm[index])]
        assert source[int(nomination.new.page[index])] == digest
