"""From the rmaps of one trust domain to what each VM should have remapped.

Owns the step that joins the parts: candidates are looked up in the stable tree,
the rest is grouped in the unstable tree, groups get slots, each VM's runs are
cut to its VMA budget. Promises that no new store page is asked for that fewer
than two sites would share, and that new slots are consecutive. Refuses
nothing: everything here is a nomination, the gate decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.plan import Choice, Runs, assign_slots, choose, runs
from vmdedup.core.rmap import ZERO, PageColumns
from vmdedup.core.scan import candidates
from vmdedup.core.stable_tree import NOT_FOUND, StableTree
from vmdedup.core.unstable_tree import Groups, group, split


@dataclass(frozen=True, slots=True)
class VmView:
    """What nomination needs of one VM: its rmap, layout and VMA budget for guest RAM."""

    columns: PageColumns
    region_starts: NDArray[np.int64]
    vma_budget: int


@dataclass(frozen=True, slots=True)
class NewPages:
    """Contents to publish: the i-th gets slot `first_slot` + i.

    `vm`, `page`: the site it is copied from; `digest`: what it must have then.
    """

    first_slot: int
    vm: NDArray[np.int32]
    page: NDArray[np.int64]
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.page)


@dataclass(frozen=True, slots=True)
class VmNomination:
    """What one VM should have remapped, and what must wait."""

    taken: Runs
    choice: Choice
    deferred: NDArray[np.int64]
    """Page indices that have a partner but no VMA."""
    unshared: NDArray[np.int64]
    """Page indices that held still and are like no other page of the domain."""


@dataclass(frozen=True, slots=True)
class Nomination:
    """The plan of one trust domain for one pass."""

    new: NewPages
    vms: tuple[VmNomination, ...]


def nominate(
    vms: Sequence[VmView],
    tree: StableTree,
    *,
    zero_digest: int,
    use_zero_pages: bool,
    share: bool,
    next_slot: int,
    most_new_pages: int | None = None,
    most_sharing: int | None = None,
    sites_of_slot: NDArray[np.int64] | None = None,
) -> Nomination:
    """Plan one trust domain; row v of the result is VM v.

    `share` False leaves all but zero pages alone. `most_new_pages` bounds the new
    store pages (max_kernel_pages), `most_sharing` the sites of one (max_page_sharing);
    that needs `sites_of_slot`, the sites each slot has now, shape (next_slot,).
    """
    groups, choices, unshared = _choices(
        vms,
        tree,
        zero_digest=zero_digest,
        use_zero_pages=use_zero_pages,
        share=share,
        next_slot=next_slot,
        most_new_pages=most_new_pages,
        most_sharing=most_sharing,
        sites_of_slot=sites_of_slot,
    )
    return _without_lonely(vms, groups, choices, unshared, next_slot)


def _choices(
    vms: Sequence[VmView],
    tree: StableTree,
    *,
    zero_digest: int,
    use_zero_pages: bool,
    share: bool,
    next_slot: int,
    most_new_pages: int | None,
    most_sharing: int | None,
    sites_of_slot: NDArray[np.int64] | None,
) -> tuple[Groups, list[Choice], list[NDArray[np.int64]]]:
    """The new groups, and of each VM what its budget admits and what is like nothing else.

    A function of its own, as its columns are what a pass takes most memory for.
    """
    vm, page, digest = _nonzero_sites(vms if share else (), zero_digest)
    slot = tree.search(digest)
    if most_sharing is not None and sites_of_slot is not None:
        slot[_surplus(slot, sites_of_slot, most_sharing)] = NOT_FOUND
    rest = slot == NOT_FOUND
    groups = (
        group(digest[rest], vm[rest], page[rest]) if not rest.all() else group(digest, vm, page)
    )
    if most_sharing is not None:
        groups = split(groups, most_sharing)
    if most_new_pages is not None:
        groups = _largest(groups, most_new_pages)
    slot_of_group = assign_slots(groups, next_slot)
    choices = []
    unshared = []
    for number, view in enumerate(vms):
        mine = slice(*np.searchsorted(vm, (number, number + 1)).tolist())
        known = np.flatnonzero(~rest[mine]) + mine.start
        sites = groups.of_vm(number)
        zero = candidates(view.columns, zero_digest).zero
        zero = zero if use_zero_pages else zero[:0]
        pages = np.concatenate([page[known], groups.page[sites], zero])
        slots = np.concatenate(
            [
                slot[known],
                slot_of_group[groups.group[sites]],
                np.full(len(zero), ZERO, dtype=np.int32),
            ]
        ).astype(np.int32)
        order = np.argsort(pages)
        wanted = runs(pages[order], slots[order], view.region_starts)
        choices.append(choose(view.columns.slot, wanted, view.region_starts, view.vma_budget))
        unshared.append(np.setdiff1d(page[mine], pages, assume_unique=True))
    return groups, choices, unshared


def _nonzero_sites(
    vms: Sequence[VmView], zero_digest: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint64]]:
    """VM, page and digest of every candidate but zero pages, in guest order."""
    pages = [candidates(view.columns, zero_digest).nonzero for view in vms]
    digests = [view.columns.digest[mine] for view, mine in zip(vms, pages, strict=True)]
    return (
        np.repeat(np.arange(len(vms), dtype=np.int32), [len(mine) for mine in pages]),
        np.concatenate([np.empty(0, dtype=np.int64), *pages]),
        np.concatenate([np.empty(0, dtype=np.uint64), *digests]),
    )


def _surplus(
    slot: NDArray[np.int32], sites_of_slot: NDArray[np.int64], most_sharing: int
) -> NDArray[np.int64]:
    """Rows of `slot` that would take their slot above `most_sharing` sites."""
    found = np.flatnonzero(slot != NOT_FOUND)
    order = found[np.argsort(slot[found], kind="stable")]
    wanted = slot[order]
    place = np.arange(len(order)) - np.searchsorted(wanted, wanted)
    return order[place + sites_of_slot[wanted] >= most_sharing]


def _largest(groups: Groups, most: int) -> Groups:
    """The `most` groups with the most sites; all when there are no more."""
    if len(groups) <= most:
        return groups
    keep = np.zeros(len(groups), dtype=np.bool_)
    keep[np.argsort(-groups.sites, kind="stable")[:most]] = True
    number = (np.cumsum(keep) - 1).astype(np.int32)
    sites = np.flatnonzero(keep[groups.group])
    place = np.full(len(groups.group), -1, dtype=np.int64)
    place[sites] = np.arange(len(sites))
    return Groups(
        groups.vm[sites],
        groups.page[sites],
        number[groups.group[sites]],
        place[groups.first[keep]],
        groups.digest[keep],
    )


def _without_lonely(
    vms: Sequence[VmView],
    groups: Groups,
    choices: Sequence[Choice],
    unshared: Sequence[NDArray[np.int64]],
    next_slot: int,
) -> Nomination:
    """Drop new slots that the budgets left with fewer than two sites; close the gaps."""
    taken = [choice.taken.page_slots() for choice in choices]
    every_slot = np.concatenate([np.empty(0, dtype=np.int32), *(slots for _, slots in taken)])
    new = every_slot[every_slot >= next_slot] - next_slot
    keep = np.bincount(new, minlength=len(groups)) >= 2
    renumbered = (np.cumsum(keep) - 1 + next_slot).astype(np.int32)
    nominations = []
    for view, choice, (pages, slots), alone in zip(vms, choices, taken, unshared, strict=True):
        is_new = slots >= next_slot
        kept = ~is_new
        kept[is_new] = keep[slots[is_new] - next_slot]
        slots[is_new & kept] = renumbered[slots[is_new & kept] - next_slot]
        order = np.argsort(pages[kept])
        nominations.append(
            VmNomination(
                taken=runs(pages[kept][order], slots[kept][order], view.region_starts),
                choice=choice,
                deferred=np.sort(np.concatenate([choice.deferred.page_slots()[0], pages[~kept]])),
                unshared=alone,
            )
        )
    first = groups.first[keep]
    return Nomination(
        new=NewPages(next_slot, groups.vm[first], groups.page[first], groups.digest[keep]),
        vms=tuple(nominations),
    )
