"""An exact count of duplicate pages over VMs and RAM images (`analyze`).

Owns the counting; pages arrive as 128-bit fingerprints (`core/digest.py`, which
says why those count as exact). Promises counts that depend on contents only.
Takes 16 bytes per distinct page of each VM, plus about as much while a VM is
being sorted. Refuses to merge anything: no bytes are kept to compare.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmdedup.core.matrix import common_contents
from vmdedup.core.sorting import stable_order
from vmdedup.errors import UsageError
from vmdedup.models import ContentAnalysis, VmContents

_FOLD_PAGES = 1 << 20
"""Fold what was fed into the distinct set no later than after this many pages."""


class Census:
    """Feed one VM after the other, then take the result.

    `zero_fingerprint` is the zero page's under the seed of all fingerprints fed:
    uint64, shape (2,).
    """

    def __init__(self, zero_fingerprint: NDArray[np.uint64]) -> None:
        self._zero = zero_fingerprint
        self._names: list[str] = []
        self._total: list[int] = []
        self._zeros: list[int] = []
        self._distinct: list[NDArray[np.uint64]] = []
        self._fed: list[NDArray[np.uint64]] = []
        self._fed_pages = 0

    def add_vm(self, name: str) -> None:
        """Count the pages that follow for this VM; names may repeat."""
        self._fold()
        self._names.append(name)
        self._total.append(0)
        self._zeros.append(0)
        self._distinct.append(np.empty((0, 2), dtype=np.uint64))

    def feed(self, fingerprints: NDArray[np.uint64]) -> None:
        """Count pages of the VM added last; shape (pages, 2)."""
        self._require_vm()
        nonzero = fingerprints[(fingerprints != self._zero).any(axis=1)]
        self._total[-1] += len(fingerprints)
        self._zeros[-1] += len(fingerprints) - len(nonzero)
        self._fed.append(nonzero)
        self._fed_pages += len(nonzero)
        if self._fed_pages >= max(_FOLD_PAGES, len(self._distinct[-1])):
            self._fold()

    def feed_zero(self, pages: int) -> None:
        """Count pages known to read as zero without reading (holes)."""
        self._require_vm()
        self._total[-1] += pages
        self._zeros[-1] += pages

    def result(self) -> ContentAnalysis:
        """The counts so far, VMs in the order of `add_vm`; feeding may go on afterwards."""
        self._fold()
        vms = [
            VmContents(name=name, **_counts(total, zeros, len(distinct)))
            for name, total, zeros, distinct in zip(
                self._names, self._total, self._zeros, self._distinct, strict=True
            )
        ]
        contents, vm, content = _number_contents(self._distinct)
        matrix = common_contents(vm, content, len(vms))
        np.fill_diagonal(matrix, [each.duplicate_pages for each in vms])
        host = _counts(sum(self._total), sum(self._zeros), contents)
        return ContentAnalysis(**host, vms=vms, matrix=matrix.tolist())

    def _require_vm(self) -> None:
        if not self._names:
            raise UsageError("pages were fed to a census before a VM was added")

    def _fold(self) -> None:
        """Move what was fed into the distinct set of the VM added last."""
        if self._fed:
            pages = np.concatenate([self._distinct[-1], *self._fed])
            self._fed, self._fed_pages = [], 0
            order, begins = _sorted_contents(pages)
            self._distinct[-1] = pages[order[begins]]


def _counts(total: int, zeros: int, distinct: int) -> dict[str, int]:
    """The fields of one VM, or of the host as one heap of pages.

    `distinct`: non-zero contents; all but one page of each could be saved.
    """
    return {
        "total_pages": total,
        "zero_pages": zeros,
        "nonzero_pages": total - zeros,
        "distinct_pages": distinct,
        "duplicate_pages": total - zeros - distinct,
    }


def _number_contents(
    distinct: list[NDArray[np.uint64]],
) -> tuple[int, NDArray[np.int32], NDArray[np.int64]]:
    """The number of contents of all VMs, and every (vm, content number) pair."""
    pages = np.concatenate([np.empty((0, 2), dtype=np.uint64), *distinct])
    vm = np.repeat(np.arange(len(distinct), dtype=np.int32), [len(each) for each in distinct])
    order, begins = _sorted_contents(pages)
    content = np.cumsum(begins) - 1
    return int(np.count_nonzero(begins)), vm[order], content


def _sorted_contents(
    fingerprints: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order that puts equal fingerprints together, and where each content begins.

    Sorting by the high half does that already unless two contents agree in all
    its 64 bits; only then both halves are sorted.
    """
    high, low = fingerprints[:, 0], fingerprints[:, 1]
    order = stable_order(high)
    begins = np.ones(len(order), dtype=np.bool_)
    same_high = high[order[1:]] == high[order[:-1]]
    same_low = low[order[1:]] == low[order[:-1]]
    if np.any(same_high & ~same_low):
        order = np.lexsort((low, high))
        same_high = high[order[1:]] == high[order[:-1]]
        same_low = low[order[1:]] == low[order[:-1]]
    begins[1:] = ~(same_high & same_low)
    return order, begins
