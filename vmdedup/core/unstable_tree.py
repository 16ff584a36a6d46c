"""The unstable tree: equal candidates of one pass, found by one sort.

Owns the grouping of candidates that the stable tree does not know. Promises
every content with at least two sites, once, its sites and its first site.
Refuses single sites (they are pages_unshared) and trusts the caller on the trust
domain: it must be given candidates of ONE domain only.

It is "unstable" because its pages are not protected and may change under it.
KSM throws its tree away after each full scan for that reason, and so do we: it
is built from the digest columns at the end of a pass and lives for one call.
What rotted meanwhile is found by the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.sorting import stable_order


@dataclass(frozen=True, slots=True)
class Groups:
    """Contents that occur at two or more sites.

    Sites stand in guest order, that is by (vm, page), so that one VM's sites
    are a slice and the plan needs no second sort. Groups are numbered in guest
    order of their first sites: reading the first sites in group order reads
    each guest's memory front to back.
    """

    vm: NDArray[np.int32]
    """Of each site."""

    page: NDArray[np.int64]
    """Page index of each site in its VM."""

    group: NDArray[np.int32]
    """Group number of each site."""

    first: NDArray[np.int64]
    """Of each group: which site is its first; ascending. The content is copied
    to the store from there."""

    digest: NDArray[np.uint64]
    """Of each group."""

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.first)

    @property
    def sites(self) -> NDArray[np.int64]:
        """Sites of each group, at least 2."""
        return np.bincount(self.group, minlength=len(self)).astype(np.int64, copy=False)

    @property
    def savable_pages(self) -> int:
        """Pages saved if every group is merged whole: sites less one per group."""
        return len(self.group) - len(self)

    def of_vm(self, vm: int) -> slice:
        """The sites of one VM."""
        begin, end = np.searchsorted(self.vm, (vm, vm + 1))
        return slice(int(begin), int(end))


def split(groups: Groups, most_sites: int) -> Groups:
    """The same with no group above `most_sites`: the surplus forms groups of its own.

    Sites are dealt in guest order. A surplus of one site stays as a group of one,
    which is not worth a store page; the plan drops such groups.
    """
    if not len(groups) or int(groups.sites.max()) <= most_sites:
        return groups
    order = np.argsort(groups.group, kind="stable")
    in_order = groups.group[order]
    begin = np.searchsorted(in_order, in_order)
    part = (np.arange(len(order)) - begin) // most_sites
    part_of = np.empty(len(order), dtype=np.int64)
    part_of[order] = part
    key = groups.group.astype(np.int64) * (int(part.max()) + 1) + part_of
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    by_first = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int32)
    rank[by_first] = np.arange(len(first), dtype=np.int32)
    first = first[by_first].astype(np.int64)
    digest = groups.digest[groups.group[first]]
    return Groups(groups.vm, groups.page, rank[number], first, digest)


def group(digest: NDArray[np.uint64], vm: NDArray[np.int32], page: NDArray[np.int64]) -> Groups:
    """Group candidate sites by digest; each site given once, in any order."""
    if not _in_guest_order(vm, page):
        guest_order = np.lexsort((page, vm))
        digest, vm, page = digest[guest_order], vm[guest_order], page[guest_order]
    order = stable_order(digest)
    ordered = digest[order]
    differs = np.ones(len(ordered) + 1, dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=differs[1:-1])
    bounds = np.flatnonzero(differs)
    begin, sites = bounds[:-1], np.diff(bounds)
    repeated = sites >= 2
    begin, sites = begin[repeated], sites[repeated]
    # The order is stable, so a group's first element is its first site.
    by_first = np.argsort(order[begin])
    rank = np.empty(len(begin), dtype=np.int32)
    rank[by_first] = np.arange(len(begin), dtype=np.int32)
    group_of = np.full(len(digest), -1, dtype=np.int32)
    in_group = np.repeat(repeated, np.diff(bounds))
    group_of[order[in_group]] = np.repeat(rank, sites)
    member = np.flatnonzero(group_of >= 0)
    first = np.searchsorted(member, order[begin][by_first])
    return Groups(
        vm=vm[member],
        page=page[member],
        group=group_of[member],
        first=first,
        digest=ordered[begin][by_first],
    )


def _in_guest_order(vm: NDArray[np.int32], page: NDArray[np.int64]) -> bool:
    before, after = slice(None, -1), slice(1, None)
    follows = (vm[before] < vm[after]) | ((vm[before] == vm[after]) & (page[before] < page[after]))
    return bool(follows.all())
