"""Digests of pages as xxhash's own binding gives them: what all faster ways must equal."""

from __future__ import annotations

from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from vmdedup.units import PAGE_BYTES


def digest_pages(buffer: bytes | bytearray | memoryview, seed: int) -> NDArray[np.uint64]:
    """XXH3-64 of each page of `buffer`: uint64, shape (pages,)."""
    view = memoryview(buffer).cast("B")
    pages = (view[at : at + PAGE_BYTES] for at in range(0, len(view), PAGE_BYTES))
    digests = map(xxh3_64_intdigest, pages, repeat(seed))
    return np.fromiter(digests, dtype=np.uint64, count=len(view) // PAGE_BYTES)
