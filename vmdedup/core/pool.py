"""The pool: several copies of one content, so that neighbours can share a mapping.

Owns which contents get more than one store page. A mapping shows pages of the store that
follow each other, so of pages with one content that follow each other in a guest (what it
has filled with one byte, say) each would need a mapping of its own. With k copies that
follow each other in the store k such pages need one. Page p of any guest takes copy p mod k:
so neighbours fit together whenever and whoever merges them, and no order has to be known.

Promises that a copy beyond what `most_sites` demands saves mappings that cost as much memory
as it does, that no copy has more sites, and that every copy has at least two but for what
is left over by `most_sites`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.unstable_tree import Groups, only

_MAPPINGS_PER_PAGE = 16
"""That take as much of the kernel's memory as a page does: struct vm_area_struct (192 bytes)
and its part of the maple tree (include/linux/mm_types.h, lib/maple_tree.c)."""
_MOST_DOUBLINGS = 6
"""Above the fewest copies: 64 of them, of a content that needs one."""
_EVENLY = 0.85
"""How far copies are filled on average, so that few are filled beyond `most_sites`."""

Numbers = NDArray[np.int64]


def with_copies(groups: Groups, most_sites: int | None) -> Groups:
    """The same sites with groups of their own for the copies of a content.

    Contents that are worth it come first, the copies of each one after the other. No group
    has more than `most_sites`; a surplus of one site stays as a group of one, which is not
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
    """How many copies of each content neighbours should find; 1: none, or as it comes."""
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
    """Whether each site but the first is the page behind the site before, and like it."""
    before, after = slice(None, -1), slice(1, None)
    follows = groups.group[after] == groups.group[before]
    follows &= groups.page[after] == groups.page[before] + 1
    follows &= groups.vm[after] == groups.vm[before]
    return np.asarray(follows)


def _copies(page: Numbers, is_inner: NDArray[np.bool_], most_sites: int | None) -> int:
    """How many copies of the content of these pages cost the least, mappings included.

    `is_inner`: which follow a page of the same content.
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
    """For each site how often its number was given to `most_sites` sites before."""
    order = np.argsort(number, kind="stable")
    in_order = number[order]
    place = np.arange(len(order)) - np.searchsorted(in_order, in_order)
    part = np.empty(len(order), dtype=np.int64)
    part[order] = place // most_sites
    return part


def split(groups: Groups, most_sites: int) -> Groups:
    """The same with no group above `most_sites`: the surplus forms groups of its own.

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
