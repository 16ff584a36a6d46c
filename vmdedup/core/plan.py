"""From equal pages to remaps: slots, runs, and the choice that fits the VMA budget.

Owns the layout of the store (which content gets which slot) and the choice of
runs. Promises that runs cover exactly the pages given, never cross a region, and
that a choice never takes a VM above its VMA budget. Refuses to exceed that
budget for any saving: the rest is returned as deferred.

A *run* is pages that follow each other in the guest and, if they are mapped to the
store, in the store too: one mmap, one VMA. VMAs are scarce (vm.max_map_count,
65,530 by default), hence slots in guest order and the longest runs first.

A *slot column* here is the mapping of each page of a VM (`PageColumns.slot`):
OWN, ZERO or a store slot. A broken page keeps its slot, since it stays in that
mapping. VMAs are counted from it as the kernel merges neighbours. Neighbouring own
pages of one region are one VMA. So are zero pages (the mapping of /dev/zero has the
region's own offsets), and store pages while slots follow each other. The kernel may
fail to merge two pieces that were both written before they met; the engine counts
the real VMAs again after each pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.core.sorting import lengths, ranges
from vmdedup.core.unstable_tree import Groups
from vmdedup.errors import StoreError

_SLOT_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of one VM, as columns of equal length.

    `slot` is the store slot of a run's first page, or ZERO for a run of zero
    pages; page start_page + i stands on slot + i.
    """

    start_page: NDArray[np.int64]
    length: NDArray[np.int64]
    slot: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.start_page)

    @property
    def pages(self) -> int:
        """Pages in all runs together."""
        return int(self.length.sum())

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_] | slice) -> Runs:
        """Some of the runs, in the order of `which`."""
        return Runs(self.start_page[which], self.length[which], self.slot[which])

    def page(self) -> NDArray[np.int64]:
        """Every page of the runs."""
        return ranges(self.start_page, self.length)

    def page_slots(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Every page of the runs and its slot."""
        page = self.page()
        slot = np.repeat(self.slot, self.length)
        offset = (page - np.repeat(self.start_page, self.length)).astype(np.int32)
        slot += np.where(slot < FIRST_SLOT, np.int32(0), offset)
        return page, slot


NO_RUNS: Final = Runs(
    np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
)


def joined(*parts: Runs) -> Runs:
    """The runs of all parts, in this order."""
    parts = (NO_RUNS, *parts)
    return Runs(
        np.concatenate([part.start_page for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.slot for part in parts]),
    )


def in_page_order(some: Runs) -> Runs:
    """The same runs, sorted by their first page."""
    return some.take(np.argsort(some.start_page, kind="stable"))


@dataclass(frozen=True, slots=True)
class Choice:
    """The runs that one VM's budget admits, and the rest. `taken` is in the order of
    choosing: if executed in that order, the VMA count never exceeds the budget.
    """

    taken: Runs
    deferred: Runs
    vmas_before: int
    vmas_after: int
    """VMAs once all of `taken` are remapped; at most max(budget, vmas_before)."""

    vmas_if_all: int
    """VMAs if the deferred runs were remapped too."""

    vma_budget_for_all: int
    """Smallest VMA budget that defers nothing: the highest count on the way to all."""

    @property
    def deferred_pages(self) -> int:
        """Pages that have a partner and wait for VMAs."""
        return self.deferred.pages

    def max_map_count_for_all(self, reserved_vmas: int) -> int:
        """The vm.max_map_count that would admit everything.

        `reserved_vmas`: VMAs the process needs besides its guest RAM, headroom included.
        """
        return self.vma_budget_for_all + reserved_vmas


def assign_slots(groups: Groups, next_slot: int) -> NDArray[np.int32]:
    """A new slot for each group: consecutive from `next_slot`, in guest order.

    Neighbouring pages of the guest that meets them first get neighbouring
    slots; guests laid out alike then have the same runs. Slots are never reused,
    so a store ends at 2^31 of them (8 TiB of distinct contents over its life):
    StoreError then.
    """
    if next_slot + len(groups) > _SLOT_LIMIT:
        raise StoreError(
            f"the stable store has used up its {_SLOT_LIMIT} slots; unmerge and start again"
        )
    return np.arange(next_slot, next_slot + len(groups), dtype=np.int32)


def runs(
    page: NDArray[np.int64], slot: NDArray[np.int32], region_starts: NDArray[np.int64]
) -> Runs:
    """The maximal runs of pages that are to be mapped to these slots.

    `page` is strictly ascending, `slot` as long (ZERO or a store slot, never
    OWN); `region_starts` are the first page indices of the regions, ascending.
    """
    if not len(page):
        return Runs(page, np.empty(0, dtype=np.int64), slot)
    begins = np.ones(len(page), dtype=np.bool_)
    begins[1:] = (page[1:] != page[:-1] + 1) | ~_continues(slot[:-1], slot[1:])
    # A region start that is not among the pages marks the next page, which
    # begins a run anyway: the pages do not follow each other there.
    at = np.searchsorted(page, region_starts)
    begins[at[at < len(page)]] = True
    begin = np.flatnonzero(begins)
    return Runs(page[begin], lengths(begin, len(page)), slot[begin])


def vma_count(slot_column: NDArray[np.int32], region_starts: NDArray[np.int64]) -> int:
    """VMAs that a VM's mergeable RAM takes when mapped as `slot_column` says."""
    begins = np.ones(len(slot_column), dtype=np.bool_)
    np.logical_not(_continues(slot_column[:-1], slot_column[1:]), out=begins[1:])
    begins[region_starts] = True
    return int(np.count_nonzero(begins))


def choose(
    slot_column: NDArray[np.int32],
    wanted: Runs,
    region_starts: NDArray[np.int64],
    vma_budget: int,
    vmas: int | None = None,
) -> Choice:
    """Take as many of the `wanted` runs as the budget admits, longest first.

    `slot_column` is the present mapping, merged pages included; `wanted` are in
    page order, disjoint, and cross no region. `vmas` is its `vma_count`, if known:
    then this takes time in proportion to the wanted pages, unless some are
    deferred. Runs that cost no VMA by themselves (they fill a gap between merged
    pages, or a whole region) come before all others; among runs of one length the
    cheaper come first. The first run that does not fit ends a round. The taken
    runs make some of the rest cheaper (a page between two taken runs costs nothing
    more). So rounds are repeated until one takes nothing: choosing again from the
    result takes nothing either. Two or three rounds are usual.
    """
    before = vma_count(slot_column, region_starts) if vmas is None else vmas
    edges = np.union1d(region_starts, (0, len(slot_column)))
    first = last = _round(slot_column, wanted, edges, vma_budget, before)
    taken = first.taken
    while len(last.taken) and len(last.deferred):
        slot_column = slot_column.copy()
        pages, slots = last.taken.page_slots()
        slot_column[pages] = slots
        rest = in_page_order(last.deferred)
        last = _round(slot_column, rest, edges, vma_budget, last.vmas_after)
        taken = joined(taken, last.taken)
    return Choice(
        taken=taken,
        deferred=last.deferred,
        vmas_before=before,
        vmas_after=last.vmas_after,
        vmas_if_all=int(first.vmas[-1]),
        vma_budget_for_all=int(first.vmas.max()),
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """The wanted runs in the order of choosing, cut where the budget ends."""

    taken: Runs
    deferred: Runs
    vmas: NDArray[np.int64]
    """VMA count after 0, 1, ... all of the wanted runs, in that order."""

    @property
    def vmas_after(self) -> int:
        """VMA count after the taken runs."""
        return int(self.vmas[len(self.taken)])


def _round(
    slot_column: NDArray[np.int32],
    wanted: Runs,
    edges: NDArray[np.int64],
    vma_budget: int,
    before: int,
) -> _Round:
    """Take the longest prefix that fits; `before` is the count of VMAs now.

    Every VMA begins at a *break*, a page whose mapping does not continue its
    predecessor's. Remapping a run changes breaks only at its two ends and inside
    it, so the exact count after every prefix is one running sum. If two wanted
    runs touch, the run taken later carries the rest of that boundary's cost.
    (The count need not grow from prefix to prefix: a run may close a gap. Hence
    a running sum, and no binary search.)
    """
    alone, together = _costs(slot_column, wanted, edges)

    order = np.lexsort((wanted.start_page, alone, -wanted.length, alone > 0))
    position = np.empty(len(wanted), dtype=np.int64)
    position[order] = np.arange(len(wanted))
    later_is_right = position[1:] > position[:-1]
    cost = alone.copy()
    cost[1:] += np.where(later_is_right, together, 0)
    cost[:-1] += np.where(later_is_right, 0, together)

    vmas = np.concatenate(([before], before + np.cumsum(cost[order])))
    over = np.flatnonzero(vmas > max(vma_budget, before))
    admitted = int(over[0]) - 1 if len(over) else len(wanted)
    return _Round(wanted.take(order[:admitted]), wanted.take(order[admitted:]), vmas)


def _costs(
    slot_column: NDArray[np.int32], wanted: Runs, edges: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The VMAs that each run costs alone, and a correction per neighbouring pair.

    The correction, one shorter than the runs, is the cost of run i and run i + 1
    together beyond the sum of both alone: `0` unless they touch.
    """
    if not len(wanted):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    start, end = wanted.start_page, wanted.start_page + wanted.length
    first_slot = wanted.slot
    last_slot = np.where(first_slot < FIRST_SLOT, first_slot, first_slot + wanted.length - 1)
    # The ends of the page space have no neighbour: each is an edge, which
    # overrides the value at the clipped index.
    before_start, at_start = slot_column[np.maximum(start - 1, 0)], slot_column[start]
    before_end = slot_column[end - 1]
    at_end = slot_column[np.minimum(end, len(slot_column) - 1)]
    start_is_edge, end_is_edge = _is_edge(edges, start), _is_edge(edges, end)
    left = ~_continues(before_start, first_slot) | start_is_edge
    left_now = ~_continues(before_start, at_start) | start_is_edge
    right = ~_continues(last_slot, at_end) | end_is_edge
    right_now = ~_continues(before_end, at_end) | end_is_edge
    inside = _breaks_inside(slot_column, wanted)
    alone = left.astype(np.int64) - left_now + right - right_now - inside

    touch = (end[:-1] == start[1:]) & ~end_is_edge[:-1]
    both = (~_continues(last_slot[:-1], first_slot[1:])).astype(np.int64)
    together = np.where(touch, both + right_now[:-1] - right[:-1] - left[1:], 0)
    return alone, together


def _breaks_inside(slot_column: NDArray[np.int32], wanted: Runs) -> NDArray[np.int64]:
    """The number of VMAs that begin inside each run, after its first page."""
    slot = slot_column[wanted.page()]
    breaks = np.zeros(len(slot), dtype=np.int32)
    np.cumsum(~_continues(slot[:-1], slot[1:]), dtype=np.int32, out=breaks[1:])
    end = np.cumsum(wanted.length)
    return np.asarray(breaks[end - 1] - breaks[end - wanted.length], dtype=np.int64)


def _is_edge(edges: NDArray[np.int64], page: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of these pages, none beyond the last edge, is an edge."""
    return np.asarray(edges[np.searchsorted(edges, page)] == page)


def _continues(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a page mapped to `after` extends the VMA of one mapped to `before`."""
    alike: NDArray[np.bool_] = np.where(before < FIRST_SLOT, after == before, after == before + 1)
    return alike
