"""Nomination: from the rmaps of one trust domain to the pages each VM should have remapped.

Owns the step that joins the parts. Candidates are looked up in the stable tree, and
the rest is grouped in the unstable tree. Groups get slots, and each VM's runs are
cut to its VMA budget. Promises at least two sites for each new store page,
consecutive new slots, and no VM above its budget. Refuses nothing: everything here
is a nomination, the gate decides.

Each VM spends its budget alone, so it may take a content that no other VM has
VMAs left for. Such contents are left out and all VMs choose again, which spends
their VMAs on contents that are shared. (Dropping such pages from the chosen runs
would cut these in two, and cost more VMAs than the budget has.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.huge_pages import HugePages
from vmdedup.core.plan import (
    Choice,
    Runs,
    assign_slots,
    choose,
    in_page_order,
    joined,
    runs,
)
from vmdedup.core.pool import split, with_copies
from vmdedup.core.rmap import ZERO, PageColumns
from vmdedup.core.scan import candidates
from vmdedup.core.sharers import Sharers
from vmdedup.core.sorting import among, rows_of, united
from vmdedup.core.stable_tree import NOT_FOUND, StableTree
from vmdedup.core.unstable_tree import Groups, group, only, without

_MOST_ROUNDS = 16
"""Most rounds of choosing; four Debian guests need 2 to 9. Beyond, no new content is shared."""
_NO_PAGES = np.empty(0, dtype=np.int64)

Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class VmView:
    """One VM as nomination sees it: its rmap, layout and VMA budget for guest RAM."""

    columns: PageColumns
    region_starts: NDArray[np.int64]
    vma_budget: int
    vmas: int | None = None
    """VMAs of its guest RAM now, as `vma_count` counts them; `None`: not known yet."""
    among: NDArray[np.int64] | None = None
    """The only pages to consider, ascending; `None`: all. The pages that `core/news.py`
    names give the same result as all."""
    huge: HugePages | None = None
    """Its huge pages, split only where that pays; `None`: all are split for any page."""


@dataclass(frozen=True, slots=True)
class NewPages:
    """Contents to publish: the i-th gets slot `first_slot` + i.

    `vm`, `page`: the site it is copied from; `digest`: the digest it must then have.
    """

    first_slot: int
    vm: NDArray[np.int32]
    page: NDArray[np.int64]
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.page)


@dataclass(frozen=True, slots=True)
class VmNomination:
    """The runs that one VM should have remapped, and the pages that must wait."""

    taken: Runs
    choice: Choice
    deferred: NDArray[np.int64]
    """Page indices that have a partner but no VMA."""
    unshared: NDArray[np.int64]
    """Page indices of candidates that are like no other page considered."""
    crowded: NDArray[np.int64]
    """The part of `unshared` whose store page is full (max_page_sharing)."""
    kept: NDArray[np.int64]
    """Page indices that have a partner, but a huge page is kept: theirs, or each partner's."""
    kept_in_huge: int
    """Number of `kept` pages that are in huge pages themselves."""


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
    sharers: Sharers | None = None,
) -> Nomination:
    """Plan one trust domain; row v of the result is VM v.

    `share` False leaves all but zero pages alone. `most_new_pages` bounds the new
    store pages (max_kernel_pages), `most_sharing` the sites of one (max_page_sharing).
    The latter needs `sharers`, the number of sites of each slot now.
    """
    found = _match(
        vms,
        [_zero_pages(view, zero_digest) if use_zero_pages else _NO_PAGES for view in vms],
        _sites(vms if share else (), zero_digest),
        tree,
        most_new_pages=most_new_pages,
        most_sharing=most_sharing,
        sharers=sharers,
    )
    matches = found
    first = choices = _choose(vms, matches, next_slot)
    rounds = 1
    while True:
        shared = _sites_taken(choices, next_slot, len(matches.groups)) >= 2
        spared = [
            _spared(view.huge, matches.savable(number), choice.taken.page())
            if view.huge is not None
            else _NO_PAGES
            for number, (view, choice) in enumerate(zip(vms, choices, strict=True))
        ]
        if shared.all() and not any(map(len, spared)):
            break
        if rounds >= _MOST_ROUNDS:
            shared[:] = False
        matches = replace(matches, groups=only(matches.groups, shared)).without(spared)
        choices = _choose(vms, matches, next_slot)
        rounds += 1
    site = matches.groups.first
    return Nomination(
        new=NewPages(
            next_slot, matches.groups.vm[site], matches.groups.page[site], matches.groups.digest
        ),
        vms=tuple(
            _nomination(view, wanted, choice, found, number)
            for number, (view, wanted, choice) in enumerate(zip(vms, first, choices, strict=True))
        ),
    )


