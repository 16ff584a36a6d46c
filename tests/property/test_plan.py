"""Runs, VMA counts and the choice, against page-by-page walks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmdedup.core.plan import Runs, choose, runs, vma_count
from vmdedup.core.rmap import OWN, ZERO

from .strategies import int64s, mappings, remaps

pytestmark = pytest.mark.property

Mapping = tuple[NDArray[np.int32], tuple[int, ...]]
Remap = tuple[NDArray[np.int32], tuple[int, ...], dict[int, int]]


def naive_vmas(column: list[int], starts: tuple[int, ...]) -> int:
    """What the kernel would have: (kind of backing, offset in it) per page."""
    vmas = 0
    previous: tuple[str, int] | None = None
    for page, slot in enumerate(column):
        backing = {OWN: ("own", page), ZERO: ("zero", page)}.get(slot, ("store", slot))
        grown = previous is not None and backing == (previous[0], previous[1] + 1)
        if page in starts or not grown:
            vmas += 1
        previous = backing
    return vmas


def wanted_runs(wanted: dict[int, int], starts: tuple[int, ...]) -> Runs:
    slots = np.array(list(wanted.values()), dtype=np.int32)
    return runs(int64s(wanted), slots, int64s(starts))


def applied(column: NDArray[np.int32], chosen: Runs) -> NDArray[np.int32]:
    after = column.copy()
    pages, slots = chosen.page_slots()
    after[pages] = slots
    return after


def shape(some: Runs) -> list[tuple[int, int, int]]:
    return list(
        zip(some.start_page.tolist(), some.length.tolist(), some.slot.tolist(), strict=True)
    )


@given(remaps())
def test_runs_cover_exactly_the_pages_and_are_maximal(remap: Remap) -> None:
    _, starts, wanted = remap
    found = wanted_runs(wanted, starts)
    pages, slots = found.page_slots()
    assert dict(zip(pages.tolist(), slots.tolist(), strict=True)) == wanted
    assert found.pages == len(wanted)
    for start, length, slot in shape(found):
        assert not any(start < at < start + length for at in starts)
        before = wanted.get(start - 1)
        if before is not None and start not in starts:
            assert slot != (before if before == ZERO else before + 1)


@given(mappings())
def test_vma_count_is_the_naive_walk(mapping: Mapping) -> None:
    column, starts = mapping
    assert vma_count(column, int64s(starts)) == naive_vmas(column.tolist(), starts)


@given(remaps(), st.integers(0, 40))
def test_choice_is_exact_and_within_the_budget(remap: Remap, budget: int) -> None:
    column, starts, wanted = remap
    regions = int64s(starts)
    choice = choose(column, wanted_runs(wanted, starts), regions, budget)

    everything = shape(wanted_runs(wanted, starts))
    assert sorted(shape(choice.taken) + shape(choice.deferred)) == everything
    assert choice.deferred_pages + choice.taken.pages == len(wanted)
    assert choice.vmas_before == naive_vmas(column.tolist(), starts)
    assert choice.vmas_after <= max(budget, choice.vmas_before)
    event(f"deferred: {bool(len(choice.deferred))}")

    counts = [choice.vmas_before]
    for taken in range(1, len(everything) + 1):
        in_order = [*shape(choice.taken), *shape(choice.deferred)][:taken]
        after = applied(column, as_runs(in_order))
        counts.append(naive_vmas(after.tolist(), starts))
    on_the_way = counts[: len(choice.taken) + 1]
    assert max(on_the_way) <= max(budget, choice.vmas_before)
    assert choice.vmas_after == on_the_way[-1]
    assert choice.vmas_if_all == counts[-1]
    assert choice.vma_budget_for_all >= choice.vmas_if_all
    if len(choice.deferred):
        assert counts[len(choice.taken) + 1] > max(budget, choice.vmas_after)


def as_runs(rows: list[tuple[int, int, int]]) -> Runs:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Runs(table[:, 0], table[:, 1], table[:, 2].astype(np.int32))


@given(remaps(), st.integers(0, 40))
def test_the_stated_budget_admits_everything(remap: Remap, reserved: int) -> None:
    column, starts, wanted = remap
    some, regions = wanted_runs(wanted, starts), int64s(starts)
    needed = choose(column, some, regions, 0).vma_budget_for_all
    enough = choose(column, some, regions, needed)
    assert enough.deferred_pages == 0
    assert enough.max_map_count_for_all(reserved) == needed + reserved
    assert needed == enough.vma_budget_for_all


@given(remaps(), st.integers(0, 40))
def test_what_is_deferred_does_not_fit_afterwards_either(remap: Remap, budget: int) -> None:
    column, starts, wanted = remap
    some, regions = wanted_runs(wanted, starts), int64s(starts)
    choice = choose(column, some, regions, budget)
    after = applied(column, choice.taken)
    left = choice.deferred.take(np.argsort(choice.deferred.start_page))
    again = choose(after, left, regions, budget)
    assert len(again.taken) == 0
    assert shape(again.deferred) == shape(choice.deferred)
    assert again.vmas_before == choice.vmas_after


@given(remaps())
def test_free_runs_come_first_then_the_longest_then_the_cheapest(remap: Remap) -> None:
    column, starts, wanted = remap
    some = wanted_runs(wanted, starts)
    taken = shape(choose(column, some, int64s(starts), 1_000).taken)
    base = naive_vmas(column.tolist(), starts)
    costs = [naive_vmas(applied(column, as_runs([r])).tolist(), starts) - base for r in taken]
    keys = [
        (cost > 0, -length, cost, start)
        for cost, (start, length, _) in zip(costs, taken, strict=True)
    ]
    assert keys == sorted(keys)


@given(remaps())
def test_choosing_again_after_applying_costs_nothing(remap: Remap) -> None:
    column, starts, wanted = remap
    some, regions = wanted_runs(wanted, starts), int64s(starts)
    after = applied(column, some)
    again = choose(after, some, regions, 0)
    assert again.vmas_before == again.vmas_after == again.vma_budget_for_all
    assert again.deferred_pages == 0
    assert np.array_equal(applied(after, again.taken), after)
