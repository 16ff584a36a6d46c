"""The pool: several copies of one content, so that neighbours can share a mapping.

Owns the choice of contents that get more than one store page. A mapping shows store pages
that follow each other. So if neighbouring pages of a guest have one content (filled with one
byte, say), each would need its own mapping. With k copies that follow each other in the
store, k such pages need one mapping. Page p of any guest takes copy p mod k: so neighbours
fit together whenever they are merged, in whatever VM, and no order has to be known.

Promises that a copy beyond those `most_sites` demands saves mappings that cost as much memory
as it does. Promises that no copy has more than `most_sites` sites, and each at least two,
except for the rest that `most_sites` leaves over.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.unstable_tree import Groups, only

_MAPPINGS_PER_PAGE = 16
"""Mappings that take as much kernel memory as one page: each a struct vm_area_struct (192
bytes) and its part of the maple tree (include/linux/mm_types.h, lib/maple_tree.c)."""
_MOST_DOUBLINGS = 6
"""Most doublings of the fewest copies: 64 copies of a content that needs one."""
_EVENLY = 0.85
"""Average share of `most_sites` that copies are filled to, so that few exceed it."""

Numbers = NDArray[np.int64]


def with_copies(groups: Groups, most_sites: int | None) -> Groups:
    """The same sites, with a group for each copy of a content.

    Contents with several copies come first, the copies of each in sequence. No group has
    more than `most_sites`; a surplus of one site stays as a group of one, which is not
    worth a store page.
    """
    copies = _copies_of(groups, most_sites)
    is_pooled = copies > 1
    if not is_pooled.any():
        return groups if most_sites is None else split(groups, most_sites)
    in_pool = is_pooled[groups.group]
    site = np.flatnonzero(in_pool)
    content = groups.group[site]
    number = content.astype(np.int64) * copies.max() + groups.page[site] % copies[content]
    if most_sites is not None:
        number += _left_over(number, most_sites) * (int(number.max()) + 1)
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    rest = only(groups, ~is_pooled)
    if most_sites is not None:
        rest = split(rest, most_sites)
    group = np.empty(len(groups.group), dtype=np.int32)
    group[site] = number
    group[~in_pool] = rest.group + len(first)
    return Groups(
        groups.vm,
        groups.page,
        group,
        np.concatenate([site[first], np.flatnonzero(~in_pool)[rest.first]]),
        np.concatenate([groups.digest[content[first]], rest.digest]),
    )


def _copies_of(groups: Groups, most_sites: int | None) -> Numbers:
    """The number of copies of each content; 1: no copies for the sake of neighbours."""
    copies = np.ones(len(groups), dtype=np.int64)
    follows = _follows(groups)
    pairs = np.bincount(groups.group[1:][follows], minlength=len(groups))
    site = np.flatnonzero((pairs >= _MAPPINGS_PER_PAGE)[groups.group])
    if not len(site):
        return copies
    site = site[np.argsort(groups.group[site], kind="stable")]
    content = groups.group[site]
    for sites in np.split(site, np.flatnonzero(np.diff(content)) + 1):
        is_inner = (sites > 0) & follows[sites - 1]
        copies[groups.group[sites[0]]] = _copies(groups.page[sites], is_inner, most_sites)
    return copies


def _follows(groups: Groups) -> NDArray[np.bool_]:
    """Whether each site but the first directly follows the site before, with its content."""
    before, after = slice(None, -1), slice(1, None)
    follows = groups.group[after] == groups.group[before]
    follows &= groups.page[after] == groups.page[before] + 1
    follows &= groups.vm[after] == groups.vm[before]
    return np.asarray(follows)


def _copies(page: Numbers, is_inner: NDArray[np.bool_], most_sites: int | None) -> int:
    """The number of copies of these pages' content that costs least, mappings included.

    `is_inner`: whether each page follows a page of the same content.
    """
    fewest = least = 1
    if most_sites is not None:
        fewest = -(-len(page) // most_sites)
        least = max(1, math.ceil(len(page) / (_EVENLY * most_sites)))
    inner = page[is_inner]
    lowest_cost, best = len(page), 1
    for doubling in range(_MOST_DOUBLINGS + 1):
        copies = least << doubling
        mappings = len(page) - len(inner) + int(np.count_nonzero(inner % copies == 0))
        cost = mappings + _MAPPINGS_PER_PAGE * (copies - fewest)
        if cost < lowest_cost and (np.bincount(page % copies) != 1).all():
            lowest_cost, best = cost, copies
    return best


def _left_over(number: Numbers, most_sites: int) -> Numbers:
    """For each site how many times `most_sites` earlier sites have had its number."""
    order = np.argsort(number, kind="stable")
    in_order = number[order]
    place = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    part = np.empty(len(order), dtype=np.int64)
    part[order] = place // most_sites
    return part


def split(groups: Groups, most_sites: int) -> Groups:
    """The same sites with no group above `most_sites`: the surplus forms further groups.

    Sites are dealt in guest order. A surplus of one site stays as a group of one,
    which is not worth a store page.
    """
    if not len(groups) or int(groups.sites.max()) <= most_sites:
        return groups
    part = _left_over(groups.group.astype(np.int64), most_sites)
    key = groups.group.astype(np.int64) * (int(part.max()) + 1) + part
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    by_first = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int32)
    rank[by_first] = np.arange(len(first), dtype=np.int32)
    first = first[by_first].astype(np.int64)
    digest = groups.digest[groups.group[first]]
    return Groups(groups.vm, groups.page, rank[number], first, digest)
