"""The unstable tree: equal candidates of one pass, found by one sort.

Owns the grouping of candidates that the stable tree does not know. Promises
every content with at least two sites, once, its sites and its first site.
Refuses single sites (they are pages_unshared) and trusts the caller on the trust
domain: it must be given candidates of ONE domain only.

It is "unstable" because its pages are not protected and may change under it.
KSM throws its tree away after each full scan for that reason, and so do we: it
is built from the digest columns at the end of a pass and lives for one call.
The gate finds pages that changed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.sorting import rows_of, stable_sort

_PIECE_SITES = 1 << 17
"""Sites sorted at once: about a megabyte of digests."""
_SPLIT_SITES = 1 << 20
"""Sites that are split into such pieces at once."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Contents that occur at two or more sites.

    Sites are in guest order, that is by (vm, page), so that one VM's sites are
    a slice and the plan needs no second sort. Groups are numbered in guest order
    of their first sites (except for copies, see `pool`): reading the first sites
    in group order reads each guest's memory front to back.
    """

    vm: NDArray[np.int32]
    """VM of each site."""

    page: NDArray[np.int64]
    """Page index of each site in its VM."""

    group: NDArray[np.int32]
    """Group number of each site."""

    first: NDArray[np.int64]
    """Row of each group's first site. The content is copied to the store from there."""

    digest: NDArray[np.uint64]
    """Digest of each group."""

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.first)

    @property
    def sites(self) -> NDArray[np.int64]:
        """Sites of each group, at least 2."""
        return np.bincount(self.group, minlength=len(self)).astype(np.int64, copy=False)

    def of_vm(self, vm: int) -> slice:
        """The sites of one VM."""
        return rows_of(self.vm, vm)


def only(groups: Groups, keep: NDArray[np.bool_]) -> Groups:
    """The groups of this mask, renumbered."""
    if keep.all():
        return groups
    number = (np.cumsum(keep) - 1).astype(np.int32)
    kept = np.flatnonzero(keep[groups.group])
    return Groups(
        vm=groups.vm[kept],
        page=groups.page[kept],
        group=number[groups.group[kept]],
        first=np.searchsorted(kept, groups.first[keep]),
        digest=groups.digest[keep],
    )


def without(groups: Groups, dropped: NDArray[np.bool_]) -> Groups:
    """The groups without the sites of this mask, those that keep two, in the same order."""
    if not dropped.any():
        return groups
    sites = np.bincount(groups.group[~dropped], minlength=len(groups))
    kept = np.flatnonzero(~dropped & (sites > 1)[groups.group])
    number, first, group = np.unique(groups.group[kept], return_index=True, return_inverse=True)
    return Groups(
        vm=groups.vm[kept],
        page=groups.page[kept],
        group=group.astype(np.int32),
        first=first.astype(np.int64),
        digest=groups.digest[number],
    )


def group(digest: NDArray[np.uint64], vm: NDArray[np.int32], page: NDArray[np.int64]) -> Groups:
    """Group candidate sites by digest; each site given once, in any order."""
    if not _in_guest_order(vm, page):
        guest_order = np.lexsort((page, vm))
        digest, vm, page = digest[guest_order], vm[guest_order], page[guest_order]
    group_of, first = _grouped(digest)
    member = np.flatnonzero(group_of >= 0)
    by_first = np.argsort(first)
    first = first[by_first]
    rank = np.empty(len(first), dtype=np.int32)
    rank[by_first] = np.arange(len(first), dtype=np.int32)
    return Groups(
        vm=vm[member],
        page=page[member],
        group=rank[group_of[member]],
        first=np.searchsorted(member, first),
        digest=digest[first],
    )


def _grouped(digest: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """A group number for each row, -1 for none, and the first row of each group."""
    group_of = np.full(len(digest), -1, dtype=np.int32)
    firsts = [np.empty(0, dtype=np.int32)]
    groups = 0
    for piece in _pieces(digest):
        order, ordered = stable_sort(digest[piece])
        row = piece[order]
        differs = np.ones(len(row) + 1, dtype=np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=differs[1:-1])
        bounds = np.flatnonzero(differs)
        sites = np.diff(bounds)
        repeated = sites > 1
        number = np.arange(groups, groups + np.count_nonzero(repeated), dtype=np.int32)
        group_of[row[np.repeat(repeated, sites)]] = np.repeat(number, sites[repeated])
        # The order is stable, so a group's first row is its first site.
        firsts.append(row[bounds[:-1][repeated]])
        groups += len(number)
    return group_of, np.concatenate(firsts).astype(np.int64)


def _pieces(digest: NDArray[np.uint64]) -> Iterator[NDArray[np.int32]]:
    """The rows in pieces, ascending in each: equal digests are in the same piece.

    Digests that differ in their highest bits can be sorted apart: in pieces that fit into
    a CPU's cache, and with memory for one piece at a time.
    """
    bits = min(16, (len(digest) // _PIECE_SITES).bit_length())
    parts = []
    for first in range(0, len(digest), _SPLIT_SITES):
        high = digest[first : first + _SPLIT_SITES] >> np.uint64(48)
        piece = high.astype(np.uint16) >> np.uint16(16 - bits)
        row = np.argsort(piece, kind="stable").astype(np.int32) + np.int32(first)
        ends = np.cumsum(np.bincount(piece, minlength=1 << bits))
        parts.append(np.split(row, ends[:-1]))
    for rows in zip(*parts, strict=True):
        yield np.concatenate(rows)


def _in_guest_order(vm: NDArray[np.int32], page: NDArray[np.int64]) -> bool:
    before, after = slice(None, -1), slice(1, None)
    follows = (vm[before] < vm[after]) | ((vm[before] == vm[after]) & (page[before] < page[after]))
    return bool(follows.all())
