"""Sizes and address kinds every module shares.

Owns the page size and the type of addresses. Refuses nothing: it only names.
"""

from __future__ import annotations

from typing import Final, NewType

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
"""Size of the x86-64 base page, the unit of merging."""

HUGE_PAGE_BYTES = 2 << 20
"""Size of a PMD-mapped transparent huge page on x86-64."""

BLOCK_BYTES = 512
"""Unit of stat's st_blocks, whatever the filesystem's own block size is (stat(2))."""

MIB = 1 << 20

Hva = NewType("Hva", int)
"""A host-virtual address inside one QEMU process."""


def pages(size_bytes: int) -> int:
    """Whole pages needed for `size_bytes`."""
    return -(-size_bytes // PAGE_BYTES)


FINEST_RATE: Final = 16
DEFAULT_RATE: Final = 256
COARSEST_RATE: Final = 4096
"""Contents for each one in a sketch: a power of two from the finest to the coarsest."""
RATES: Final = [FINEST_RATE << step for step in range(9)]


def require_rate(rate: int) -> int:
    """The rate, if a sketch can have it. Raises ValueError."""
    if rate not in RATES:
        raise ValueError(f"should be a power of two from {FINEST_RATE} to {COARSEST_RATE}")
    return rate
