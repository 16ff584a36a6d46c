"""Columns of which only what was written takes memory.

Owns their allocation. Most of a large guest is never touched, and of what is zero in a
column nothing is to be kept. Promises memory of its own that the kernel gives by the page
of 4 KiB: numpy would take it from the heap, where it was used before and is cleared, and
ask for huge pages. Refuses nothing.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def zeroes(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """`count` zeroes, shape (count,), to be written."""
    size_bytes = count * np.dtype(dtype).itemsize
    if not size_bytes:
        return np.zeros(0, dtype=dtype)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=dtype)
