"""A VM's page space: its mergeable regions, one after the other.

Owns the arithmetic between page indices and host-virtual addresses. A page
index counts pages through all regions of a VM in order; runs never cross from
one region into the next, though their indices are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.units import PAGE_BYTES, PAGE_SHIFT

Int64s = npt.NDArray[np.int64]


class Span(Protocol):
    """The address and size of a region."""

    @property
    def start(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


class PageSpace:
    """Page indices of regions given in order; `pages` is their sum."""

    def __init__(self, spans: Sequence[Span]) -> None:
        sizes = np.array([span.size_bytes >> PAGE_SHIFT for span in spans], dtype=np.int64)
        self.address = np.array([span.start for span in spans], dtype=np.int64)
        self.region_pages = sizes
        self.first_page = np.cumsum(sizes) - sizes
        self.pages = int(sizes.sum())

    def region_of(self, page: Int64s) -> npt.NDArray[np.intp]:
        """Index of the region that holds each page."""
        if len(self.first_page) == 1:
            return np.zeros(len(page), dtype=np.intp)
        return np.searchsorted(self.first_page, page, side="right") - 1

    def hva(self, page: Int64s) -> Int64s:
        """Host-virtual address of each page."""
        if len(self.first_page) == 1:
            return np.asarray(self.address[0] + (page << PAGE_SHIFT))
        region = self.region_of(page)
        return self.address[region] + ((page - self.first_page[region]) << PAGE_SHIFT)

    def backend_offset(self, page: Int64s) -> Int64s:
        """Offset of each page in its region, in bytes."""
        return (page - self.first_page[self.region_of(page)]) << PAGE_SHIFT

    def span(self, region: int) -> tuple[int, int]:
        """(start, end) addresses of a region."""
        start = int(self.address[region])
        return start, start + int(self.region_pages[region]) * PAGE_BYTES

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) addresses of all regions."""
        return [self.span(region) for region in range(len(self.address))]

    def slice_of(self, region: int) -> slice:
        """The page indices of a region."""
        first = int(self.first_page[region])
        return slice(first, first + int(self.region_pages[region]))
