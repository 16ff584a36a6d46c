"""What the guests' worker puts into pages, once more, independent of it.

Mirrors `content_key` and `fill` of images/common/worker.h: word i of a page is
key + i * STEP modulo 2**64, and key 0 means a page of zeros.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
PAGE_WORDS = PAGE_BYTES // 8
STEP = 0x9E3779B97F4A7C15
DISK_SEED = 0xD15C
"""The disk's content is the same for every guest (images/tiny/dma.h)."""

_MASK = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


class Kind(IntEnum):
    """Kinds of content (images/common/worker.h)."""

    UNIQUE = 0
    SHARED = 1
    REPEAT = 2
    DISK_BLOCK = 100
    DMA_COMMON = 101


def mix(first: int, second: int) -> int:
    """The finaliser of splitmix64 over both."""
    z = (first * STEP + second + 1) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def content_key(kind: Kind, seed: int, number: int) -> int:
    """The key of content `number` of that kind; never 0."""
    return mix(mix(kind, seed), number) or 1


def pages_of_keys(keys: Words) -> Words:
    """The pages, shape (n, PAGE_WORDS), that belong to `keys`, shape (n,)."""
    steps = np.arange(PAGE_WORDS, dtype=np.uint64) * np.uint64(STEP)
    return np.where(keys[:, None] == 0, np.uint64(0), keys[:, None] + steps[None, :])


def worker_pages(pages: Words) -> npt.NDArray[np.bool_]:
    """Which of `pages`, shape (n, PAGE_WORDS), are whole non-zero pages of a worker."""
    steps = np.diff(pages, axis=1) == np.uint64(STEP)
    return np.asarray(steps.all(axis=1))