@dataclass(frozen=True, slots=True)
class _Sites:
    """Candidates of all VMs, in guest order, as columns of equal length."""

    vm: NDArray[np.int32]
    page: NDArray[np.int64]
    digest: NDArray[np.uint64]

    def take(self, which: NDArray[np.bool_]) -> _Sites:
        """Some of the sites."""
        return _Sites(self.vm[which], self.page[which], self.digest[which])

    def of_vm(self, vm: int) -> slice:
        """The rows of one VM's sites."""
        return rows_of(self.vm, vm)


@dataclass(frozen=True, slots=True)
class _Matches:
    """The match of each candidate: the zero page, a page of the stable tree, a group, or nothing.

    Lists have one column of ascending pages for each VM.
    """

    zero: list[Pages]
    known: _Sites
    known_slot: NDArray[np.int32]
    groups: Groups
    unshared: list[Pages]
    crowded: list[Pages]
    kept: list[Pages]

    def savable(self, vm: int) -> Pages:
        """All pages of one VM that have a match, in no order."""
        known, new = self.known.of_vm(vm), self.groups.of_vm(vm)
        return np.concatenate([self.zero[vm], self.known.page[known], self.groups.page[new]])

    def without(self, pages: Sequence[Pages]) -> _Matches:
        """The matches without these pages of each VM, and without groups of a single site."""
        if not any(map(len, pages)):
            return self
        zero = [mine[~among(mine, some)] for mine, some in zip(self.zero, pages, strict=True)]
        known = np.zeros(len(self.known_slot), dtype=np.bool_)
        new = np.zeros(len(self.groups.page), dtype=np.bool_)
        for vm, some in enumerate(pages):
            for mask, rows, page in (
                (known, self.known.of_vm(vm), self.known.page),
                (new, self.groups.of_vm(vm), self.groups.page),
            ):
                mask[rows] = among(page[rows], some)
        return replace(
            self,
            zero=zero,
            known=self.known.take(~known),
            known_slot=self.known_slot[~known],
            groups=without(self.groups, new),
        )

    def runs(
        self, vm: int, slot_of_group: NDArray[np.int32], region_starts: NDArray[np.int64]
    ) -> Runs:
        """The runs that one VM should have remapped."""
        zero = self.zero[vm]
        onto_zero = runs(zero, np.full(len(zero), ZERO, dtype=np.int32), region_starts)
        known, new = self.known.of_vm(vm), self.groups.of_vm(vm)
        page = np.concatenate([self.known.page[known], self.groups.page[new]])
        slot = np.concatenate([self.known_slot[known], slot_of_group[self.groups.group[new]]])
        order = np.argsort(page, kind="stable")
        return in_page_order(joined(onto_zero, runs(page[order], slot[order], region_starts)))


def _match(
    vms: Sequence[VmView],
    zero: list[Pages],
    sites: _Sites,
    tree: StableTree,
    *,
    most_new_pages: int | None,
    most_sharing: int | None,
    sharers: Sharers | None,
) -> _Matches:
    """Look the candidates up in the stable tree, group the rest, and keep huge pages."""
    slot = tree.search(sites.digest, sites.page)
    surplus = np.zeros(len(slot), dtype=np.bool_)
    if most_sharing is not None and sharers is not None:
        surplus[sharers.surplus(slot, most_sharing)] = True
        slot[surplus] = NOT_FOUND
    is_known = slot != NOT_FOUND
    known, known_slot = sites.take(is_known), slot[is_known]
    if len(known_slot):
        sites, surplus = sites.take(~is_known), surplus[~is_known]
    nothing = [_NO_PAGES] * len(vms)
    groups = group(sites.digest, sites.vm, sites.page)
    matches = _Matches(zero, known, known_slot, groups, nothing, nothing, nothing)
    matches = _keep_huge(vms, matches)
    groups, lonely = matches.groups, nothing
    if most_new_pages is None:
        groups = with_copies(groups, most_sharing)
    elif most_sharing is not None:
        groups = split(groups, most_sharing)
    if most_sharing is not None:
        several = groups.sites > 1
        single = only(groups, ~several)
        lonely = [single.page[single.of_vm(number)] for number in range(len(vms))]
        groups = only(groups, several)
    if most_new_pages is not None:
        groups = _largest(groups, most_new_pages)
    unshared, crowded = [], []
    for number in range(len(vms)):
        mine = sites.of_vm(number)
        page = sites.page[mine]
        alone = ~among(page, groups.page[groups.of_vm(number)])
        alone &= ~among(page, matches.kept[number])
        full = surplus[mine] | among(page, lonely[number])
        unshared.append(page[alone])
        crowded.append(page[alone & full])
    # A group that was left out may have made a huge page worth splitting.
    return _keep_huge(vms, replace(matches, groups=groups, unshared=unshared, crowded=crowded))


