"""Loners: candidates without a partner, that a new candidate may match.

Owns one index a trust domain, from digest to site. With dirty tracking a pass brings
a handful of new candidates. Such a page can be merged only if it matches a loner, a
published page or another new candidate. The index is the unstable tree that KSM throws
away after each full scan, kept. Its pages are not protected either, so each match is
looked up in the rmap again.

Promises to find every candidate that was added and has not changed since. A search
passes over entries whose pages were written or merged since; joining runs drops them.
The index is kept as a few sorted runs, each at least twice as long as the next one:
adding some pages costs, in the long run, in proportion to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.rmap import PageColumns
from vmdedup.core.scan import are_candidates
from vmdedup.core.sorting import among, lengths, ranges, stable_sort, united

_VM_SHIFT = 40
"""Bits of the page index in a site's number (int64); the VM's number stands above them."""
_PAGE_MASK = (1 << _VM_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class _Entries:
    """Digests and their sites, ascending by digest."""

    digest: NDArray[np.uint64]
    site: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.site)

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> _Entries:
        """Some of the entries, in their order."""
        return _Entries(self.digest[which], self.site[which])


class Loners:
    """The loners of the VMs whose rmaps these are; the pages of VM v are row v."""

    __slots__ = ("_runs", "_vms")

    def __init__(self, vms: Sequence[PageColumns]) -> None:
        self._vms = vms
        self._runs: list[_Entries] = []

    def add(self, pages: Sequence[NDArray[np.int64]]) -> None:
        """Take these candidates in as loners; one may be there already."""
        if any(map(len, pages)):
            self._add(self._entries(pages))

    def find(self, digest: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        """The loners that have one of these digests, per VM, ascending."""
        return self._by_vm(self._find(united([digest])).site)

    def meet(self, pages: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Add new candidates; return those with a partner, and their partners, ascending.

        A partner is another new candidate, or a loner.
        """
        if not any(map(len, pages)):
            return list(pages)
        new = self._entries(pages)
        begins = np.ones(len(new), dtype=np.bool_)
        np.not_equal(new.digest[1:], new.digest[:-1], out=begins[1:])
        begin = np.flatnonzero(begins)
        content = new.digest[begin]
        known = self._find(content)
        # A page rewritten with the same content is among the loners itself.
        known = known.take(~among(known.site, new.site))
        meets = lengths(begin, len(new)) > 1
        meets[np.searchsorted(content, known.digest)] = True
        self._add(new)
        met = new.site[meets[np.cumsum(begins) - 1]]
        return self._by_vm(united([met, known.site]))

    def _entries(self, pages: Sequence[NDArray[np.int64]]) -> _Entries:
        digest = np.concatenate(
            [columns.digest[page] for columns, page in zip(self._vms, pages, strict=True)]
        )
        order, ordered = stable_sort(digest)
        site = np.concatenate([(vm << _VM_SHIFT) + page for vm, page in enumerate(pages)])
        return _Entries(ordered, site[order])

    def _add(self, new: _Entries) -> None:
        self._runs.append(new)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [self._joined(*self._runs[-2:])]
        if not len(self._runs[-1]):
            self._runs.pop()

    def _joined(self, some: _Entries, more: _Entries) -> _Entries:
        """Both as one, each site once, without pages that are no longer candidates."""
        order, digest = stable_sort(np.concatenate([some.digest, more.digest]))
        both = self._valid(_Entries(digest, np.concatenate([some.site, more.site])[order]))
        return both.take(np.sort(_first_of_each(both.site)))

    def _find(self, content: NDArray[np.uint64]) -> _Entries:
        """The candidates that have one of these digests (ascending, each once), by site."""
        found = [_Entries(content[:0], np.empty(0, dtype=np.int64))]
        for run in self._runs:
            first = np.searchsorted(run.digest, content)
            hit = run.digest[np.minimum(first, len(run) - 1)] == content
            first, end = first[hit], np.searchsorted(run.digest, content[hit], side="right")
            found.append(run.take(ranges(first, end - first)))
        digest = np.concatenate([entries.digest for entries in found])
        site = np.concatenate([entries.site for entries in found])
        valid = self._valid(_Entries(digest, site))
        return valid.take(_first_of_each(valid.site))

    def _valid(self, entries: _Entries) -> _Entries:
        """The entries that were neither written nor merged since they were added."""
        valid = np.zeros(len(entries), dtype=np.bool_)
        vm = entries.site >> _VM_SHIFT
        for number in united([vm]).tolist():
            columns = self._vms[number]
            mine = np.flatnonzero(vm == number)
            page = entries.site[mine] & _PAGE_MASK
            same = columns.digest[page] == entries.digest[mine]
            valid[mine] = same & are_candidates(columns, page)
        return entries.take(valid)

    def _by_vm(self, site: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The pages of these ascending sites, per VM."""
        bounds = np.searchsorted(site, np.arange(len(self._vms) + 1) << _VM_SHIFT)
        return [site[low:high] & _PAGE_MASK for low, high in pairwise(bounds)]


def _first_of_each(site: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row at which each site first occurs, by ascending site."""
    return np.unique(site, return_index=True)[1]
