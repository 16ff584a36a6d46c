"""Page contents as numbers: 64 bits to nominate, 128 bits to count.

Owns the two hash functions and the seed convention. Promises that equal pages
under equal seeds give equal numbers; the reverse is only likely, so nothing is
merged on a digest: digests nominate, bytes decide. Refuses buffers that are not
whole pages.

Each engine or census draws a new seed. A guest that does not know it cannot
prepare pages that collide; a guest that still finds a collision loses savings,
never content.

XXH3 is the fastest hash that comes as a wheel (0.2 us a page, call included); it is
not a cryptographic hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from vmdedup.errors import UsageError
from vmdedup.units import PAGE_BYTES

_ZERO_PAGE = bytes(PAGE_BYTES)

_GOLDEN_RATIO = np.uint64(0x9E37_79B9_7F4A_7C15)
"""2^64 over the golden ratio, odd: multiples of it differ in their high bits (Knuth 6.4)."""

Buffer = bytes | bytearray | memoryview


def zero_digest(seed: int) -> int:
    """XXH3-64 of a page of zero bytes under the seed.

    A page with this digest is only *nominated* as a zero page; the gate compares
    its bytes.
    """
    return xxh3_64_intdigest(_ZERO_PAGE, seed)


def apart_by_node(
    digest: NDArray[np.uint64], node: NDArray[np.int32], seed: int
) -> NDArray[np.uint64]:
    """Digests that agree only for equal pages of one NUMA node: uint64, shape (n,).

    So one tree does the work of KSM's trees per node (merge_across_nodes=0). Zero
    pages keep their digest: the kernel's zero page has no node.
    """
    mixed = digest ^ ((node.astype(np.int64) + 2).astype(np.uint64) * _GOLDEN_RATIO)
    return np.where(digest == np.uint64(zero_digest(seed)), digest, mixed)


def fingerprint_pages(buffer: Buffer, seed: int) -> NDArray[np.uint64]:
    """XXH3-128 of each page: uint64, shape (pages, 2), high half first.

    A fingerprint stands in for the content if pages are only counted (`analyze`)
    and no bytes are kept to compare. Among n distinct pages that were not made to
    collide, the chance of a single wrong count is about n^2 / 2^129: below
    10^-20 for a tebibyte of RAM. With 64 bits it would be 1 in 500 for the
    same tebibyte, too much to be called exact.

    Raises UsageError when `buffer` is not a whole number of pages.
    """
    view = _whole_pages(buffer)
    starts = range(0, len(view), PAGE_BYTES)
    joined = b"".join([xxh3_128_digest(view[at : at + PAGE_BYTES], seed) for at in starts])
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def zero_fingerprint(seed: int) -> NDArray[np.uint64]:
    """The fingerprint of a page of zero bytes, as `fingerprint_pages` gives it: shape (2,)."""
    high_low: NDArray[np.uint64] = fingerprint_pages(_ZERO_PAGE, seed)[0]
    return high_low


def _whole_pages(buffer: Buffer) -> memoryview:
    view = memoryview(buffer).cast("B")
    if len(view) % PAGE_BYTES:
        raise UsageError(f"{len(view)} bytes are not a whole number of {PAGE_BYTES}-byte pages")
    return view