def _keep_huge(vms: Sequence[VmView], matches: _Matches) -> _Matches:
    """The matches without those that would split huge pages for too few pages; these are `kept`.

    Not quite, if it takes too many rounds: then the choice of runs leaves out the rest.
    """
    left = matches
    for _ in range(_MOST_ROUNDS):
        spared = [
            _spared(view.huge, left.savable(number)) if view.huge is not None else _NO_PAGES
            for number, view in enumerate(vms)
        ]
        if not any(map(len, spared)):
            break
        left = left.without(spared)
    if left is matches:
        return matches
    kept = []
    for number, before in enumerate(matches.kept):
        page = np.sort(matches.savable(number))
        dropped = page[~among(page, left.savable(number))]
        kept.append(np.sort(np.concatenate([before, dropped])))
    return replace(left, kept=kept)


def _spared(huge: HugePages, savable: Pages, merged: Pages | None = None) -> Pages:
    """The savable pages in huge pages that would be split for too few pages; ascending.

    `merged`: the only pages that would be merged, `None` for all savable ones.
    """
    is_thin = huge.thin(savable if merged is None else merged)
    return np.sort(savable[is_thin[huge.blocks.of(savable)]]) if is_thin.any() else _NO_PAGES


def _zero_pages(view: VmView, zero_digest: int) -> Pages:
    return candidates(view.columns, zero_digest, view.among).zero


def _sites(vms: Sequence[VmView], zero_digest: int) -> _Sites:
    """Every candidate but zero pages."""
    pages = [candidates(view.columns, zero_digest, view.among).nonzero for view in vms]
    sites = np.array([len(mine) for mine in pages], dtype=np.int64)
    digest = np.empty(sites.sum(), dtype=np.uint64)
    for view, mine, end in zip(vms, pages, np.cumsum(sites), strict=True):
        digest[end - len(mine) : end] = view.columns.digest[mine]
    return _Sites(
        np.repeat(np.arange(len(vms), dtype=np.int32), sites),
        np.concatenate([np.empty(0, dtype=np.int64), *pages]),
        digest,
    )


def _largest(groups: Groups, most: int) -> Groups:
    """The `most` groups with the most sites; all when there are no more."""
    keep = np.zeros(len(groups), dtype=np.bool_)
    keep[np.argsort(-groups.sites, kind="stable")[:most]] = True
    return only(groups, keep)


def _choose(vms: Sequence[VmView], matches: _Matches, next_slot: int) -> list[Choice]:
    """The runs of these matches that each VM's budget admits."""
    slot_of_group = assign_slots(matches.groups, next_slot)
    choices = []
    for number, view in enumerate(vms):
        wanted = matches.runs(number, slot_of_group, view.region_starts)
        choices.append(
            choose(view.columns.slot, wanted, view.region_starts, view.vma_budget, view.vmas)
        )
    return choices


def _nomination(
    view: VmView, first: Choice, last: Choice, matches: _Matches, number: int
) -> VmNomination:
    """The last choice; deferred pages and VMA counts for all come from the first."""
    taken = in_page_order(last.taken)
    deferred = np.sort(first.deferred.page())
    if last is not first:
        wanted = united((first.taken.page(), deferred))
        deferred = wanted[~among(wanted, taken.page())]
    choice = replace(
        last, vmas_if_all=first.vmas_if_all, vma_budget_for_all=first.vma_budget_for_all
    )
    kept = matches.kept[number]
    in_huge = 0 if view.huge is None else view.huge.count_inside(kept)
    unshared, crowded = matches.unshared[number], matches.crowded[number]
    return VmNomination(taken, choice, deferred, unshared, crowded, kept, in_huge)


def _sites_taken(choices: Sequence[Choice], next_slot: int, slots: int) -> NDArray[np.int64]:
    """The number of sites of each new slot that the VMs' budgets have admitted."""
    edges = np.zeros(slots + 1, dtype=np.int64)
    for choice in choices:
        new = choice.taken.take(choice.taken.slot >= next_slot)
        first = new.slot - next_slot
        np.add.at(edges, first, 1)
        np.add.at(edges, first + new.length, -1)
    return np.cumsum(edges[:-1])
